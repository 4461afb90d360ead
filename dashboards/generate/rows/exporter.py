# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter itself: whether it can be trusted, and what it costs."""

from __future__ import annotations

from ..colours import BLUE, CRIMSON, GOLD, GREEN, GREY, RED, SPREAD, VIOLET, YELLOW
from ..grafana import NOT_LOADED, Json, by_name, override, queries, query, table, timeseries
from ..queries import ENGINES, TOP, Selection, exporter, spread


def of_a_fleet(selection: Selection) -> list[Json]:
    """Which answer, and what they are."""
    return [
        table(
            "Exporters that do not answer",
            "Targets on which an exporter has answered within the last hour, and does not now.",
            [query(exporter.silent(selection), instant=True, format="table")],
            [
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": dict.fromkeys(
                            ("Time", "Value", "cluster", "namespace", "host"), True
                        ),
                        "indexByName": {"where": 0, "instance": 1, "job": 2},
                        "renameByName": {"where": "Where", "instance": "Target", "job": "Job"},
                    },
                }
            ],
            "All exporters of the last hour answer",
            width=7,
            height=8,
            filterable=False,
        ),
        table(
            "Versions",
            "How many exporters of each version answer.",
            [query(exporter.versions(selection), instant=True, format="table")],
            [
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": {"Time": True},
                        "indexByName": {"version": 0, "Value": 1},
                        "renameByName": {"version": "Version", "Value": "Exporters"},
                    },
                }
            ],
            NOT_LOADED,
            override("Exporters", unit="none", custom__width=90),
            width=5,
            height=8,
            filterable=False,
        ),
        by_name(
            "Slowest scrapes",
            f"Seconds that the last scrape took in the {TOP} slowest exporters. Prometheus gives "
            "up after 10 by default.",
            exporter.slowest_scrapes(selection),
            "Took",
            "s",
            NOT_LOADED,
            width=6,
        ),
        timeseries(
            "Troubles of exporters",
            "In the time range until each point: exceptions of hooks that were caught in engines, "
            "files of ranks that it could not read, and "
            "spans that it dropped. All 0 is health.",
            queries(exporter.troubles(selection)),
            "short",
            NOT_LOADED,
            width=6,
            decimals=0,
            colours={
                "errors in hooks": RED,
                "files unread": BLUE,
                "spans dropped": VIOLET,
            },
        ),
    ]


def panels() -> list[Json]:
    return [
        timeseries(
            "Ranks published",
            "Ranks that are alive and have written a snapshot, of all targets.",
            [query(exporter.ranks(ENGINES), "ranks")],
            "short",
            NOT_LOADED,
            width=6,
            decimals=0,
        ),
        timeseries(
            "Hooks",
            "Ranks times hooks, by state. absent: this SGLang has no such function. failed: it "
            "should have it, and changes on that path are not seen (see `status`).",
            [query(exporter.hooks(ENGINES), "{{state}}")],
            "short",
            NOT_LOADED,
            width=6,
            decimals=0,
            colours={"failed": CRIMSON, "installed": GREEN, "absent": GREY, "pending": YELLOW},
        ),
        timeseries(
            "Cost in the engine",
            "Seconds that engines last spent on reading their weights and pools: the slowest, and "
            "the one in the middle. It is spent at a load or update and at no other time.",
            [query(spread(exporter.cost(ENGINES), worst="max"), "{{part}}")],
            "s",
            NOT_LOADED,
            width=6,
            colours=SPREAD,
        ),
        timeseries(
            "Spans",
            "Loads and updates whose span the collector has acknowledged, has yet to acknowledge, "
            "or will never get. All stay 0 without an OTLP endpoint.",
            queries(exporter.spans(ENGINES)),
            "short",
            NOT_LOADED,
            width=6,
            decimals=0,
            colours={"exported": BLUE, "waiting": GOLD, "dropped": RED},
        ),
    ]
