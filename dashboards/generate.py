# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the Grafana dashboard and the Kubernetes form of the rules.

    python dashboards/generate.py           write the files
    python dashboards/generate.py --check   exit 1, naming the stale files, if they would change

The dashboard is plain data in Grafana's own JSON model (schema 38, Grafana 10.0), so that what is
here is what Grafana's documentation describes; the tests check it against Grafana's types and draw
it with Grafana's panels. Every query reads raw series: the recording rules are not needed for it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}

# What every per-rank series is narrowed by. "All" is `.*`, which also matches the empty gpu_uuid
# of a CPU engine.
SELECTED = (
    'instance=~"$instance", model_name=~"$model", engine=~"$engine", role=~"$role", '
    'gpu_uuid=~"$gpu"'
)
RANK = (
    "instance, model_name, engine, role, tp_rank, pp_rank, dp_rank, moe_ep_rank, device, gpu_uuid"
)
ENGINE = "instance, model_name, engine"

COLOURS = {
    "Target weights": "blue",
    "Draft weights": "light-blue",
    "LoRA": "purple",
    "KV pool": "orange",
    "Everything else in use": "#8e929b",
    "Free": "rgba(140, 146, 160, 0.22)",
}

NOT_LOADED = "No rank is scraped: is SGLang running, and is :9400 a target?"
NO_NVML = "No NVML: CPU engine, or the exporter cannot see the driver"
NO_SGLANG = "SGLang's own metrics are not here: start it with --enable-metrics and scrape it"
NO_DCGM = "dcgm-exporter is not here: see the text on the right"


# --- PromQL -------------------------------------------------------------------------------------


def select(metric: str, extra: str = "") -> str:
    return f"{metric}{{{SELECTED}{', ' + extra if extra else ''}}}"


def by_name(name_regex: str) -> str:
    """All series whose names match, in one selector: a missing one (no LoRA) is not a gap."""
    return f'{{__name__=~"{name_regex}", {SELECTED}}}'


TARGET = 'role="target"'
OURS = "sglang_weight_resident_bytes|sglang_lora_pool_bytes|sglang_kv_pool_resident_bytes"


def per_gpu(expression: str) -> str:
    return f"sum by (instance, gpu_uuid) ({expression})"


def nvml(metric: str) -> str:
    """An NVML series of the GPUs that hold a selected rank; `max` forgives a GPU scraped twice."""
    return (
        f"(max by (instance, gpu_uuid) ({metric})"
        f" and on (instance, gpu_uuid) {select('sglang_weight_resident_bytes')})"
    )


def labelled(per_gpu_expression: str) -> str:
    """One label, `where`, that people recognise: the target and NVML's index of the GPU; without
    NVML, and for a MIG instance, the head of the UUID; without a GPU the word CPU."""
    index = (
        "label_replace(label_replace(max by (instance, gpu_uuid, gpu)"
        " (sglang_gpu_memory_total_bytes) > bool 0,"
        ' "place", "GPU $1", "gpu", "(.*)"), "place", "$1", "gpu_uuid", "(MIG-.{8}).*")'
    )
    without_index = (
        f'label_replace(label_replace({per_gpu_expression}, "place", "$1",'
        ' "gpu_uuid", "(.{12}).*"), "place", "CPU", "gpu_uuid", "")'
    )
    return (
        f"sum by (where) (label_join({per_gpu_expression}"
        f" * on (instance, gpu_uuid) group_left (place) {index}"
        f" or on (instance, gpu_uuid) {without_index},"
        ' "where", " ", "instance", "place"))'
    )


def happened(counter: str, extra: str = "") -> str:
    """Growth of a counter from one point of the graph to the next: whole numbers, each event in
    exactly one point. increase() would extrapolate, and count an event in several points or none.
    """
    now = select(counter, extra)
    return f"clamp_min({now} - {now} offset $__interval, 0)"


def reloads_by_source(counter: str) -> str:
    """Counted once an engine: every rank of it counts the same reload. A source without any in
    the whole range is left out."""
    any_in_range = f"sum by (source) (increase({select(counter, TARGET)}[$__range] @ end())) > 0"
    return (
        f"sum by (source) (max by ({ENGINE}, source) ({happened(counter, TARGET)}))"
        f" and on (source) {any_in_range}"
    )


def reloads_in_range(counter: str) -> str:
    per_engine = f"max by ({ENGINE}, source) (increase({select(counter, TARGET)}[$__range]))"
    return f"sum(round({per_engine}))"


RELOADED_AT = (
    f"max by ({ENGINE}) ({select('sglang_weight_last_update_timestamp_seconds')}"
    f" > {select('sglang_weight_loaded_timestamp_seconds')})"
)

