// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// The panel types that the dashboard uses. Time series, stat and table are Grafana's own components.
// Grafana does not publish its bar chart, heatmap and state timeline outside its server: they are drawn here,
// from the same fields, colours, units and options.
import React from 'react';
import {
  cacheFieldDisplayNames, FieldType, formattedValueToString, getFieldColorModeForField, getFieldDisplayName,
  getFieldDisplayValues, getDisplayValueAlignmentFactors, getValueFormat, renderMarkdown,
} from '@grafana/data';
import { BigValue, TimeSeries, VizLegend, VizRepeater, useTheme2 } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';

const noValue = (props) => props.fieldConfig.defaults.noValue;

function Empty(props) {
  const theme = useTheme2();
  const style = {
    height: props.height, display: 'flex', alignItems: 'center', justifyContent: 'center',
    textAlign: 'center', padding: 8, color: theme.colors.text.secondary,
  };
  return <div className="empty" style={style}>{noValue(props) || 'No data'}</div>;
}

const hasRows = (props) => props.data.series.some((frame) => frame.length > 0);

// ---- Grafana's components ------------------------------------------------------------------

// A dashed line at each reload, as Grafana draws annotations.
function ReloadLines({ config, times, colour }) {
  React.useLayoutEffect(() => {
    config.addHook('draw', (u) => {
      u.ctx.save();
      u.ctx.strokeStyle = colour;
      u.ctx.lineWidth = 1;
      u.ctx.setLineDash([6, 6]);
      for (const time of times) {
        const x = u.valToPos(time, 'x', true);
        if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
      }
      u.ctx.restore();
    });
  }, [config, times]);
  return null;
}

export const timeseries = (reloads, colour) => function TimeSeriesPanel(props) {
  const [times, setTimes] = React.useState(null);
  React.useEffect(() => { reloads(props.timeRange, props.id).then(setTimes); }, [props.timeRange]);
  if (!hasRows(props)) return <Empty {...props} />;
  if (!times) return null;
  return (
    <TimeSeries frames={props.data.series} structureRev={props.data.structureRev}
      timeRange={props.timeRange} timeZone={props.timeZone} width={props.width}
      height={props.height} legend={props.options.legend} options={props.options}>
      {(config) => <ReloadLines config={config} times={times} colour={colour} />}
    </TimeSeries>
  );
};

export function stat(props) {
  const theme = useTheme2();
  if (!hasRows(props)) return <Empty {...props} />;
  const values = () => getFieldDisplayValues({
    fieldConfig: props.fieldConfig, reduceOptions: props.options.reduceOptions, theme,
    replaceVariables: props.replaceVariables, data: props.data.series, timeZone: props.timeZone,
    sparkline: props.options.graphMode === 'area',
  });
  return (
    <VizRepeater source={props.data} getAlignmentFactors={getDisplayValueAlignmentFactors}
      getValues={values} width={props.width} height={props.height} itemSpacing={3}
      renderCounter={props.renderCounter} orientation="auto"
      renderValue={(r) => (
        <BigValue theme={theme} value={r.value.display} width={r.width} height={r.height}
          sparkline={r.value.sparkline} colorMode={props.options.colorMode}
          graphMode={props.options.graphMode} justifyMode={props.options.justifyMode}
          textMode={props.options.textMode} alignmentFactors={r.alignmentFactors} count={r.count} />
      )} />
  );
}

export function table(props) {
  if (!hasRows(props)) return <Empty {...props} />;
  cacheFieldDisplayNames(props.data.series);
  return (
    <TableNG data={props.data.series[0]} width={props.width} height={props.height}
      structureRev={props.data.structureRev ?? 1} fieldConfig={props.fieldConfig}
      cellHeight={props.options.cellHeight} showTypeIcons={false} timeRange={props.timeRange}
      getActions={() => []} enableSharedCrosshair={false} />
  );
}

export function text(props) {
  const html = { __html: renderMarkdown(props.options.content) };
  return <div className="markdown-html" style={{ overflow: 'auto', height: props.height }} dangerouslySetInnerHTML={html} />;
}

// ---- drawn here ----------------------------------------------------------------------------

