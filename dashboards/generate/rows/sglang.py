# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Joined with SGLang's own metrics."""

from __future__ import annotations

from ..grafana import (
    NO_SGLANG,
    Json,
    query,
    row,
    timeseries,
)
from ..promql import (
    KV_BYTES_BY_SGLANG_RANK,
    SGLANG_LEGEND,
    SGLANG_RANK,
    host,
    ranked,
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