GPU_SPLIT = {
    # An encoder's are part of the target, and a weight-cache daemon's are all of it.
    "Target weights": per_gpu(select("sglang_weight_resident_bytes", 'role!~"draft.*"')),
    "Draft weights": per_gpu(select("sglang_weight_resident_bytes", 'role=~"draft.*"')),
    "LoRA": per_gpu(select("sglang_lora_pool_bytes")),
    "KV pool": per_gpu(select("sglang_kv_pool_resident_bytes")),
    "Everything else in use": (
        f"clamp_min({nvml('sglang_gpu_memory_used_bytes')}"
        f" - on (instance, gpu_uuid) {per_gpu(by_name(OURS))}, 0)"
    ),
    "Free": (
        f"({nvml('sglang_gpu_memory_total_bytes')}"
        f" - on (instance, gpu_uuid) {nvml('sglang_gpu_memory_used_bytes')})"
    ),
}

# SGLang's own series come from another port of the same host (or pod), so `instance` cannot match;
# the host part and SGLang's own rank labels do.
# (moe_ep_rank follows from tp_rank, and older releases of SGLang do not have it as a label.)
SGLANG_RANK = "host, model_name, tp_rank, pp_rank, dp_rank"


def host(expression: str) -> str:
    return f'label_replace({expression}, "host", "$1", "instance", "(.*?)(:[0-9]+)?")'


TARGET_KV = host(select("sglang_kv_pool_resident_bytes", TARGET))
KV_BYTES_BY_SGLANG_RANK = (
    f"(sum by ({SGLANG_RANK}) ({TARGET_KV})"
    # Two engines of one model on one host cannot be told apart by SGLang's labels: no answer.
    f" unless on ({SGLANG_RANK}) count by ({SGLANG_RANK}) ({TARGET_KV}) > 1)"
)
SGLANG_LEGEND = "{{host}} {{rank}}"


def ranked(expression: str) -> str:
    """One label for legends, as a label that a series lacks would show as its own name."""
    return f'label_join({expression}, "rank", "/", "tp_rank", "pp_rank", "dp_rank")'


# FB_* of dcgm-exporter is in MiB. Series of a GPU may come several times (one a pod): `max`.
# MIG instances share the parent's UUID and are left out.
FRAMEBUFFER_USED = 'max by (UUID) (DCGM_FI_DEV_FB_USED{GPU_I_ID="", UUID=~"$gpu"} * 1048576)'


def by_uuid(expression: str) -> str:
    return f'sum by (UUID) (label_replace({expression}, "UUID", "$1", "gpu_uuid", "(.+)"))'


# --- panels -------------------------------------------------------------------------------------


def query(expression: str, legend: str = "", *, ref: str = "A", **more: Any) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": legend or "__auto",
        **({} if more.get("instant") else {"range": True}),
        **more,
    }


def queries(series: dict[str, str], **more: Any) -> list[Json]:
    return [query(e, name, ref=chr(65 + i), **more) for i, (name, e) in enumerate(series.items())]


def override(field: str, **properties: Any) -> Json:
    """Properties of one field, dots in names written as two underscores."""
    return {
        "matcher": {"id": "byName", "options": field},
        "properties": [{"id": k.replace("__", "."), "value": v} for k, v in properties.items()],
    }


def coloured(name: str, **more: Any) -> Json:
    return override(name, color={"mode": "fixed", "fixedColor": COLOURS[name]}, **more)


def panel(kind: str, title: str, description: str, width: int, height: int, **more: Any) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        **more,
    }


def thresholds(*steps: tuple[float | None, str]) -> Json:
    return {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in steps]}


def stat(
    title: str,
    description: str,
    expression: str,
    unit: str,
    no_value: str,
    *steps: tuple[float | None, str],
    width: int = 3,
    sparkline: bool = False,
) -> Json:
    return panel(
        "stat",
        title,
        description,
        width,
        4,
        targets=[query(expression, title, instant=not sparkline)],
        fieldConfig={
            "defaults": {
                "unit": unit,
                "noValue": no_value,
                "color": {"mode": "thresholds"},
                "thresholds": thresholds(*(steps or ((None, "text"),))),
            },
            "overrides": [],
        },
        options={
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area" if sparkline else "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "value",
        },
    )


