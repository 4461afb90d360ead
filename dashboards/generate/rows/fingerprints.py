# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the weights really changed, and are the right ones."""

from __future__ import annotations

from ..colours import BLUE, GOLD, GREY, RED, SOURCES, SPREAD
from ..grafana import Json, query, timeseries
from ..queries import ENGINES, fingerprints, spread

OFF = "No fingerprints: SGLANG_WEIGHT_EXPORTER_FINGERPRINT is off, or nothing is loaded yet"


def panels() -> list[Json]:
    return [
        timeseries(
            "Different weights among replicas",
            "How many different sets of weights the replicas of a shard hold, of the shard with "
            "the most: ranks of one model at the same place in it, cut into as many parts. 1 is "
            "agreement; 2 for the time that an update takes from the first replica to the last.",
            [query(fingerprints.different(ENGINES), "sets")],
            "short",
            OFF,
            width=8,
            decimals=0,
            calcs=("lastNotNull", "max"),
            explained_by_updates=True,
        ),
        timeseries(
            "Updates that changed nothing",
            "Updates that reported success and left every byte as it was, once an engine, by "
            "source. A reload of the checkpoint that is served already is one.",
            [query(fingerprints.without_change(ENGINES), "{{source}}")],
            "short",
            "No such update in this time range",
            colours=SOURCES,
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Tensors changed without an update",
            "Tensors found with other bytes than the last load or update left, by each capture "
            "that found them: changed while serving, or not brought back after a release. "
            "Always zero.",
            [query(fingerprints.modified(ENGINES), "{{during}}")],
            "short",
            OFF,
            colours={"serving": RED, "release": GOLD},
            width=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Time of a fingerprint",
            "How long the last fingerprint took, on the engine with the slowest rank and on the "
            "one in the middle. An update waits for two of them.",
            [query(spread(fingerprints.seconds(ENGINES), worst="max"), "{{part}}")],
            "s",
            OFF,
            colours=SPREAD,
        ),
        timeseries(
            "Fingerprints not taken",
            "By reason, summed over ranks: memory is released, it would have taken too long, a "
            "tensor cannot be read, or it failed.",
            [query(fingerprints.skipped(ENGINES), "{{reason}}")],
            "short",
            OFF,
            colours={"released": GREY, "time_limit": GOLD, "unsupported": BLUE, "error": RED},
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
    ]