const AXIS = 22;
const LEGEND = 28;
// The widest name of a part, and its colour.
const BESIDE = 190;

function Canvas({ width, height, draw }) {
  const ref = React.useRef(null);
  React.useLayoutEffect(() => {
    const scale = window.devicePixelRatio || 1;
    const canvas = ref.current;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext('2d');
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.scale(scale, scale);
    draw(context);
  });
  return <canvas ref={ref} style={{ width, height, display: 'block' }} />;
}

// Round marks on an axis from 0: 1, 2 or 5 times a power of ten (of two for bytes).
function marks(maximum, count, binary) {
  const rough = maximum / count;
  const base = binary ? 2 : 10;
  const power = base ** Math.floor(Math.log(rough) / Math.log(base));
  const step = binary ? power * 2 : [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(maximum / step) + 1 }, (_, i) => i * step);
}

export function barchart(props) {
  const theme = useTheme2();
  if (!hasRows(props)) return <Empty {...props} />;
  const { options } = props;
  const frame = props.data.series[0];
  const x = frame.fields.find((f) => f.name === options.xField || getFieldDisplayName(f, frame) === options.xField);
  if (!x) throw new Error(`bar chart: no field ${options.xField} among ${frame.fields.map((f) => f.name)}`);
  const fields = frame.fields.filter((f) => f !== x && f.type === FieldType.number);
  const share = options.stacking === 'percent';
  const colour = (field) => getFieldColorModeForField(field).getCalculator(field, theme)(0, 0);
  const value = (field, i) => Math.max(0, Number(field.values[i]) || 0);
  const totals = x.values.map((_, i) => fields.reduce((sum, f) => sum + value(f, i), 0));
  const maximum = share ? 1 : Math.max(...totals);
  const { unit } = props.fieldConfig.defaults;
  // Bars of one kind stand in the order in which they come.
  const order = fields.length === 1 ? x.values.map((_, i) => i) : x.values.map((_, i) => i).sort((a, b) => String(x.values[a]).localeCompare(String(x.values[b]), undefined, { numeric: true }));
  const { placement } = options.legend;
  const beside = placement === 'right';
  const plotHeight = props.height - (beside ? 0 : LEGEND);
  const plotWidth = props.width - (beside ? BESIDE : 0);
  const draw = (context) => {
    context.font = `${theme.typography.fontSize - 2}px ${theme.typography.fontFamily}`;
    const labels = x.values.map(String);
    const left = Math.min(plotWidth * 0.4, Math.max(...labels.map((l) => context.measureText(l).width)) + 12);
    const width = plotWidth - left - 24;
    const line = (plotHeight - AXIS) / order.length;
    context.textBaseline = 'middle';
    for (const mark of marks(maximum, share ? 5 : 6, !share && unit === 'bytes')) {
      const at = left + (mark / maximum) * width;
      context.fillStyle = theme.colors.border.weak;
      context.fillRect(at, 0, 1, plotHeight - AXIS);
      context.fillStyle = theme.colors.text.secondary;
      context.textAlign = 'center';
      const label = share ? `${Math.round(mark * 100)}%` : formattedValueToString(getValueFormat(unit)(mark, unit === 'bytes' ? 0 : undefined));
      context.fillText(label, at, plotHeight - AXIS / 2);
    }
    order.forEach((i, position) => {
      const bar = Math.min(line * options.barWidth * options.groupWidth, 48);
      const y = position * line + (line - bar) / 2;
      let at = left;
      for (const field of fields) {
        const size = (value(field, i) / (share ? totals[i] || 1 : maximum)) * width;
        context.fillStyle = colour(field);
        context.fillRect(at, y, size, bar);
        at += size;
      }
      context.fillStyle = theme.colors.text.primary;
      context.textAlign = 'right';
      context.fillText(labels[i], left - 8, y + bar / 2, left - 10);
    });
  };
  const items = fields.map((f) => ({ label: getFieldDisplayName(f, frame), color: colour(f), yAxis: 1 }));
  return (
    <div style={{ display: beside ? 'flex' : 'block' }}>
      <Canvas width={plotWidth} height={plotHeight} draw={draw} />
      <VizLegend items={items} displayMode="list" placement={placement} />
    </div>
  );
}

