# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates cost those who wait: seconds without tokens, requests, tokens thrown away.

The scheduler is held from a pause, or from an update's first call, until the first batch after it;
where no request waits, until one could run. What happens meanwhile is the cost of the update that
ends meanwhile; a pause without an update costs nothing here.

A pause of mode ``abort`` does not reach the scheduler, which sees that all requests are aborted and
later that generation goes on. An order to abort all belongs to an update that begins within
:data:`~sglang_weight_exporter.ledger.open_update.IDLE_SECONDS` (a heuristic: rollouts that are cut
off end with the same order).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sglang_weight_exporter.ledger.open_update import IDLE_SECONDS, elapsed
from sglang_weight_exporter.records.costs import Discarded, Fate, LiveRequests, UpdateCost
from sglang_weight_exporter.records.pools import Pause
from sglang_weight_exporter.records.updates import Source

#: What a pause does to running requests, and to queued ones.
_FATES: dict[Pause, tuple[Fate, Fate]] = {
    "in_place": ("kept", "kept"),
    "retract": ("retracted", "kept"),
    "abort": ("aborted", "aborted"),
}


@dataclass
class _Cost:
    """Of the update that is going on, or is to come."""

    seconds: float = 0.0
    fates: dict[str, Fate] = field(default_factory=dict)
    straddling: int = 0
    discarded: dict[Discarded, int] = field(default_factory=dict)

    def record(self) -> UpdateCost:
        requests: dict[Fate, int] = {}
        for fate in self.fates.values():
            requests[fate] = requests.get(fate, 0) + 1
        return UpdateCost(
            paused_seconds=self.seconds,
            requests=requests,
            straddling=self.straddling,
            discarded=dict(self.discarded),
        )


class Costs:
    """Of all updates of one scheduler."""

    def __init__(self, lock: threading.RLock, *, clock: Callable[[], float]) -> None:
        self._lock = lock
        self._clock = clock
        self._totals: dict[Source, UpdateCost] = {}
        self._last: UpdateCost | None = None
        #: Of the last update that ended: its number, roles, and as long as the scheduler is held
        #: its source.
        self._number = 0
        self._roles: set[str] = set()
        self._source: Source | None = None
        self._cost = _Cost()
        #: Since when the scheduler is held.
        self._since: float | None = None
        #: It was paused, and not by aborting all.
        self._paused = False
        #: The last order to abort all that belongs to it.
        self._aborted_at: float | None = None
        #: When it was free again for a request, while nobody knows whether some are held back.
        self._free_at: float | None = None

    @property
    def holding(self) -> bool:
        """Whether the scheduler is held, as far as is known."""
        return self._since is not None

    @property
    def totals(self) -> dict[Source, UpdateCost]:
        """Of updates that have ended; of sources that were used."""
        with self._lock:
            return dict(self._totals)

    @property
    def last(self) -> UpdateCost | None:
        """Of the update that ended last."""
        return self._last

    # The scheduler is held.

    def pause(self, how: Pause, requests: LiveRequests | None) -> None:
        """Generation is interrupted, and these requests were there."""
        with self._lock:
            self._drop_old_order()
            self._hold(self._clock())
            running, queued = _FATES[how]
            if how == "abort":
                self._aborted_at = self._clock()
            else:
                self._paused = True
            if requests is not None:
                self._decide(running, requests.running)
                self._decide(queued, requests.queued)

    def begin_call(self, since: float | None, requests: LiveRequests | None) -> None:
        """An update begins or goes on. ``requests``: ``None`` where they were counted before."""
        with self._lock:
            self._drop_old_order()
            self._hold(self._clock() if since is None else since)
            if requests is not None:
                self._decide("kept", requests.running)
                self._decide("kept", requests.queued)

    def _hold(self, at: float) -> None:
        if self._since is None:
            self._since = at
        self._free_at = None

    def _drop_old_order(self) -> None:
        """Whoever has aborted all a while ago did not mean the update that begins now."""
        aborted_at, free_at = self._aborted_at, self._free_at
        if free_at is not None:
            self._end(free_at)
        elif (
            aborted_at is not None
            and not self._paused
            and self._source is None
            and elapsed(aborted_at, self._clock()) > IDLE_SECONDS
        ):
            self._cost = _Cost()
            self._since = self._aborted_at = None

    def _decide(self, fate: Fate, requests: Mapping[str, int]) -> None:
        for request, generated in requests.items():
            if fate == "aborted" and self._cost.fates.get(request) != "aborted":
                self._discard("generated", generated)
            if fate != "kept" or request not in self._cost.fates:
                self._cost.fates[request] = fate

    # What it costs.

    def flush(self, tokens: int | None) -> None:
        """The prefix cache was flushed, which held so many tokens."""
        with self._lock:
            if self._since is not None and tokens:
                self._discard("cached", tokens)

    def straddle(self, requests: int) -> None:
        """The version has changed under so many requests."""
        with self._lock:
            if self._since is not None and requests:
                self._cost.straddling += requests

    def _discard(self, kind: Discarded, tokens: int) -> None:
        self._cost.discarded[kind] = self._cost.discarded.get(kind, 0) + tokens

    def end_update(self, role: str, number: int, source: Source, at: float) -> UpdateCost | None:
        """An update has ended and is counted: what it has cost until now. ``None`` where no
        scheduler was held for it, and of roles whose updates ended with another's."""
        with self._lock:
            again = role not in self._roles and (number == self._number or self._source is not None)
            if self._since is None and not again and self._cost == _Cost():
                return None
            if self._since is not None:
                self._cost.seconds += elapsed(self._since, at)
                self._since = max(self._since, at)
            self._roles = {role, *self._roles} if again else {role}
            self._number, self._source = number, source
            self._add(again)
            if self._since is None:
                self._source = None
            return None if again else self._last

    def _add(self, to_last: bool) -> None:
        cost, source = self._cost.record(), self._source
        self._cost = _Cost()
        if source is not None:
            self._totals[source] = self._totals.get(source, UpdateCost()) + cost
            self._last = self._last + cost if to_last and self._last is not None else cost

    # It is free again.

    def release(self, *, waiting: bool, in_progress: bool) -> None:
        """A call has ended. ``waiting``: requests are there, which the next batch is for;
        ``in_progress``: the update has further calls."""
        with self._lock:
            if self._since is None or self._paused or waiting:
                return
            if self._aborted_at is not None and not in_progress:
                self._free_at = self._free_at or self._clock()
            else:
                self._end(self._clock(), in_progress=in_progress)

    def continue_generation(self, *, waiting: bool) -> None:
        """Generation goes on."""
        with self._lock:
            self._paused, self._free_at, self._aborted_at = False, None, None
            if self._since is not None and not waiting:
                self._end(self._clock())

    def begin_batch(self, *, in_progress: bool) -> None:
        """The first batch with a request that goes on."""
        with self._lock:
            if self._since is not None:
                at = self._clock() if self._free_at is None else self._free_at
                self._end(at, in_progress=in_progress)

    def _end(self, at: float, *, in_progress: bool = False) -> None:
        if self._since is not None:
            self._cost.seconds += elapsed(self._since, at)
        if self._source is not None:
            self._add(True)
        elif not in_progress:
            self._cost = _Cost()  # No update came.
        self._since = self._source = self._aborted_at = self._free_at = None
        self._paused = False
