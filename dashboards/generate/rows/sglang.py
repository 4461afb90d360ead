# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Joined with SGLang's own metrics."""

from __future__ import annotations

from ..grafana import NO_SGLANG, Json, queries, query, timeseries
from ..queries import ENGINES, neighbours


def panels() -> list[Json]:
    return [
        timeseries(
            "KV tokens in use",
            "SGLang's sglang:token_usage by rank. SGLang reports the first TP rank unless it was "
            "started with --enable-metrics-for-all-schedulers.",
            [
                query(
                    neighbours.rank_of_sglang(neighbours.of_sglang("token_usage")),
                    "{{on}}",
                )
            ],
            "percentunit",
            NO_SGLANG,
            width=8,
            maximum=1,
        ),
        timeseries(
            "KV bytes in use",
            "sglang:token_usage times the pool's measured bytes, against the pool. What stays "
            "unused could have been weights. Joined by host, rank and port, which is the engine's "
            "name here: SGLang has to be scraped at the port in its own settings.",
            queries(neighbours.kv_in_use(ENGINES)),
            "bytes",
            NO_SGLANG,
            width=8,
        ),
        timeseries(
            "Generation throughput",
            "SGLang's sglang:gen_throughput, in tokens a second: what an update (yellow lines) "
            "costs.",
            [
                query(
                    neighbours.rank_of_sglang(neighbours.of_sglang("gen_throughput")),
                    "{{on}}",
                )
            ],
            "short",
            NO_SGLANG,
            width=8,
            explained_by_updates=True,
        ),
    ]
