# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates that have ended for SGLang while a device still has to do with them: it receives the
bytes, or reads them for fingerprints. Nobody waits for it but a thread of its own; until then
readers see an update in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_weight_exporter.capture.arrival import Arrival
from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.ledger import FinishedUpdate, Ledger
from sglang_weight_exporter.rank_records import WEIGHTS
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.reading import Reading
from sglang_weight_exporter.runners.roles import Roles, RunnerRole

#: How often the host asks whether the device is ready. A sleep lets other threads run.
_POLL_SECONDS = 5e-5


@dataclass(frozen=True)
class _Waiting:
    """An update that has ended for SGLang. ``arrival``: of its bytes, where that was not known."""

    finished: FinishedUpdate
    arrival: Arrival | None


class Arrivals:
    """Of one rank. ``step``: completes what is over; ``compare``: what was there when an update
    began with what the last one had left, and says what was there, by role."""

    def __init__(
        self,
        *,
        roles: Roles,
        ledger: Ledger,
        inspector: ModelRunnerInspector,
        report: Callable[[str, BaseException], None],
        lock: threading.RLock,
        step: Callable[[], None],
        compare: Callable[[Reading], dict[str, WeightCapture]],
        clock: Callable[[], float],
    ) -> None:
        self._roles = roles
        self._ledger = ledger
        self._inspector = inspector
        self._report = report
        self._lock = lock
        self._step = step
        self._compare = compare
        self._clock = clock
        #: Of the last call that received weights, as long as its device is not known to have them.
        self._arrival: Arrival | None = None
        #: Of what an update has left.
        self.reading: Reading | None = None
        #: Of what was there when the update in progress began, and what that was, once it is known.
        self._before: Reading | None = None
        self._was: dict[str, WeightCapture] = {}
        self._waiting: list[_Waiting] = []
        #: Until devices have done what they were asked for when SGLang went on: what another
        #: thread asks of them is not behind that.
        self._asked: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None

    @property
    def awaited(self) -> bool:
        """Whether an update has ended that is not over."""
        return bool(self._waiting)

    @contextlib.contextmanager
    def _reported(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._report(where, error)

    @contextlib.contextmanager
    def receiving(self, source: Source) -> Iterator[None]:
        """Around a call that receives weights: over a process group the device does so on its own
        time."""
        arrival = None
        if source == "distributed":
            with self._reported("arrival"):
                arrival = self._inspector.begin_arrival()
        yield
        if arrival is not None:
            with self._lock, self._reported("arrival"):
                arrival.end()
                self._arrival = arrival

    def note_arrival(self) -> None:
        """Whether the device has by now what was received last, and since when."""
        if self._arrival is None:
            return
        at = None
        with self._reported("arrival"):
            at = self._arrival.at()
        if at is not None:
            self._arrival = None
            self._ledger.updates.receive_until(at)

    def over(self, finished: list[FinishedUpdate]) -> list[FinishedUpdate]:
        """What has ended on the device too, of this and of what has ended before."""
        if not (finished or self._waiting):
            return finished
        if any(each.update is not None and each.update.source == "p2p" for each in finished):
            self._forget_before()  # It writes in no stream, so maybe while that was read.
        received = any(each.received and each.wrote for each in finished)
        awaited: Arrival | Reading | None = self._arrival
        if awaited is None:
            self._compare_before()
            if received and not self._waiting:
                self._begin_reading()
            if self.reading is not None and not self.reading.is_over:
                awaited = self.reading
        if awaited is not None and (received or self._waiting):
            if finished:
                self._wait_for(finished)
            return []
        self._compare_before()
        over = [*map(self._arrived, self._waiting), *finished]
        self._waiting = []
        return over

    def _arrived(self, waiting: _Waiting) -> FinishedUpdate:
        """It is known now when a device had all of it."""
        at = None
        with self._reported("arrival"):
            at = None if waiting.arrival is None else waiting.arrival.at()
        return dataclasses.replace(waiting.finished, arrived_at=at)

    def _wait_for(self, finished: list[FinishedUpdate]) -> None:
        """SGLang goes on."""
        now = self._clock()
        self._waiting += [
            _Waiting(dataclasses.replace(each, went_on_at=now), self._arrival) for each in finished
        ]
        asked = self._inspector.asked_so_far()
        if asked is not None:
            self._asked.append(asked.synchronize)
        if not self._ledger.updates.in_progress:
            self._inspector.end_update()
        if self._thread is None:
            with self._reported("arrival"):  # Without it, whoever steps next completes what waits.
                thread = threading.Thread(
                    target=self._follow, name="sglang-weight-exporter-arrival", daemon=True
                )
                thread.start()
                self._thread = thread

    def _awaited(self) -> tuple[Callable[[], None], ...]:
        """What to wait for before what waits can be over."""
        if not self._waiting:
            return ()
        ours = (self._arrival, self.reading)
        return (*(each.wait for each in ours if each is not None), *self._asked)

    def _follow(self) -> None:
        """Completes what waits as soon as devices have done with it."""
        over: tuple[Callable[[], None], ...] = ()
        while True:
            awaited: tuple[Callable[[], None], ...] = ()
            with self._lock:
                with self._reported("arrival"):
                    if over and over == self._awaited():
                        self._step()
                    awaited = self._awaited()
                if not awaited or awaited == over:  # Whoever steps next may get further.
                    self._thread = None
                    return
            over = awaited
            with self._reported("arrival"):
                for wait in awaited:
                    wait()

    def before(self, role: str, known: WeightCapture | None) -> WeightCapture | None:
        """What was known of a role before the update, where its weights were captured since. One
        that is completed after it is compared with what it has left."""
        was = self._was.pop(role, None)
        if self.reading is not None:
            known = self.reading.before.pop(role, known)
        return known if was is None else was

    def end(self) -> None:
        """What was over is complete."""
        self.reading = None
        self._was, self._asked = {}, []

    def give_up(self) -> None:
        """The device may never answer again."""
        self._arrival = self.reading = self._before = None
        self._waiting = [dataclasses.replace(each, arrival=None) for each in self._waiting]
        self._asked = []

    # Weights that are read before and after an update.

    def begin_reading_before(self, *roles: RunnerRole) -> bool:
        """An update is about to begin that writes in this thread's stream and nowhere else, so what
        is there before it may be read meanwhile; whether it is."""
        self._before = self._inspector.begin_reading(*roles, written=False)
        return self._before is not None

    def _compare_before(self) -> None:
        """Has no time to lose where the update is over: the device has read before it wrote."""
        before, self._before = self._before, None
        if before is not None:
            with self._reported("capture"):
                before.wait()
                self._was = self._compare(before)

    def _forget_before(self) -> None:
        if self._before is not None:
            self._before.wait()  # Its memory may go next.
            self._before = None

    def let_reading_end(self, seconds: float) -> None:
        """torch may give memory back. What a device reads is over first, if it is in time."""
        until = time.monotonic() + seconds
        for each in (self._before, self.reading):
            while each is not None and not each.is_over and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)

    def finish_reading(self, *, before: bool = True) -> None:
        """Weights are about to be written, or their memory to go. What a device reads is over
        first, and the update that it is of; ``before``: also what it reads of the time before
        one. Both begin in the thread that asks here."""
        if self.reading is self._before is None:
            return
        with self._lock, self._reported("capture"):
            if before:
                self._compare_before()
            if self.reading is not None:
                self.reading.wait()
                self._step()

    def _begin_reading(self) -> None:
        """Of what an update has just left."""
        with self._reported("capture"):
            if WEIGHTS not in self._ledger.counters.released:
                in_progress = self._ledger.updates.is_in_progress
                roles = [role for role in self._roles if not in_progress(role.name)]
                self.reading = self._inspector.begin_reading(*roles)
