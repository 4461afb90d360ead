# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates cost those who wait for tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sglang_weight_exporter.records.base import Count, Record, Seconds

#: What became of a request that was running or queued: it went on with what it had, went back to
#: the queue to be computed again, or was aborted.
Fate = Literal["kept", "retracted", "aborted"]
FATES: tuple[Fate, ...] = get_args(Fate)

#: Tokens that are thrown away: those that aborted requests had generated, and those of the prefix
#: cache, which the next request with the same beginning has to compute again.
Discarded = Literal["generated", "cached"]
DISCARDED: tuple[Discarded, ...] = get_args(Discarded)


class UpdateCost(Record, frozen=True, kw_only=True):
    """The cost of one update, or of all updates of a source."""

    #: In which the scheduler made no tokens: from the pause, or from the first call, to the first
    #: batch after it; where no request waited, until one could have run.
    paused_seconds: Seconds = 0.0
    requests: dict[Fate, Count] = {}
    #: Requests with tokens of the version before, which go on with the new one.
    straddling: Count = 0
    discarded: dict[Discarded, Count] = {}

    def __add__(self, other: UpdateCost) -> UpdateCost:
        return UpdateCost(
            paused_seconds=self.paused_seconds + other.paused_seconds,
            requests={
                fate: self.requests.get(fate, 0) + other.requests.get(fate, 0)
                for fate in FATES
                if fate in self.requests or fate in other.requests
            },
            straddling=self.straddling + other.straddling,
            discarded={
                kind: self.discarded.get(kind, 0) + other.discarded.get(kind, 0)
                for kind in DISCARDED
                if kind in self.discarded or kind in other.discarded
            },
        )


@dataclass(frozen=True)
class LiveRequests:
    """Requests of a scheduler that are not finished: id → tokens that it has generated."""

    running: Mapping[str, int]
    queued: Mapping[str, int]

    def __bool__(self) -> bool:
        return bool(self.running or self.queued)
