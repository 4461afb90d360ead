// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node check-manifest.mjs MANIFEST.json OUT.ts: checks an object of the Prometheus operator against
// the schema of its CRD, and writes it as a TypeScript literal, for tsc to find unknown fields.
import fs from 'fs';
import * as operator from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';

const [input, output] = process.argv.slice(2);
const manifest = JSON.parse(fs.readFileSync(input, 'utf8'));
new operator[manifest.kind](manifest).validate();
const { apiVersion, kind, ...fields } = manifest;
if (apiVersion !== operator[kind].apiVersion) throw new Error(`${apiVersion} is not ${operator[kind].apiVersion}`);
fs.writeFileSync(output, `import { ${kind} } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';
export const manifest = new ${kind}(${JSON.stringify(fields, null, 1)});
`);
