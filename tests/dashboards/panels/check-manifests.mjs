// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node check-manifests.mjs MANIFESTS.json OUT.ts: checks objects of the Prometheus operator against
// the schemas of their CRDs, and writes them as TypeScript literals, for tsc to find unknown fields.
import fs from 'fs';
import * as operator from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';

const [input, output] = process.argv.slice(2);
const literals = JSON.parse(fs.readFileSync(input, 'utf8')).map((manifest) => {
  new operator[manifest.kind](manifest).validate();
  const { apiVersion, kind, ...fields } = manifest;
  if (apiVersion !== operator[kind].apiVersion) throw new Error(`${apiVersion} is not ${operator[kind].apiVersion}`);
  return `new operator.${kind}(${JSON.stringify(fields, null, 1)})`;
});
fs.writeFileSync(output, `import * as operator from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';
export const manifests = [${literals.join(',\n')}];
`);
