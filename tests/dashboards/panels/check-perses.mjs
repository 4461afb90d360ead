// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node check-perses.mjs DASHBOARD.json OUT.ts: writes the dashboard as TypeScript literals that
// `satisfies` the types that Perses and its plugins publish, for tsc to check.
import fs from 'fs';

const [input, output] = process.argv.slice(2);
const dashboard = JSON.parse(fs.readFileSync(input, 'utf8'));
const TYPES = {
  TimeSeriesChart: ['timeseries-chart-plugin/lib/time-series-chart-model', 'TimeSeriesChartOptions'],
  StatChart: ['stat-chart-plugin/lib/stat-chart-model', 'StatChartOptions'],
  Table: ['table-plugin/lib/table-model', 'TableOptions'],
  BarChart: ['bar-chart-plugin/lib/bar-chart-model', 'BarChartOptions'],
  StatusHistoryChart: ['status-history-chart-plugin/lib/status-history-model', 'StatusHistoryChartOptions'],
  Markdown: ['markdown-plugin/lib/markdown-panel-model', 'MarkdownPanelOptions'],
  PrometheusTimeSeriesQuery: [
    'prometheus-plugin/lib/plugins/prometheus-time-series-query/time-series-query-model', 'PrometheusTimeSeriesQuerySpec',
  ],
  PrometheusPromQLVariable: ['prometheus-plugin/lib/plugins/types', 'PrometheusPromQLVariableOptions'],
  PrometheusLabelValuesVariable: ['prometheus-plugin/lib/plugins/types', 'PrometheusLabelValuesVariableOptions'],
};

const lines = [`import type { DashboardResource } from '@perses-dev/core';`];
for (const [module, type] of Object.values(TYPES)) {
  lines.push(`import type { ${type} } from '@perses-dev/${module}';`);
}
const literal = (value) => JSON.stringify(value, null, 1);
const plugins = [
  ...dashboard.spec.variables.map((variable) => variable.spec.plugin),
  ...Object.values(dashboard.spec.panels).flatMap(({ spec }) => [
    spec.plugin, ...(spec.queries ?? []).map((query) => query.spec.plugin),
  ]),
];
lines.push(`export const dashboard = ${literal(dashboard)} satisfies DashboardResource;`);
plugins.forEach(({ kind, spec }, number) => {
  lines.push(`export const p${number} = ${literal(spec)} satisfies ${TYPES[kind]?.[1] ?? 'never'};`);
});
fs.writeFileSync(output, lines.join('\n') + '\n');
