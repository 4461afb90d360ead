// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// The data source: asks a real Prometheus and shapes the answers as Grafana's Prometheus data
// source does (time series, table, heatmap), for what this dashboard uses of it.
import { RuntimeDataSource, sceneGraph } from '@grafana/scenes';
import { FieldType, renderLegendFormat } from '@grafana/data';

async function api(path, parameters) {
  const asked = new URLSearchParams(parameters);
  // As Grafana does unless it is told otherwise: an expression may be longer than an address.
  const response = path.startsWith('query')
    ? await fetch('/prom/api/v1/' + path, { method: 'POST', body: asked })
    : await fetch('/prom/api/v1/' + path + '?' + asked);
  const answer = await response.json();
  if (answer.status !== 'success') throw new Error(answer.errorType + ': ' + answer.error);
  return answer.data;
}

const escapeRegex = (value) => value.replace(/[\\^$*+?.()|[\]{}]/g, '\\\\$&');
const several = (value) =>
  Array.isArray(value)
    ? value.length === 1 ? escapeRegex(value[0]) : '(' + value.map(escapeRegex).join('|') + ')'
    : escapeRegex(String(value));
const number = (text) => (text === '+Inf' ? Infinity : text === '-Inf' ? -Infinity : Number(text));

export class Prometheus extends RuntimeDataSource {
  constructor(scrapeSeconds) {
    super('prometheus', 'prom');
    this.scrapeSeconds = scrapeSeconds;
  }

  // $__rate_interval as Grafana has it: the step plus a scrape, and at least four scrapes.
  interpolate(expr, variables, step, rangeSeconds) {
    const builtIn = {
      ...variables,
      __interval: { value: step + 's' },
      __rate_interval: { value: Math.max(step + this.scrapeSeconds, 4 * this.scrapeSeconds) + 's' },
      __range: { value: rangeSeconds + 's' },
    };
    return sceneGraph.interpolate(builtIn.__sceneObject.value.valueOf(), expr, builtIn, several);
  }

  async query(request) {
    const from = request.range.from.valueOf() / 1000;
    const to = request.range.to.valueOf() / 1000;
    const step = Math.max(this.scrapeSeconds, Math.round((request.intervalMs || 1000) / 1000));
    const targets = request.targets.filter((target) => !target.hide);
    const answers = targets.map(async (target) => {
      const expr = this.interpolate(target.expr, request.scopedVars, step, Math.round(to - from));
      const asked = { expr, instant: !!target.instant, series: 0 };
      (window.queries ||= []).push(asked);
      const data = target.instant
        ? await api('query', { query: expr, time: to })
        : await api('query_range', { query: expr, start: from, end: to, step });
      asked.series = data.result.length;
      if (target.format === 'table') return tableFrames(target, data, targets.length);
      if (target.format === 'heatmap') return heatmapFrames(target, data);
      return seriesFrames(target, data, step);
    });
    return { data: (await Promise.all(answers)).flat(), state: 'Done' };
  }

  async metricFindQuery(query, { scopedVars, range }) {
    const result = /^query_result\((.+)\)$/.exec(query.query ?? query);
    if (result) {
      const expr = sceneGraph.interpolate(scopedVars.__sceneObject.value.valueOf(), result[1], {}, several);
      const { result: found } = await api('query', { query: expr, time: range.to.valueOf() / 1000 });
      return found.map(({ metric, value: [at, number] }) => {
        const labels = Object.entries(metric).map(([label, value]) => `${label}="${value}"`);
        return { text: `{${labels.join(',')}} ${number} ${at * 1000}` };
      });
    }
    const asked = /^label_values\((?:(.+),\s*)?(\w+)\)$/.exec((query.query ?? query).trim());
    if (!asked) throw new Error('unsupported variable query ' + JSON.stringify(query));
    const values = await api(`label/${asked[2]}/values`, asked[1] ? { 'match[]': asked[1] } : {});
    return values.map((text) => ({ text, value: text }));
  }

  async reloads(annotation, sceneObject, range) {
    const expr = sceneGraph.interpolate(sceneObject, annotation.expr, {}, several);
    const data = await api('query_range', {
      query: expr,
      start: range.from.valueOf() / 1000,
      end: range.to.valueOf() / 1000,
      step: parseInt(annotation.step, 10),
    });
    (window.queries ||= []).push({ expr, annotation: true, series: data.result.length });
    // useValueForTime: each distinct value is an event at that millisecond.
    const times = data.result.flatMap((series) => series.values.map(([, value]) => Number(value)));
    return [...new Set(times.map(Math.floor))].sort();
  }
}

function seriesFrames(target, data, step) {
  return data.result.map((series) => {
    const points = series.values || [series.value];
    const { __name__, ...labels } = series.metric;
    const name =
      target.legendFormat && target.legendFormat !== '__auto'
        ? renderLegendFormat(target.legendFormat, series.metric)
        : (__name__ || '') + JSON.stringify(labels);
    return {
      refId: target.refId,
      name,
      length: points.length,
      meta: { type: 'timeseries-multi' },
      fields: [
        {
          name: 'Time',
          type: FieldType.time,
          config: { interval: step * 1000 },
          values: points.map(([time]) => time * 1000),
        },
        {
          name: 'Value',
          type: FieldType.number,
          labels: series.metric,
          config: { displayNameFromDS: name },
          values: points.map(([, value]) => number(value)),
        },
      ],
    };
  });
}

function tableFrames(target, data, targetCount) {
  const rows = data.result.map((series) => ({ ...series.metric, at: series.value }));
  if (!rows.length) return [{ refId: target.refId, length: 0, fields: [] }];
  const labels = [...new Set(data.result.flatMap((series) => Object.keys(series.metric)))].sort();
  return [
    {
      refId: target.refId,
      length: rows.length,
      fields: [
        {
          name: 'Time',
          type: FieldType.time,
          config: {},
          values: rows.map((row) => row.at[0] * 1000),
        },
        ...labels.map((label) => ({
          name: label,
          type: FieldType.string,
          config: { filterable: true },
          values: rows.map((row) => row[label] ?? ''),
        })),
        {
          name: targetCount > 1 ? `Value #${target.refId}` : 'Value',
          type: FieldType.number,
          config: {},
          values: rows.map((row) => number(row.at[1])),
        },
      ],
    },
  ];
}

// Cumulative buckets, one frame with a field a bucket, each less the one below it.
function heatmapFrames(target, data) {
  const buckets = data.result
    .map((series) => ({ le: number(series.metric.le), points: new Map(series.values) }))
    .sort((a, b) => a.le - b.le);
  if (!buckets.length) return [];
  const times = [...new Set(buckets.flatMap((bucket) => [...bucket.points.keys()]))].sort(
    (a, b) => a - b
  );
  return [
    {
      refId: target.refId,
      length: times.length,
      meta: { type: 'heatmap-rows' },
      fields: [
        { name: 'Time', type: FieldType.time, config: {}, values: times.map((t) => t * 1000) },
        ...buckets.map((bucket, i) => ({
          name: String(bucket.le),
          type: FieldType.number,
          config: {},
          values: times.map((t) => {
            const below = i ? Number(buckets[i - 1].points.get(t) ?? 0) : 0;
            return Number(bucket.points.get(t) ?? 0) - below;
          }),
        })),
      ],
    },
  ];
}
