# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter itself: whether it can be trusted, and what it costs."""

from __future__ import annotations

from ..grafana import (
    NOT_LOADED,
    Json,
    override,
    query,
    row,
    timeseries,
)
from ..promql import (
    ENGINE,
    select,
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
