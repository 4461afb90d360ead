// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node check-types.mjs DASHBOARD.json OUT.ts: writes the dashboard as TypeScript literals that
// `satisfies` Grafana's own generated types (enums loosened to their literals), for tsc to check.
import fs from 'fs';

const [input, output] = process.argv.slice(2);
const { panels: rows, templating, annotations, ...rest } = JSON.parse(fs.readFileSync(input, 'utf8'));
const panels = rows.flatMap((panel) => [{ ...panel, ...(panel.panels && { panels: [] }) }, ...(panel.panels ?? [])]);
const TYPES = {
  barchart: 'BarChart', heatmap: 'Heatmap', stat: 'Stat', 'state-timeline': 'StateTimeline', table: 'Table', text: 'Text', timeseries: 'TimeSeries',
};
const WITH_FIELD_CONFIG = ['barchart', 'heatmap', 'state-timeline', 'timeseries'];

const named = (type) => type.replace('-', '');

const lines = [
  `import type { Dashboard, Panel, RowPanel, FieldConfig, FieldConfigSource, VariableModel, TableFieldOptions } from '@grafana/schema';`,
];
for (const type of new Set(panels.map((panel) => panel.type))) {
  if (type === 'row') continue;
  lines.push(TYPES[type]
    ? `import type * as ${named(type)} from '@grafana/schema/dist/esm/raw/composable/${named(type)}/panelcfg/x/${TYPES[type]}PanelCfg_types.gen';`
    : `const unknown_panel_type_${named(type)}: never = 0;`);
}
lines.push(`
type L<T> = T extends string ? \`\${T}\` : T extends number ? number : T extends (infer U)[] ? L<U>[]
  : T extends object ? { [K in keyof T]: L<T[K]> } : T;
interface Query {
  refId: string; expr: string; legendFormat?: string; instant?: boolean; range?: boolean; interval?: string;
  format?: 'time_series' | 'table' | 'heatmap'; exemplar?: boolean; hide?: boolean;
  editorMode?: 'code' | 'builder'; datasource?: { type?: string; uid?: string };
}
type Defaults<C> = Omit<L<FieldConfig>, 'custom'> & { custom?: L<Partial<C>> };
type P<O, C = {}> = Omit<L<Panel>, 'options' | 'fieldConfig' | 'targets'> & {
  options?: L<Partial<O>>; targets?: Query[];
  fieldConfig?: { defaults: Defaults<C>; overrides: L<FieldConfigSource['overrides']> };
};
interface Annotation {
  name: string; datasource: { type: string; uid: string }; enable: boolean; hide: boolean; iconColor: string;
  expr: string; step: string; filter: { exclude: boolean; ids: number[] }; useValueForTime: 'on'; titleFormat: string; textFormat: string; tagKeys: string;
  target: { refId: string; expr: string; interval: string };
}`);
const literal = (value) => JSON.stringify(value, null, 1);
lines.push(`export const dashboard = ${literal(rest)} satisfies Partial<L<Dashboard>>;`);
lines.push(`export const annotations = ${literal(annotations.list)} satisfies Annotation[];`);
for (const variable of templating.list) {
  lines.push(`export const v_${variable.name} = ${literal(variable)} satisfies L<Omit<VariableModel, 'current'>> & { current: object };`);
}
for (const panel of panels) {
  const { type } = panel;
  const custom = WITH_FIELD_CONFIG.includes(type) ? `, ${named(type)}.FieldConfig` : type === 'table' ? ', TableFieldOptions' : '';
  const expected = type === 'row' ? 'L<RowPanel>' : `P<${named(type)}.Options${custom}>`;
  const { datasource, description, ...row } = panel;
  lines.push(`export const p${panel.id} = ${literal(type === 'row' ? row : panel)} satisfies ${expected};`);
}
fs.writeFileSync(output, lines.join('\n') + '\n');
