# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Loads and updates of weights: counts, and each one that has ended or goes on."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from sglang_weight_exporter.records.base import Count, Record, Seconds, TraceId
from sglang_weight_exporter.records.contents import ContentChanges
from sglang_weight_exporter.records.costs import UpdateCost
from sglang_weight_exporter.records.weights import TableChanges

Source = Literal["disk", "distributed", "tensor", "ipc", "p2p", "eplb", "external"]
SOURCES: tuple[Source, ...] = get_args(Source)

#: What an update spends its time on: nothing of its own, because the next call, a peer or a reader
#: is awaited; tensors that arrive; weights that are written, and read where they come from disk;
#: weights that are unpacked before and packed after that, quantized ones first of all; the prefix
#: cache; this package's own capture.
Phase = Literal["wait", "receive", "load", "post_process", "flush", "capture"]
PHASES: tuple[Phase, ...] = get_args(Phase)

#: What an update did to the weights: "undefined" means that some tensors may hold new values,
#: some old ones, and nobody can tell which (SGLang's rollback reads the new checkpoint again).
Effect = Literal["changed", "unchanged", "undefined"]

#: Upper bounds in seconds of ``sglang_weight_update_duration_seconds``: from a tiny model's
#: reload to a checkpoint of a terabyte over a network file system.
DURATION_BUCKETS: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


#: OTLP has 64 bits for their sum.
_BucketCounts = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, le=2**53)], ...],
    msgspec.Meta(min_length=len(DURATION_BUCKETS) + 1, max_length=len(DURATION_BUCKETS) + 1),
]


class Histogram(Record, frozen=True, kw_only=True):
    """Observations of a duration; ``counts`` has one entry a bucket and one for +Inf."""

    counts: _BucketCounts = (0,) * (len(DURATION_BUCKETS) + 1)
    sum: Seconds = 0.0

    def observe(self, seconds: float) -> Histogram:
        """This histogram with one more observation."""
        counts = list(self.counts)
        for index, bound in enumerate((*DURATION_BUCKETS, float("inf"))):
            if seconds <= bound:
                counts[index] += 1
                break
        return Histogram(counts=tuple(counts), sum=self.sum + seconds)


class UpdateCounts(Record, frozen=True, kw_only=True):
    """Totals of one source since the process started."""

    updates: Count = 0
    failures: Count = 0
    calls: Count = 0
    #: Of ``updates``, those after which every tensor held the bytes that it had held before.
    without_change: Count = 0
    duration: Histogram = Histogram()
    #: Seconds of all updates by what they went to, and bytes of the tensors and files that calls
    #: which succeeded were handed: whole tensors, of which a rank of several keeps its part.
    #: ``None`` once a call was handed something whose size is not known.
    phases: dict[Phase, Seconds] = {}
    nbytes: Count | None = 0
    #: The last update that counted: the trace of its span (32 hexadecimal digits), when it ended,
    #: and how long it took.
    trace_id: TraceId = ""
    updated_at: Seconds | None = None
    seconds: Seconds | None = None


def add_phases(one: dict[Phase, float], other: dict[Phase, float]) -> dict[Phase, float]:
    """Seconds by phase, summed."""
    return {
        phase: one.get(phase, 0.0) + other.get(phase, 0.0)
        for phase in PHASES
        if phase in one or phase in other
    }


#: No sum of bytes is larger, because files hold no larger integer: 13 years of an update of 1.3 TB
#: a minute. One that would be is not known.
LARGEST_BYTES = 2**63


def add_bytes(one: int | None, other: int | None) -> int | None:
    """What is not known makes the sum unknown."""
    if one is None or other is None:
        return None
    return one + other if one + other < LARGEST_BYTES else None


class OperationCounts(Record, frozen=True, kw_only=True):
    """Totals of one operation that reads, saves, sends or checks weights."""

    calls: Count = 0
    failures: Count = 0


class Update(Record, frozen=True, kw_only=True):
    """One logical load or update of a role's weights that has ended."""

    #: ``load`` for the first load, ``update`` for everything after it.
    action: Literal["load", "update"]
    source: Source | None = None
    #: Counts loads, updates and requests of the process, failed ones included, from 1; all roles
    #: share it. Ranks of one engine go through the same sequence, so the number names the same
    #: update on every rank.
    sequence: Count
    started_at: Seconds
    ended_at: Seconds
    calls: Count = 1
    succeeded: bool
    effect: Effect
    #: SGLang's message, or the exception; empty where there was none; and what it was about then.
    message: str = ""
    failed_in: Phase | None = None
    model_path: str = ""
    weight_version: str = ""
    trace_id: TraceId = ""
    changes: TableChanges = TableChanges()
    #: What it has changed in the weights' bytes; ``None``: without fingerprints nobody knows.
    contents: ContentChanges | None = None
    #: Seconds by what they went to, which sum to its duration, and the bytes that it brought;
    #: ``None``: nobody can tell.
    phases: dict[Phase, Seconds] = {}
    nbytes: Count | None = None
    #: What it had cost those who wait when it ended; ``None``: no scheduler was held for it.
    cost: UpdateCost | None = None


class UpdateInProgress(Record, frozen=True, kw_only=True):
    """An update or session that has begun and not ended: the table may be a mixture."""

    source: Source | None
    started_at: Seconds
    last_call_at: Seconds
    calls: Count = 0
    #: Whether one of the calls has failed already.
    failed: bool = False
    #: What it is about now, and what it has been about until its last call ended.
    phase: Phase = "wait"
    #: Since when; ``None``: not known.
    phase_since: Seconds | None = None
    phases: dict[Phase, Seconds] = {}
    nbytes: Count | None = 0
    #: SGLang before 0.5.21 has no end of an update made of several calls: such an update counts
    #: as ended once no call came for this many seconds. ``None``: an end will be reported, of the
    #: update or of the call that is running.
    idle_seconds: Seconds | None = None

    def is_over(self, now: float) -> bool:
        """Whether it counts as ended though nobody reported an end.

        The engine has no thread that could wait for one, so whoever reads a snapshot asks here.
        """
        return (
            self.idle_seconds is not None
            and self.calls > 0
            # A clock that was set back makes the last call one of the future.
            and abs(now - self.last_call_at) > self.idle_seconds
        )
