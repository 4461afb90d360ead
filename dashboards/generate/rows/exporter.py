# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter itself: whether it can be trusted, and what it costs."""

from __future__ import annotations

from ..grafana import NOT_LOADED, Json, override, queries, query, timeseries
from ..queries import ENGINES, exporter


def panels() -> list[Json]:
    return [
        timeseries(
            "Ranks published",
            "Ranks that are alive and have written a snapshot, by target.",
            [query(exporter.ranks(ENGINES), "{{instance}}")],
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
            override("failed", color={"mode": "fixed", "fixedColor": "red"}),
            override("installed", color={"mode": "fixed", "fixedColor": "green"}),
            override("absent", color={"mode": "fixed", "fixedColor": "#8e929b"}),
            override("pending", color={"mode": "fixed", "fixedColor": "yellow"}),
            width=6,
            decimals=0,
        ),
        timeseries(
            "Cost in the engine",
            "Seconds the engine last spent on reading its weights and pools, the slowest rank. It "
            "is spent at a load or update and at no other time.",
            [query(exporter.cost(ENGINES), "{{where}}")],
            "s",
            NOT_LOADED,
            width=6,
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
        ),
    ]