def timeseries(
    title: str,
    description: str,
    targets: list[Json],
    unit: str,
    no_value: str,
    *overrides: Json,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    bars: bool = False,
    maximum: float | None = None,
    decimals: int | None = None,
    calcs: tuple[str, ...] = ("lastNotNull",),
) -> Json:
    return panel(
        "timeseries",
        title,
        description,
        width,
        height,
        targets=targets,
        fieldConfig={
            "defaults": {
                "unit": unit,
                "min": 0,
                **({} if maximum is None else {"max": maximum}),
                **({} if decimals is None else {"decimals": decimals}),
                "noValue": no_value,
                "color": {"mode": "palette-classic"},
                "custom": {
                    "drawStyle": "bars" if bars else "line",
                    "lineInterpolation": "linear" if bars else "stepAfter",
                    "lineWidth": 1 if bars or stacked else 2,
                    "fillOpacity": 80 if bars else 45 if stacked else 0,
                    "showPoints": "never",
                    "spanNulls": False,
                    # An axis of counts that are all 0 would go to 100.
                    **({"axisSoftMax": 1} if decimals == 0 else {}),
                    "stacking": {"mode": "normal" if stacked or bars else "none", "group": "A"},
                },
            },
            "overrides": list(overrides),
        },
        options={
            "legend": {
                "showLegend": True,
                "displayMode": "table" if calcs else "list",
                "placement": "right" if width >= 12 else "bottom",
                "calcs": list(calcs),
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    )


def stacked_bars(
    title: str,
    description: str,
    targets: list[Json],
    transformations: list[Json],
    x_field: str,
    no_value: str,
    *overrides: Json,
    share: bool,
    width: int,
    height: int,
) -> Json:
    return panel(
        "barchart",
        title,
        description,
        width,
        height,
        targets=targets,
        transformations=transformations,
        fieldConfig={
            "defaults": {
                "unit": "bytes",
                "noValue": no_value,
                "color": {"mode": "palette-classic"},
                "custom": {"fillOpacity": 90, "lineWidth": 0, "axisPlacement": "auto"},
            },
            "overrides": list(overrides),
        },
        options={
            "xField": x_field,
            "orientation": "horizontal",
            "stacking": "percent" if share else "normal",
            "showValue": "never",
            "groupWidth": 0.7,
            "barWidth": 0.85,
            "barRadius": 0,
            "fullHighlight": False,
            "xTickLabelRotation": 0,
            "xTickLabelSpacing": 0,
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": "bottom",
                "calcs": [],
            },
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    )


def table(
    title: str,
    description: str,
    targets: list[Json],
    transformations: list[Json],
    no_value: str,
    *overrides: Json,
    width: int = 24,
    height: int = 9,
) -> Json:
    return panel(
        "table",
        title,
        description,
        width,
        height,
        targets=targets,
        transformations=transformations,
        fieldConfig={
            "defaults": {
                "noValue": no_value,
                "custom": {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True},
            },
            "overrides": list(overrides),
        },
        options={"showHeader": True, "cellHeight": "sm"},
    )


def text(title: str, content: str, width: int, height: int) -> Json:
    return panel("text", title, "", width, height, options={"mode": "markdown", "content": content})


def row(title: str, *panels: Json) -> list[Json]:
    """A heading and its panels, laid out left to right in lines of 24 columns."""
    return [panel("row", title, "", 24, 1, collapsed=False, panels=[]), *panels]


# --- the dashboard ------------------------------------------------------------------------------


def gpu_bars(title: str, description: str, *, share: bool, width: int) -> Json:
    split = queries(
        {name: labelled(e) for name, e in GPU_SPLIT.items()}, instant=True, format="table"
    )
    values = {f"Value #{target['refId']}": target["legendFormat"] for target in split}
    return stacked_bars(
        title,
        description,
        split,
        [
            {"id": "joinByField", "options": {"byField": "where", "mode": "outer"}},
            {
                "id": "filterFieldsByName",
                "options": {"include": {"names": ["where", *values]}},
            },
        ],
        "where",
        NOT_LOADED,
        *(coloured_value(field, name) for field, name in values.items()),
        share=share,
        width=width,
        height=9,
    )


def coloured_value(field: str, name: str) -> Json:
    return override(field, displayName=name, color={"mode": "fixed", "fixedColor": COLOURS[name]})


def where_the_memory_went() -> list[Json]:
    weights = select("sglang_weight_resident_bytes")
    kv = select("sglang_kv_pool_resident_bytes")
    on_gpus = select("sglang_weight_resident_bytes", 'gpu_uuid!=""')
    targets = select("sglang_weight_loaded_timestamp_seconds", TARGET)
    total = f"sum({nvml('sglang_gpu_memory_total_bytes')})"
    return [
        stat(
            "Weights",
            "Bytes of weights that physical memory backs now, all selected ranks: target, draft "
            "and buffers. Each storage counts once. Falls to 0 while SGLang has released them.",
            f"sum({weights})",
            "bytes",
            NOT_LOADED,
            (None, "blue"),
            sparkline=True,
        ),
        stat(
            "KV pool",
            "Bytes of KV pools that physical memory backs now, all selected ranks and pools.",
            f"sum({kv})",
            "bytes",
            "No KV pool allocated yet",
            (None, "orange"),
            sparkline=True,
        ),
        stat(
            "Weight share",
            "Resident weights as a share of the total memory of the GPUs that hold them (NVML).",
            f"sum({on_gpus}) / {total}",
            "percentunit",
            NO_NVML,
            (None, "green"),
            (0.6, "orange"),
            (0.85, "red"),
        ),
        stat(
            "Last reload, age",
            "Time since weights last changed after they were first loaded, the latest engine "
            "counts. The first load is not a reload. Dashed lines in the graphs mark each one.",
            f"time() - max({RELOADED_AT})",
            "s",
            "Not reloaded since they were loaded",
        ),
        stat(
            "Reloads",
            "Logical updates that changed weights in the time range, once an engine and not once "
            "a rank.",
            reloads_in_range("sglang_weight_updates_total"),
            "short",
            NOT_LOADED,
        ),
        stat(
            "Failed reloads",
            "Updates that failed in the time range, once an engine. A failed update may have left "
            "weights half written: see the alert's runbook.",
            reloads_in_range("sglang_weight_update_failures_total"),
            "short",
            NOT_LOADED,
            (None, "green"),
            (1, "red"),
        ),
        stat(
            "Tensors moved",
            "Tensors whose address changed in an update in the time range. CUDA graphs keep the "
            "old addresses, so an in-place reload should move none.",
            f"sum(round(increase({select('sglang_weight_tensors_moved_total')}[$__range])))",
            "short",
            NOT_LOADED,
            (None, "green"),
            (1, "orange"),
        ),
        stat(
            "Ranks",
            "Ranks of the target model that are alive.",
            f"count({targets})",
            "short",
            NOT_LOADED,
        ),
        gpu_bars(
            "Where did my GPU memory go",
            "Each GPU's memory now: weights by role, LoRA slots, KV pool, what else is in use "
            "(activations, CUDA graphs, contexts, other processes) and what is free. Weights and "
            "KV are measured from their storages, the rest is NVML's, where free includes what the "
            "driver keeps for itself. A CPU engine has no NVML part.",
            share=False,
            width=14,
        ),
        gpu_bars(
            "… as share",
            "The same as a share of each GPU.",
            share=True,
            width=10,
        ),
        timeseries(
            "Weights against KV pool",
            "Resident bytes of all selected ranks over time, stacked. The dashed line is the total "
            "memory of their GPUs (NVML).",
            queries(
                {
                    **{
                        name: f"sum({GPU_SPLIT[name]})"
                        for name in GPU_SPLIT
                        if name not in ("Free",)
                    },
                    "GPU memory": total,
                }
            ),
            "bytes",
            NOT_LOADED,
            *(coloured(name) for name in GPU_SPLIT if name != "Free"),
            override(
                "GPU memory",
                color={"mode": "fixed", "fixedColor": "text"},
                custom__stacking={"mode": "none", "group": "B"},
                custom__fillOpacity=0,
                custom__lineStyle={"fill": "dash", "dash": [8, 6]},
            ),
            stacked=True,
        ),
        timeseries(
            "Reserved against resident",
            "Reserved is what the tensors span, resident what physical memory backs. They part "
            "while SGLang has released memory (release_memory_occupation): the addresses stay, "
            "the memory goes.",
            queries(
                {
                    "Weights reserved": f"sum({select('sglang_weight_bytes')})",
                    "Weights resident": f"sum({weights})",
                    "KV pool reserved": f"sum({select('sglang_kv_pool_bytes')})",
                    "KV pool resident": f"sum({kv})",
                }
            ),
            "bytes",
            NOT_LOADED,
            *(
                override(
                    f"{what} {state}",
                    color={"mode": "fixed", "fixedColor": colour},
                    **(
                        {"custom__lineStyle": {"fill": "dash", "dash": [8, 6]}}
                        if state == "reserved"
                        else {"custom__fillOpacity": 15}
                    ),
                )
                for what, colour in (("Weights", "blue"), ("KV pool", "orange"))
                for state in ("reserved", "resident")
            ),
        ),
    ]


def reloads() -> list[Json]:
    moved = happened("sglang_weight_tensors_moved_total")
    changed = happened("sglang_weight_table_changes_total")
    durations = happened("sglang_weight_update_duration_seconds_bucket")
    return row(
        "Reloads",
        timeseries(
            "Reloads by source",
            "Logical updates that changed weights, once an engine: disk, distributed, tensor, ipc, "
            "p2p, eplb or external.",
            [query(reloads_by_source("sglang_weight_updates_total"), "{{source}}")],
            "short",
            "No reload in this time range",
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Failed reloads by source",
            "Updates that failed, once an engine, whether or not they changed weights.",
            [query(reloads_by_source("sglang_weight_update_failures_total"), "{{source}}")],
            "short",
            "No failed reload in this time range",
            {
                "matcher": {"id": "byType", "options": "number"},
                "properties": [
                    {"id": "color", "value": {"mode": "continuous-reds", "seriesBy": "max"}}
                ],
            },
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        heatmap(
            "Reload duration",
            "How long each logical update took on each rank, first call to last.",
            query(
                f"sum by (le) ({durations})",
                "{{le}}",
                format="heatmap",
            ),
            "s",
            "No reload in this time range",
            width=8,
        ),
        timeseries(
            "What a reload changed",
            "Tensors whose address moved, and tensors added, removed, resized or gone from their "
            "device, summed over ranks. All zero is what an in-place reload should do.",
            [
                query(f"sum({moved})", "moved"),
                query(f"sum by (change) ({changed})", "{{change}}", ref="B"),
            ],
            "short",
            NOT_LOADED,
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Reload in progress",
            "Ranks inside an update or an update session, by engine; and process groups open for "
            "distributed updates.",
            [
                query(
                    f"sum by ({ENGINE}) ({select('sglang_weight_update_in_progress')})",
                    "{{instance}} {{engine}}",
                ),
                query(
                    f"sum by ({ENGINE}) ({select('sglang_weight_update_groups')})",
                    "{{instance}} {{engine}} groups",
                    ref="B",
                ),
            ],
            "short",
            NOT_LOADED,
            width=8,
            decimals=0,
            calcs=("max",),
        ),
        timeseries(
            "Age of the weights",
            "Time since weights last changed, the first load included, by engine. In RL training "
            "this is how far behind an engine may be.",
            [
                query(
                    f"time() - min by ({ENGINE})"
                    f" ({select('sglang_weight_last_update_timestamp_seconds')})",
                    "{{instance}} {{engine}}",
                )
            ],
            "s",
            NOT_LOADED,
            width=8,
        ),
    )


def heatmap(
    title: str, description: str, target: Json, unit: str, no_value: str, *, width: int
) -> Json:
    return panel(
        "heatmap",
        title,
        description,
        width,
        8,
        targets=[target],
        fieldConfig={"defaults": {"noValue": no_value, "custom": {}}, "overrides": []},
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme",
                "scheme": "Oranges",
                "fill": "orange",
                "exponent": 0.5,
                "steps": 64,
                "reverse": False,
            },
            "filterValues": {"le": 1e-9},
            "rowsFrame": {"layout": "auto"},
            "yAxis": {"unit": unit, "axisPlacement": "left", "reverse": False},
            "legend": {"show": True},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "tooltip": {"mode": "single", "yHistogram": False},
            "showValue": "never",
        },
    )


def ranks() -> list[Json]:
    def rank_sum(metric: str) -> str:
        return f"sum by ({RANK}) ({select(metric)})"

    columns = {
        "Facts": (
            f"label_join({select('sglang_weight_info')},"
            ' "rank", "/", "tp_rank", "pp_rank", "dp_rank", "moe_ep_rank")'
        ),
        "Weights": rank_sum("sglang_weight_bytes"),
        "Tensors": rank_sum("sglang_weight_tensors"),
        "Regions": rank_sum("sglang_weight_regions"),
        "KV pool": rank_sum("sglang_kv_pool_bytes"),
        "KV tokens": f"max by ({RANK}) ({select('sglang_kv_pool_tokens')})",
        "KV bytes a token": (
            f"sum by ({RANK}) ({select('sglang_kv_pool_bytes')}"
            f" / {select('sglang_kv_pool_tokens')})"
        ),
        "Weight version": f"max by ({RANK}) ({select('sglang_weight_version')})",
        "Last change": (
            f"max by ({RANK}) ({select('sglang_weight_last_update_timestamp_seconds')}) * 1000"
        ),
        "Resident": rank_sum("sglang_weight_resident_bytes"),
        "Load time": f"max by ({RANK}) ({select('sglang_weight_load_duration_seconds')})",
    }
    targets = queries(columns, instant=True, format="table")
    letters = {target["legendFormat"]: f"Value #{target['refId']}" for target in targets}
    units = {
        "Weights": "bytes",
        "Resident": "bytes",
        "KV pool": "bytes",
        "KV bytes a token": "bytes",
        "Last change": "dateTimeAsIso",
        "Load time": "s",
        "Tensors": "none",
        "Regions": "none",
        "KV tokens": "none",
        "Weight version": "none",
    }
    widths = {
        "Target": 130,
        "Engine": 85,
        "Role": 75,
        "TP/PP/DP/EP": 120,
        "Device": 85,
        "GPU": 125,
        "Model path": 190,
        "Weights": 100,
        "Tensors": 95,
        "Regions": 95,
        "KV pool": 100,
        "KV tokens": 110,
        "KV bytes a token": 155,
        "Weight version": 140,
        "Last change": 165,
        "Resident": 105,
        "Load time": 110,
    }
    order = [
        "instance",
        "engine",
        "role",
        "rank",
        "device",
        "gpu_uuid",
        "model_path",
        *(letters[name] for name in list(columns)[1:]),
        "quantization",
        "architecture",
        "gpu_name",
        "sglang_version",
        "torch_version",
    ]
    hidden = ["Time", "__name__", "job", "model_name", "tp_rank", "pp_rank", "dp_rank"]
    hidden += ["moe_ep_rank", "pci_bus_id", letters["Facts"]]
    renamed = {
        "instance": "Target",
        "engine": "Engine",
        "role": "Role",
        "rank": "TP/PP/DP/EP",
        "device": "Device",
        "gpu_uuid": "GPU",
        "model_path": "Model path",
        "quantization": "Quantization",
        "architecture": "Architecture",
        "gpu_name": "GPU model",
        "sglang_version": "SGLang",
        "torch_version": "torch",
    }
    bar = ranked(select("sglang_weight_bytes"))
    dtypes = query(
        "sum by (where, dtype)"
        f' (label_join({bar}, "where", " ", "instance", "engine", "role", "rank"))',
        instant=True,
        format="table",
    )
    return row(
        "Ranks",
        table(
            "What each rank holds",
            "One line a rank, role and device: what is loaded, from where, how much memory it "
            "spans, and what its KV pool holds. Model path is the path at launch.",
            targets,
            [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": dict.fromkeys(hidden, True),
                        "indexByName": {name: i for i, name in enumerate(order)},
                        "renameByName": {
                            **renamed,
                            **{letters[name]: name for name in list(columns)[1:]},
                        },
                    },
                },
            ],
            NOT_LOADED,
            # The words for an empty panel are not meant for an empty cell.
            {
                "matcher": {"id": "byRegexp", "options": "/.*/"},
                "properties": [{"id": "noValue", "value": "-"}],
            },
            *(override(name, unit=unit) for name, unit in units.items()),
            *(override(name, custom__width=width) for name, width in widths.items()),
        ),
        stacked_bars(
            "Dtype mix",
            "Bytes of weights by dtype, one bar a rank (target, engine, role, TP/PP/DP).",
            [dtypes],
            [
                {
                    "id": "groupingToMatrix",
                    "options": {"columnField": "dtype", "rowField": "where", "valueField": "Value"},
                },
            ],
            "where\\dtype",
            NOT_LOADED,
            share=False,
            width=9,
            height=8,
        ),
        timeseries(
            "KV capacity in tokens",
            "Tokens that each engine's KV pools can hold. Tensor and pipeline ranks hold parts of "
            "the same tokens and count once, data-parallel ranks add up.",
            [
                query(
                    f"sum by ({ENGINE}, pool) (max by ({ENGINE}, pool, dp_rank)"
                    f" ({select('sglang_kv_pool_tokens', TARGET)}))",
                    "{{instance}} {{engine}} {{pool}}",
                )
            ],
            "short",
            "No KV pool allocated yet",
            width=8,
        ),
        timeseries(
            "Who else touched weights",
            "Calls that read, save, send or check weights, or load adapters or open update groups, "
            "summed over ranks; failed ones apart.",
            [
                query(
                    f"sum by (operation) ({happened('sglang_weight_operations_total')})",
                    "{{operation}}",
                ),
                query(
                    f"sum by (operation) ({happened('sglang_weight_operation_failures_total')})",
                    "failed: {{operation}}",
                    ref="B",
                ),
            ],
            "short",
            NOT_LOADED,
            width=7,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
    )


