# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Joined with SGLang's own metrics."""

from __future__ import annotations

from ..colours import BLUE, GOLD, SPREAD
from ..grafana import NO_SGLANG, Json, queries, query, timeseries
from ..queries import ENGINES, neighbours, spread


def panels() -> list[Json]:
    usage = neighbours.of_sglang("token_usage")
    return [
        timeseries(
            "KV tokens in use",
            "SGLang's sglang:token_usage, of the rank with the most and of the one in the middle. "
            "SGLang reports the first TP rank unless it was started with "
            "--enable-metrics-for-all-schedulers.",
            [query(spread(usage, worst="max"), "{{part}}")],
            "percentunit",
            NO_SGLANG,
            maximum=1,
            colours=SPREAD,
        ),
        timeseries(
            "KV bytes in use",
            "sglang:token_usage times the pool's measured bytes, against the pool, summed over "
            "ranks. What stays unused could have been weights. Joined by host, rank and port, "
            "which is the engine's name here: SGLang has to be scraped at the port in its own "
            "settings.",
            queries(neighbours.kv_in_use(ENGINES)),
            "bytes",
            NO_SGLANG,
            colours={"used": BLUE, "pool": GOLD},
        ),
    ]
