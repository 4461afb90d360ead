# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates cost those who wait, beside the tokens that SGLang makes."""

from __future__ import annotations

from ..colours import BLUE, CRIMSON, GOLD, RED, SOURCES, YELLOW
from ..grafana import NO_SGLANG, NOT_LOADED, Json, query, timeseries
from ..queries import ENGINES, neighbours, updates

FATES = {"kept": BLUE, "retracted": GOLD, "aborted": RED}
NO_UPDATE = "No update in this time range"


def panels() -> list[Json]:
    return [
        timeseries(
            "Tokens a second",
            "Of all selected engines, by SGLang's own metrics: the growth of "
            "sglang:realtime_tokens_total, or sglang:gen_throughput where there is none. To be "
            "read with the graph beside it.",
            [query(neighbours.tokens_a_second(), "tokens a second")],
            "short",
            NO_SGLANG,
            explained_by_updates=True,
        ),
        timeseries(
            "Paused and updating",
            "The share of the engines whose generation is paused (pause_generation), and of those "
            "in which an update or a session is open. One that is short may lie between two "
            "scrapes.",
            [query(updates.held(ENGINES), "{{part}}")],
            "percentunit",
            NOT_LOADED,
            maximum=1,
            colours={"paused": CRIMSON, "updating": YELLOW},
            explained_by_updates=True,
        ),
        timeseries(
            "Seconds without a token",
            "In which updates kept the schedulers from making tokens, by source, summed over "
            "engines: from the pause, or from the first call, to the first batch after it.",
            [query(updates.paused(ENGINES), "{{source}}")],
            "s",
            NO_UPDATE,
            colours=SOURCES,
            bars=True,
            calcs=("sum",),
        ),
        timeseries(
            "What became of requests",
            "Requests that were running or queued when updates began: they went on with what they "
            "had (kept), went back to the queue to be computed again (retracted), or were aborted.",
            [query(updates.requests(ENGINES), "{{fate}}")],
            "short",
            "No request waited for an update in this time range",
            colours=FATES,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
    ]