export function stateTimeline(props) {
  const theme = useTheme2();
  if (!hasRows(props)) return <Empty {...props} />;
  cacheFieldDisplayNames(props.data.series);
  const lanes = props.data.series.map((frame) => {
    const [time, value] = frame.fields;
    return { name: getFieldDisplayName(value, frame, props.data.series), time: time.values, value };
  });
  lanes.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  const from = props.timeRange.from.valueOf(), to = props.timeRange.to.valueOf();
  const plotHeight = props.height - LEGEND;
  const seen = new Map();
  for (const { value } of lanes) for (const one of value.values) {
    const { text, color } = value.display(one);
    seen.set(text, color);
  }
  const draw = (context) => {
    context.font = `${theme.typography.fontSize - 2}px ${theme.typography.fontFamily}`;
    context.textBaseline = 'middle';
    const left = Math.max(...lanes.map((lane) => context.measureText(lane.name).width)) + 12;
    const width = props.width - left - 8;
    const line = plotHeight / lanes.length;
    lanes.forEach(({ name, time, value }, position) => {
      const y = position * line + line * 0.1;
      time.forEach((at, i) => {
        const until = Math.min(time[i + 1] ?? at, at + 1.5 * (time[1] - time[0]));
        context.fillStyle = value.display(value.values[i]).color;
        context.fillRect(left + ((at - from) / (to - from)) * width, y, ((until - at) / (to - from)) * width + 1, line * 0.8);
      });
      context.fillStyle = theme.colors.text.primary;
      context.textAlign = 'right';
      context.fillText(name, left - 8, y + line * 0.4);
    });
  };
  const items = [...seen].map(([label, color]) => ({ label, color, yAxis: 1 }));
  return (
    <div>
      <Canvas width={props.width} height={plotHeight} draw={draw} />
      <VizLegend items={items} displayMode="list" placement="bottom" />
    </div>
  );
}

export function heatmap(props) {
  const theme = useTheme2();
  const frame = props.data.series[0];
  const [time, ...buckets] = frame?.fields ?? [];
  const most = Math.max(0, ...buckets.flatMap((bucket) => bucket.values));
  if (!most) return <Empty {...props} />;
  const format = getValueFormat(props.options.yAxis.unit);
  const from = props.timeRange.from.valueOf(), to = props.timeRange.to.valueOf();
  const draw = (context) => {
    context.font = `${theme.typography.fontSize - 2}px ${theme.typography.fontFamily}`;
    // As wide as the widest bound, as Grafana's axis is.
    const bounds = buckets.map(({ name }) => (Number(name) === Infinity ? '+Inf' : formattedValueToString(format(Number(name)))));
    const left = Math.max(...bounds.map((bound) => context.measureText(bound).width)) + 12;
    const height = props.height - AXIS, width = props.width - left - 8;
    const line = height / buckets.length;
    const step = time.values.length > 1 ? time.values[1] - time.values[0] : to - from;
    context.textBaseline = 'middle';
    buckets.forEach((bucket, i) => {
      const y = height - (i + 1) * line;
      context.fillStyle = theme.colors.text.secondary;
      context.textAlign = 'right';
      context.fillText(bounds[i], left - 6, y + line / 2);
      context.fillStyle = theme.colors.border.weak;
      context.fillRect(left, y, width, 1);
      bucket.values.forEach((count, j) => {
        if (count <= props.options.filterValues.le) return;
        context.fillStyle = `hsl(28 90% ${80 - 45 * (count / most) ** props.options.color.exponent}%)`;
        const at = left + ((time.values[j] - step - from) / (to - from)) * width;
        context.fillRect(at, y + 1, Math.max(3, (step / (to - from)) * width - props.options.cellGap), line - 1);
      });
    });
    for (let i = 1; i < 4; i++) {
      const at = new Date(from + ((to - from) * i) / 4);
      context.fillStyle = theme.colors.text.secondary;
      context.textAlign = 'center';
      context.fillText(at.toISOString().slice(11, 16), left + (width * i) / 4, height + AXIS / 2);
    }
  };
  return <Canvas width={props.width} height={props.height} draw={draw} />;
}
