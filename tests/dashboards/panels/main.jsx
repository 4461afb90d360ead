// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// Draws a dashboard JSON with Grafana's front-end libraries against a real Prometheus. This is not
// a Grafana server: what Grafana's core would register is registered here, and the mapping from
// JSON to scene, $__rate_interval, label_values and query_result are this page's own.
//   ?board=NAME  NAME.json is drawn   ?from=now-1h&to=now  time range   ?theme=light
//   ?open=1      rows that are closed in the file are open
//   ?lines=1     the lines of updates, which are off in the file, are on
import React from 'react';
import { createRoot } from 'react-dom/client';
import { BrowserRouter } from 'react-router-dom';
import { from, map, catchError, of } from 'rxjs';
import {
  createTheme, ThemeContext, PanelPlugin, EventBusSrv, LoadingState, standardFieldConfigEditorRegistry,
  standardTransformersRegistry, standardTransformers, identityOverrideProcessor, numberOverrideProcessor,
  displayNameOverrideProcessor, unitOverrideProcessor, thresholdsOverrideProcessor, valueMappingsOverrideProcessor,
} from '@grafana/data';
import { config, setPluginImportUtils, setRunRequest, setAppEvents, setDataSourceSrv, setTemplateSrv } from '@grafana/runtime';
import { GlobalStyles, PortalContainer } from '@grafana/ui';
import {
  EmbeddedScene, SceneGridLayout, SceneGridItem, SceneGridRow, VizPanel, SceneQueryRunner, SceneDataTransformer,
  SceneTimeRange, SceneVariableSet, QueryVariable, VariableValueSelectors, SceneControlsSpacer, SceneTimePicker,
  sceneUtils,
} from '@grafana/scenes';
import { Prometheus } from './prometheus.js';
import * as visualizations from './visualizations.jsx';

const parameters = new URLSearchParams(location.search);
const SCRAPE_SECONDS = Number(parameters.get('scrape') || 15);
window.problems = [];
const problem = (what) => window.problems.push(String(what?.stack || what).slice(0, 900));
window.addEventListener('error', (event) => problem(event.error || event.message));
window.addEventListener('unhandledrejection', (event) => problem(event.reason));

// ---- what Grafana's core registers ---------------------------------------------------------
const theme = createTheme({ colors: { mode: parameters.get('theme') || 'dark' } });
config.theme2 = theme;
config.bootData = { ...(config.bootData || {}), user: window.grafanaBootData.user, settings: {} };
config.buildInfo ||= { version: '13.2.2' };

const property = (id, name, process, extra = {}) => ({
  id, path: id, name, process, override: () => null, editor: () => null, shouldApply: () => true, ...extra,
});
standardFieldConfigEditorRegistry.setInit(() => [
  property('unit', 'Unit', unitOverrideProcessor),
  property('min', 'Min', numberOverrideProcessor),
  property('max', 'Max', numberOverrideProcessor),
  property('fieldMinMax', 'Field min/max', identityOverrideProcessor),
  property('decimals', 'Decimals', numberOverrideProcessor),
  property('displayName', 'Display name', displayNameOverrideProcessor),
  property('color', 'Color', identityOverrideProcessor),
  property('noValue', 'No value', identityOverrideProcessor),
  property('thresholds', 'Thresholds', thresholdsOverrideProcessor, {
    defaultValue: { mode: 'absolute', steps: [{ value: -Infinity, color: 'green' }] },
  }),
  property('mappings', 'Value mappings', valueMappingsOverrideProcessor, { defaultValue: [] }),
  property('links', 'Links', identityOverrideProcessor),
  property('filterable', 'Filterable', identityOverrideProcessor),
]);
// Some transformers are exported twice, under a former name too.
const transformers = new Map(Object.values(standardTransformers).map((one) => [one.id, one]));
standardTransformersRegistry.setInit(() =>
  [...transformers.values()].map((one) => ({
    id: one.id, name: one.name, transformation: async () => one, editor: () => null, imageDark: '', imageLight: '',
  }))
);

