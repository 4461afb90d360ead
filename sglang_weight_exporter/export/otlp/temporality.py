# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What totals count from: their beginning (cumulative), or the last time they were sent (delta)."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_weight_exporter.export.instruments.base import DataPoint, Instrument
from sglang_weight_exporter.export.otlp.settings import Temporality
from sglang_weight_exporter.records.updates import Histogram

Value = float | Histogram
_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Interval:
    """What was counted from then on, in Unix seconds."""

    value: Value
    started_at: float


@dataclass(frozen=True)
class _Sent:
    value: Value
    #: Since when the total counts, which is another time when it began anew; and until when it was
    #: sent.
    began_at: float
    until: float


class Totals:
    """Totals of ranks in the temporality that is asked for.

    Nothing is sent twice: of a total that began before this process, and may have been sent by the
    one before it, the first interval begins with the first message. What a collector did not take
    is in the next interval.
    """

    def __init__(self, temporality: Temporality, *, since: float) -> None:
        #: Kinds of instruments that are sent as deltas. A low memory is asked of what records each
        #: event; counters are read from ranks, as OpenTelemetry's asynchronous ones.
        self._kinds = {
            "cumulative": set[str](),
            "delta": {"counter", "histogram"},
            "lowmemory": {"histogram"},
        }[temporality]
        self._since = since
        self._sent: dict[_Key, _Sent] = {}
        self._pending: dict[_Key, _Sent] = {}
        self._seen: set[_Key] = set()

    def are_deltas(self, instrument: Instrument) -> bool:
        return instrument.kind in self._kinds

    def interval(self, instrument: Instrument, point: DataPoint, now: float) -> Interval | None:
        """What to send of a point; ``None``: nothing this time."""
        value, began_at = point.sample.value, point.started_at
        if not self.are_deltas(instrument):
            return Interval(value, began_at)
        key = (instrument.name, point.labels)
        self._seen.add(key)
        self._pending[key] = _Sent(value, began_at, now)
        last = self._sent.get(key)
        if last is None:
            return Interval(value, began_at) if began_at >= self._since else None
        increase = _increase(last.value, value)
        if last.began_at != began_at or increase is None:
            return Interval(value, began_at)
        return Interval(increase, last.until)

    def settle(self, *, settled: bool) -> None:
        """What became of the message that the last intervals are in."""
        if settled:
            self._sent |= self._pending
        self._pending.clear()

    def forget_others(self) -> None:
        """All was sent: what was not in it is gone."""
        self._sent = {key: sent for key, sent in self._sent.items() if key in self._seen}
        self._seen.clear()


def _increase(before: Value, now: Value) -> Value | None:
    """``None`` where it began anew."""
    if isinstance(now, Histogram):
        if not isinstance(before, Histogram):
            return None
        counts = tuple(new - old for old, new in zip(before.counts, now.counts, strict=True))
        if min(counts) < 0:
            return None
        return Histogram(counts=counts, sum=max(0.0, now.sum - before.sum))
    if isinstance(before, Histogram) or now < before:
        return None
    return now - before