def joined_with_sglang() -> list[Json]:
    def usage(metric: str) -> str:
        # SGLang's `sglang:` arrives as `sglang_` where Prometheus and the client library behind
        # SGLang agree on OpenMetrics, which knows no colons.
        selected = host(f'{{__name__=~"sglang[:_]{metric}", model_name=~"$model"}}')
        return f"max by ({SGLANG_RANK}) ({selected})"

    tokens, pool = usage("token_usage"), KV_BYTES_BY_SGLANG_RANK
    return row(
        "With SGLang's own metrics",
        timeseries(
            "KV tokens in use",
            "SGLang's sglang:token_usage by rank (TP/PP/DP). SGLang reports the first TP rank "
            "unless it was started with --enable-metrics-for-all-schedulers.",
            [query(ranked(usage("token_usage")), SGLANG_LEGEND)],
            "percentunit",
            NO_SGLANG,
            width=8,
            maximum=1,
        ),
        timeseries(
            "KV bytes in use",
            "sglang:token_usage times the pool's measured bytes, joined by host and rank, against "
            "the pool. What stays unused could have been weights. Two engines of one model on one "
            "host cannot be told apart by SGLang's labels and are left out.",
            [
                query(ranked(f"{tokens} * on ({SGLANG_RANK}) {pool}"), "used " + SGLANG_LEGEND),
                query(
                    ranked(f"{pool} and on ({SGLANG_RANK}) {tokens}"),
                    "pool " + SGLANG_LEGEND,
                    ref="B",
                ),
            ],
            "bytes",
            NO_SGLANG,
            width=8,
        ),
        timeseries(
            "Generation throughput",
            "SGLang's sglang:gen_throughput: what a reload (dashed lines) costs in tokens.",
            [query(ranked(usage("gen_throughput")), SGLANG_LEGEND)],
            "short",
            NO_SGLANG,
            width=8,
        ),
    )