const LINE_DEFAULTS = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none',
  lineStyle: { fill: 'solid' }, spanNulls: false, insertNulls: false, showPoints: 'auto', pointSize: 5,
  stacking: { mode: 'none', group: 'A' }, axisPlacement: 'auto', axisLabel: '', axisColorMode: 'text',
  axisBorderShow: false, axisCenteredZero: false, axisSoftMin: undefined, axisSoftMax: undefined, axisWidth: undefined,
  axisGridShow: undefined, scaleDistribution: { type: 'linear' }, thresholdsStyle: { mode: 'off' },
  hideFrom: { tooltip: false, viz: false, legend: false }, barAlignment: 0, barWidthFactor: 0.6,
  fillBelowTo: undefined, transform: undefined, lineColor: undefined,
};
const CELL_DEFAULTS = {
  align: 'auto', cellOptions: { type: 'auto' }, width: undefined, minWidth: undefined, inspect: false,
  filterable: false, hideHeader: undefined, wrapText: undefined, hidden: undefined, hideFrom: undefined,
};
const customOptions = (defaults) => ({
  useCustomConfig: (builder) => {
    for (const [path, defaultValue] of Object.entries(defaults)) {
      builder.addCustomEditor({
        id: path, path, name: path, defaultValue, editor: () => null, override: () => null,
        process: identityOverrideProcessor, shouldApply: (field) => field.type !== 'time',
      });
    }
  },
});

// Wraps a visualization so that an exception in it is a finding and not a white page.
class Caught extends React.Component {
  state = {};
  static getDerivedStateFromError(error) { return { error }; }
  componentDidCatch(error) { problem(error); }
  render() { return this.state.error ? <div className="failed">{String(this.state.error)}</div> : this.props.children; }
}
function register(pluginId, Visualization, custom) {
  const plugin = new PanelPlugin((props) => (
    // As high as Grafana lets it be: a table that has more rows is scrolled.
    <div className="visualization" style={{ height: props.height }} data-type={pluginId} data-panel={props.id} data-title={props.title}
      data-state={props.data.state} data-rows={props.data.series.reduce((rows, frame) => rows + frame.length, 0)}>
      <Caught><Visualization {...props} /></Caught>
    </div>
  ));
  sceneUtils.registerRuntimePanelPlugin({ pluginId, plugin: plugin.useFieldConfig(custom && customOptions(custom)) });
}

const events = new EventBusSrv();
setAppEvents(events);
setPluginImportUtils({
  importPanelPlugin: (id) => Promise.reject(new Error('no panel plugin ' + id)),
  getPanelPluginFromCache: () => undefined,
});
setRunRequest((source, request) =>
  from(Promise.resolve().then(() => source.query(request))).pipe(
    map((answer) => ({ state: LoadingState.Done, series: answer.data, timeRange: request.range, request })),
    catchError((error) => {
      problem(`${error} in ${request.targets.map((target) => target.expr)}`);
      return of({
        state: LoadingState.Error, series: [], error: { message: String(error) }, timeRange: request.range, request,
      });
    })
  )
);
const source = new Prometheus(SCRAPE_SECONDS);
sceneUtils.registerRuntimeDataSource({ dataSource: source });
setDataSourceSrv({
  get: async () => source,
  getInstanceSettings: () => ({ ...source, meta: source.meta, uid: 'prom', type: 'prometheus', name: 'prom' }),
  getList: () => [{ uid: 'prom', type: 'prometheus', name: 'prom', meta: source.meta }],
});
setTemplateSrv({ replace: (s) => s, getVariables: () => [], containsTemplate: () => false, updateTimeRange() {} });

// ---- dashboard JSON to scene ---------------------------------------------------------------
const DATASOURCE = { type: 'prometheus', uid: 'prom' };

function data(panel) {
  if (!panel.targets) return undefined;
  const queries = new SceneQueryRunner({
    datasource: DATASOURCE, queries: panel.targets.map((target) => ({ ...target, datasource: DATASOURCE })),
    maxDataPoints: panel.maxDataPoints ?? 300, minInterval: SCRAPE_SECONDS + 's',
  });
  return panel.transformations
    ? new SceneDataTransformer({ $data: queries, transformations: panel.transformations })
    : queries;
}

