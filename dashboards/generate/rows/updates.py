# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What changed, when, how, and whether it worked."""

from __future__ import annotations

from ..colours import BLUE, CYAN, GOLD, GREY, OLIVE, RED, SOURCES, SPREAD, VIOLET
from ..grafana import NOT_LOADED, Json, by_name, heatmap, queries, query, timeseries
from ..queries import ENGINES, TOP, updates

#: What an update spends its time on.
PHASES = {
    "wait": GREY,
    "receive": BLUE,
    "load": GOLD,
    "post_process": CYAN,
    "flush": OLIVE,
    "capture": VIOLET,
}
CHANGES = {"moved": GOLD, "added": BLUE, "removed": RED, "resized": CYAN, "device": VIOLET}


def panels() -> list[Json]:
    return [
        timeseries(
            "Updates by source",
            "Logical updates that changed weights, once an engine: disk, distributed, tensor, ipc, "
            "p2p, eplb or external.",
            [query(updates.by_source(ENGINES, "sglang_weight_updates_total"), "{{source}}")],
            "short",
            "No update in this time range",
            colours=SOURCES,
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Failed updates by source",
            "Updates that failed, once an engine, whether or not they changed weights.",
            [
                query(
                    updates.by_source(ENGINES, "sglang_weight_update_failures_total"), "{{source}}"
                )
            ],
            "short",
            "No failed update in this time range",
            colours=SOURCES,
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        heatmap(
            "Update duration",
            "How long each logical update took on each rank, first call to last. An exemplar opens "
            "its trace.",
            query(updates.durations(ENGINES), "{{le}}", format="heatmap", exemplar=True),
            "s",
            "No update in this time range",
            width=8,
        ),
        timeseries(
            "What an update changed",
            "Tensors whose address moved, and tensors added, removed, resized or gone from their "
            "device, summed over ranks. All zero is what an in-place update should do.",
            queries(updates.changes(ENGINES)),
            "short",
            NOT_LOADED,
            colours=CHANGES,
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Update groups",
            "Process groups open for distributed updates, summed over engines and ranks.",
            [query(updates.groups(ENGINES), "open")],
            "short",
            NOT_LOADED,
            width=8,
            decimals=0,
            calcs=("max",),
        ),
        timeseries(
            "Age of the weights",
            "Time since weights last changed, the first load included, of the engine that was "
            "updated longest ago and of the one in the middle. In RL training this is how far "
            "behind an engine may be. Which one it is: Fleet, the last lines of its table.",
            [query(updates.ages(ENGINES), "{{part}}")],
            "s",
            NOT_LOADED,
            colours=SPREAD,
            width=8,
        ),
        timeseries(
            "Where the time of updates went",
            "Seconds of each engine's slowest rank: waiting for a call, a peer or a reader; "
            "receiving; loading; unpacking, packing; flushing the cache; this exporter's own "
            "capture.",
            [query(updates.phases(ENGINES), "{{phase}}")],
            "s",
            "No update in this time range",
            colours=PHASES,
            width=8,
            bars=True,
            calcs=("sum",),
        ),
        by_name(
            "Slowest ranks",
            f"The {TOP} ranks on which the updates of the time range took longest, by their "
            "seconds together.",
            updates.slowest_ranks(ENGINES),
            "Took",
            "s",
            "No update in this time range",
            width=8,
        ),
        timeseries(
            "Bytes a second",
            "What updates brought, by the time in which it came and was written, by source. Of "
            "sources whose bytes are known.",
            [query(updates.bytes_a_second(ENGINES), "{{source}}")],
            "Bps",
            "No update in this time range",
            colours=SOURCES,
            width=8,
            calcs=("max",),
        ),
    ]