def joined_with_dcgm() -> list[Json]:
    weights = by_uuid(select("sglang_weight_resident_bytes"))
    everything = by_uuid(by_name(OURS))
    return row(
        "With dcgm-exporter",
        timeseries(
            "Weights' share of used framebuffer",
            "Resident weights over DCGM_FI_DEV_FB_USED, joined by the GPU's UUID.",
            [query(f"{weights} / on (UUID) {FRAMEBUFFER_USED}", "{{UUID}}")],
            "percentunit",
            NO_DCGM,
            width=9,
            maximum=1,
        ),
        timeseries(
            "Framebuffer that is neither weights nor KV",
            "DCGM_FI_DEV_FB_USED minus weights, LoRA slots and KV pool: activations, CUDA graphs, "
            "contexts, other processes. Growth here while the rest stands still is a leak.",
            [query(f"{FRAMEBUFFER_USED} - on (UUID) {everything}", "{{UUID}}")],
            "bytes",
            NO_DCGM,
            width=9,
        ),
        text(
            "When these panels are empty",
            "These two need [dcgm-exporter](https://github.com/NVIDIA/dcgm-exporter) scraped by "
            "the same Prometheus; everything else on this dashboard does not.\n\n"
            "* dcgm-exporter listens on **:9400**, as this exporter does. On one host set "
            "`SGLANG_WEIGHT_EXPORTER_PORT`, or start dcgm-exporter with `--address :9401`.\n"
            "* The join is `gpu_uuid` = dcgm's `UUID`. MIG instances share their parent's `UUID` "
            "and are left out.\n"
            "* Keep `DCGM_FI_DEV_FB_USED` in its counters file (it is by default).",
            6,
            8,
        ),
    )