const OPEN = parameters.has('open');

// The rows one below the other, as they lie when a reader has opened them all.
function opened(panels) {
  let moved = 0;
  return panels.map((panel) => {
    if (panel.type !== 'row') return panel;
    const shift = (one) => ({ ...one, gridPos: { ...one.gridPos, y: one.gridPos.y + moved } });
    const row = { ...shift(panel), panels: panel.panels.map(shift) };
    moved += Math.max(...panel.panels.map((one) => one.gridPos.y + one.gridPos.h)) - panel.gridPos.y - 1;
    return row;
  });
}

function item(panel) {
  const place = { x: panel.gridPos.x, y: panel.gridPos.y, width: panel.gridPos.w, height: panel.gridPos.h };
  if (panel.type === 'row') {
    return new SceneGridRow({
      title: panel.title, y: place.y, isCollapsed: !OPEN, isCollapsible: true, children: panel.panels.map(item),
    });
  }
  const body = new VizPanel({
    key: 'panel-' + panel.id, pluginId: panel.type, title: panel.title, description: panel.description,
    options: panel.options || {}, fieldConfig: panel.fieldConfig || { defaults: {}, overrides: [] },
    pluginVersion: '13.2.2', $data: data(panel),
  });
  return new SceneGridItem({ ...place, body });
}

function variable(v) {
  return new QueryVariable({
    name: v.name, label: v.label, datasource: DATASOURCE, query: v.query, refresh: v.refresh, isMulti: v.multi,
    includeAll: v.includeAll, allValue: v.allValue, regex: v.regex, hide: v.hide, value: v.current.value, text: v.current.text,
  });
}

function toScene(dashboard) {
  const scene = new EmbeddedScene({
    $timeRange: new SceneTimeRange({
      from: parameters.get('from') || dashboard.time.from, to: parameters.get('to') || dashboard.time.to, timeZone: 'utc',
    }),
    $variables: new SceneVariableSet({
      variables: dashboard.templating.list.filter((v) => v.type === 'query').map(variable),
    }),
    controls: [new VariableValueSelectors({}), new SceneControlsSpacer(), new SceneTimePicker({})],
    body: new SceneGridLayout({ children: (OPEN ? opened(dashboard.panels) : dashboard.panels).map(item) }),
  });
  const asked = new Map();
  const reloads = (range, panel) => {
    const [annotation] = dashboard.annotations.list;
    if (!(annotation.enable || parameters.has('lines'))) return Promise.resolve([]);
    if (!annotation.filter.ids.includes(panel)) return Promise.resolve([]);
    const key = `${range.from.valueOf()}-${range.to.valueOf()}`;
    if (!asked.has(key)) asked.set(key, source.reloads(annotation, scene, range));
    return asked.get(key);
  };
  register('timeseries', visualizations.timeseries(reloads, dashboard.annotations.list[0].iconColor), LINE_DEFAULTS);
  register('stat', visualizations.stat);
  register('state-timeline', visualizations.stateTimeline, { fillOpacity: 70, lineWidth: 0, hideFrom: {} });
  register('barchart', visualizations.barchart, { fillOpacity: 80, lineWidth: 1, axisPlacement: 'auto', hideFrom: {} });
  register('heatmap', visualizations.heatmap);
  register('table', visualizations.table, CELL_DEFAULTS);
  register('text', visualizations.text);
  return scene;
}

function App() {
  const [shown, show] = React.useState(null);
  React.useEffect(() => {
    fetch(`/${parameters.get('board')}.json`).then((answer) => answer.json())
      .then((dashboard) => show({ title: dashboard.title, scene: toScene(dashboard) })).catch(problem);
  }, []);
  if (!shown) return null;
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <BrowserRouter>
        <div style={{ padding: 12, background: theme.colors.background.canvas, minHeight: '100vh' }}>
          <h3 style={{ color: theme.colors.text.primary }}>{shown.title}</h3>
          <shown.scene.Component model={shown.scene} />
        </div>
      </BrowserRouter>
      <PortalContainer />
    </ThemeContext.Provider>
  );
}
createRoot(document.getElementById('root')).render(<App />);
