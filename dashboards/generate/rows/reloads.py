# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What changed, when, how, and whether it worked."""

from __future__ import annotations

from ..grafana import (
    NOT_LOADED,
    Json,
    heatmap,
    query,
    row,
    timeseries,
)
from ..promql import (
    ENGINE,
    happened,
    reloads_by_source,
    select,
)


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