def exporter() -> list[Json]:
    here = '{instance=~"$instance"}'
    return row(
        "This exporter",
        timeseries(
            "Ranks published",
            "Ranks that are alive and have written a snapshot, by target.",
            [query(f"sglang_weight_exporter_ranks{here}", "{{instance}}")],
            "short",
            NOT_LOADED,
            width=4,
            decimals=0,
        ),
        timeseries(
            "Hooks",
            "Ranks times hooks, by state. absent: this SGLang has no such function. failed: it "
            "should have it, and changes on that path are not seen (see `status`).",
            [query(f"sum by (state) (sglang_weight_exporter_hooks{here})", "{{state}}")],
            "short",
            NOT_LOADED,
            override("failed", color={"mode": "fixed", "fixedColor": "red"}),
            override("installed", color={"mode": "fixed", "fixedColor": "green"}),
            override("absent", color={"mode": "fixed", "fixedColor": "#8e929b"}),
            override("pending", color={"mode": "fixed", "fixedColor": "yellow"}),
            width=5,
            decimals=0,
        ),
        timeseries(
            "Cost in the engine",
            "Seconds the engine last spent on reading its weights and pools, the slowest rank. It "
            "is spent at a load or update and at no other time.",
            [
                query(
                    f"max by ({ENGINE}) ({select('sglang_weight_exporter_snapshot_seconds')})",
                    "{{instance}} {{engine}}",
                )
            ],
            "s",
            NOT_LOADED,
            width=5,
        ),
        timeseries(
            "Errors",
            "Exceptions of this exporter's own hooks that were caught inside engines, and files of "
            "ranks that could not be read.",
            [
                query(f"sum({select('sglang_weight_exporter_hook_errors_total')})", "in hooks"),
                query(f"sum(sglang_weight_exporter_read_errors_total{here})", "reading", ref="B"),
            ],
            "short",
            NOT_LOADED,
            width=5,
            decimals=0,
        ),
        timeseries(
            "Spans",
            "Loads and updates whose span the collector has acknowledged, has yet to acknowledge, "
            "or will never get. All stay 0 without an OTLP endpoint.",
            [
                query(f"sum(sglang_weight_exporter_spans_exported_total{here})", "exported"),
                query(f"sum(sglang_weight_exporter_spans_waiting{here})", "waiting", ref="B"),
                query(
                    f"sum by (reason) (sglang_weight_exporter_spans_dropped_total{here})",
                    "dropped: {{reason}}",
                    ref="C",
                ),
            ],
            "short",
            NOT_LOADED,
            width=5,
            decimals=0,
        ),
    )


