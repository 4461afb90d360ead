# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates that have ended for SGLang while a device still has to do with them: it receives the
bytes, or reads them for fingerprints. Nobody waits for it but a thread of its own; until then
readers see an update in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from sglang_weight_exporter.capture.arrival import Arrival
from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.ledger import FinishedUpdate, Ledger
from sglang_weight_exporter.rank_records import WEIGHTS
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.reading import Reading
from sglang_weight_exporter.runners.roles import Roles, RunnerRole


class Arrivals:
    """Of one rank. ``step``: completes what is over; ``compare``: what was there when an update
    began with what the last one had left."""

    def __init__(
        self,
        *,
        roles: Roles,
        ledger: Ledger,
        inspector: ModelRunnerInspector,
        report: Callable[[str, BaseException], None],
        lock: threading.RLock,
        step: Callable[[], None],
        compare: Callable[[Reading], None],
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
        self._reading: Reading | None = None
        #: Of what was there when the update in progress began.
        self._before: Reading | None = None
        self._waiting: list[FinishedUpdate] = []

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

    def arrived_at(self) -> float | None:
        """When the device had what was received last, the first time that this is known."""
        if self._arrival is None:
            return None
        at = None
        with self._reported("arrival"):
            at = self._arrival.at()
        if at is not None:
            self._arrival = None
            self._ledger.updates.receive_until(at)
        return at

    def over(
        self, finished: list[FinishedUpdate], arrived_at: float | None
    ) -> list[FinishedUpdate]:
        """What has ended on the device too."""
        waiting, self._waiting = self._waiting, []
        if not (finished or waiting):
            return finished
        if self._arrival is None:
            self._compare_before()
        received = any(each.received for each in finished)
        awaited: Arrival | Reading | None = self._arrival
        if awaited is None and received and not waiting:
            awaited = self._begin_reading()
        elif awaited is None and self._reading is not None and not self._reading.is_over:
            awaited = self._reading
        if awaited is None or not (waiting or received):
            late = [dataclasses.replace(each, arrived_at=arrived_at) for each in waiting]
            return late + finished
        if not waiting:
            threading.Thread(
                target=self._step_when_over,
                args=(awaited,),
                name="sglang-weight-exporter-arrival",
                daemon=True,
            ).start()
        now = self._clock()
        self._waiting = waiting + [dataclasses.replace(each, went_on_at=now) for each in finished]
        return []

    def before(self, role: str, known: WeightCapture | None) -> WeightCapture | None:
        """What was known of a role before the update, where its weights were captured since."""
        return known if self._reading is None else self._reading.before.get(role, known)

    def end(self) -> None:
        """What was over is complete."""
        self._reading = None

    def give_up(self) -> None:
        """The device may never answer again."""
        self._arrival = self._reading = self._before = None

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
                self._compare(before)

    def finish_reading(self, *, before: bool = True) -> None:
        """Weights are about to be written, or their memory to go. What a device reads is over
        first, and the update that it is of; ``before``: also what it reads of the time before
        one."""
        if self._reading is self._before is None:
            return
        with self._lock, self._reported("capture"):
            if before:
                self._compare_before()
            if self._reading is not None:
                self._reading.wait()
                self._step()

    def _begin_reading(self) -> Reading | None:
        """Of what an update has just left; ``None``: there is nothing to wait for."""
        with self._reported("capture"):
            if WEIGHTS not in self._ledger.counters.released:
                in_progress = self._ledger.updates.is_in_progress
                roles = [role for role in self._roles if not in_progress(role.name)]
                self._reading = self._inspector.begin_reading(*roles)
        return self._reading if self._reading and self._reading.events else None

    def _step_when_over(self, awaited: Arrival | Reading) -> None:
        with self._reported("arrival"):
            awaited.wait()
            self._step()