def annotation() -> Json:
    """One line a reload of an engine, at the exact time and not at the next scrape.

    `useValueForTime` reads the series' value as milliseconds. Grafana 10 reads `expr` and `step`,
    later releases `target`.
    """
    expression = f"{RELOADED_AT} * 1000"
    return {
        "name": "Reloads",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "yellow",
        "expr": expression,
        "step": "5s",
        "target": {"refId": "Anno", "expr": expression, "interval": "5s"},
        "useValueForTime": "on",
        "titleFormat": "Weights reloaded",
        "textFormat": "{{model_name}} {{engine}} on {{instance}}",
        "tagKeys": "engine",
    }


def variable(name: str, label: str, label_name: str, narrowed_by: str, description: str) -> Json:
    definition = f"label_values(sglang_weight_info{narrowed_by}, {label_name})"
    return {
        "name": name,
        "label": label,
        "description": description,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": definition, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
        "regex": "",
        "skipUrlSync": False,
    }


def variables() -> list[Json]:
    model = 'model_name=~"$model"'
    target = f'{model}, instance=~"$instance"'
    engine = f'{target}, engine=~"$engine"'
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "multi": False,
            "includeAll": False,
            "current": {},
            "hide": 0,
            "options": [],
            "regex": "",
            "skipUrlSync": False,
        },
        variable("model", "Model", "model_name", "", "SGLang's served model name"),
        variable("instance", "Target", "instance", f"{{{model}}}", "Scraped host or pod"),
        variable("engine", "Engine", "engine", f"{{{target}}}", "One engine on its host"),
        variable("role", "Role", "role", f"{{{engine}}}", "Target or draft model"),
        variable("gpu", "GPU", "gpu_uuid", f"{{{engine}}}", "UUID as dcgm-exporter has it"),
    ]


def laid_out(panels: list[Json]) -> list[Json]:
    """Gives each panel its id and its place: left to right, a new line when 24 columns are full."""
    x = y = tallest = 0
    for number, one in enumerate(panels, start=1):
        place = one["gridPos"]
        if x + place["w"] > 24:
            x, y, tallest = 0, y + tallest, 0
        place["x"], place["y"] = x, y
        x, tallest = x + place["w"], max(tallest, place["h"])
        one["id"] = number
    return panels


def dashboard() -> Json:
    return {
        "uid": "sglang-weights",
        "title": "SGLang weights and KV pool",
        "description": "Where the GPU memory of SGLang engines went, and when their weights "
        "changed. From sglang-weight-exporter.",
        "tags": ["sglang", "gpu", "llm"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "liveNow": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "weekStart": "",
        "links": [],
        "annotations": {"list": [annotation()]},
        "templating": {"list": variables()},
        "panels": laid_out(
            [
                *where_the_memory_went(),
                *reloads(),
                *ranks(),
                *joined_with_sglang(),
                *joined_with_dcgm(),
                *exporter(),
            ]
        ),
    }


# --- files --------------------------------------------------------------------------------------


def prometheus_rule(rules: str) -> str:
    """The same rules as the Prometheus operator's object."""
    groups = yaml.safe_load(rules)["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "sglang-weights",
            "labels": {"app.kubernetes.io/name": "sglang-weight-exporter"},
        },
        "spec": {"groups": groups},
    }
    return "# Generated from ../sglang-weights.rules.yml by ../generate.py.\n" + yaml.safe_dump(
        manifest, sort_keys=False, width=100
    )


def files() -> dict[Path, str]:
    rules = (HERE / "sglang-weights.rules.yml").read_text()
    return {
        HERE / "sglang-weights.json": json.dumps(dashboard(), indent=2) + "\n",
        HERE / "kubernetes" / "prometheusrule.yaml": prometheus_rule(rules),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when stale")
    check = parser.parse_args().check
    stale = False
    for path, content in files().items():
        old = path.read_text() if path.exists() else ""
        if old == content:
            continue
        stale = True
        if check:
            name = str(path.relative_to(HERE))
            diff = difflib.unified_diff(
                old.splitlines(True), content.splitlines(True), name, name + " (generated)", n=1
            )
            sys.stderr.writelines(list(diff)[:40])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(f"wrote {path.relative_to(HERE)}")
    if check and stale:
        print("Stale: run `python dashboards/generate.py` and commit the result.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
