# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One rank: the order of its steps.

It is handed a ledger that counts, an inspector that captures, records that say both, and a
publisher that writes, and does none of the four itself. A step is always the same: the ledger is
notified; the roles whose updates have finished are captured; all of it is published. Steps of
several threads follow one another; none of them is held up while SGLang's own code runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar

from sglang_weight_exporter.black_box import BlackBoxRecorder
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.ledger import FinishedUpdate, Ledger
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.rank_arrivals import Arrivals
from sglang_weight_exporter.rank_records import CUDA_GRAPH, KV_CACHE, WEIGHTS, RankRecords, trace_id
from sglang_weight_exporter.records.engine import HookState
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.fingerprints import During
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.records.weights import TableChanges
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.memory import Memory
from sglang_weight_exporter.runners.reading import Reading
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.weight_table import WeightTable, compare_tables

Result = TypeVar("Result")
Storages = frozenset[int]

#: What fingerprints may take of a load, kernels compiled, and of an update. A GPU's take some 10
#: milliseconds; a CPU reads about a gigabyte a second.
LOAD_FINGERPRINT_SECONDS = 30.0
UPDATE_FINGERPRINT_SECONDS = 2.0

#: How long a scheduler that ends waits for a capture that another thread has begun.
CRASH_SECONDS = 1.0


class Rank:
    """The account of one process, published after every step.

    ``report``: takes an exception of ours, and where it was caught. What has happened is counted
    whatever goes wrong with the rest of a step; a snapshot that cannot be made takes the one before
    it away, because an old number is worse than none.
    """

    def __init__(
        self,
        *,
        roles: Roles,
        ledger: Ledger,
        inspector: ModelRunnerInspector,
        records: RankRecords,
        publisher: Publisher,
        black_box: BlackBoxRecorder,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.roles = roles
        self.ledger = ledger
        self.inspector = inspector
        self._records = records
        self._publisher = publisher
        self._black_box = black_box
        self.report = report
        self._clock = clock
        self._lock = threading.RLock()
        self.arrivals = Arrivals(
            roles=roles,
            ledger=ledger,
            inspector=inspector,
            report=report,
            lock=self._lock,
            step=lambda: self.step(lambda ledger: None, then=""),
            compare=self._compare_before,
            clock=clock,
        )

    @contextlib.contextmanager
    def _reported(self, where: str) -> Iterator[None]:
        """An exception in the block is reported and goes no further."""
        try:
            yield
        except Exception as error:
            self.report(where, error)

    def role(self, owner: Any) -> RunnerRole | None:
        """The role of a runner or of a component of one; ``None`` if it belongs to none."""
        with self._lock:
            role = self.roles.find(owner)
            if role is None:
                role = self.roles.add(owner)
                if role is not None:
                    self.ledger.add_role(role.name)
                    self._black_box.watch()
            return role

    # Steps.

    def step(
        self,
        notify: Callable[[Ledger], Result],
        *,
        then: Literal["publish", "note", ""] = "publish",
    ) -> Result:
        """Notify the ledger, capture what has ended, and publish.

        ``then``: where nothing has ended, ``note`` what goes on beside the snapshot that readers
        have, which is a hundredth of the work; or do nothing.
        """
        with self._lock:
            self.arrivals.note_arrival()
            result = notify(self.ledger)
            finished = self.arrivals.over(self.ledger.take_finished())
            if self.arrivals.awaited:
                return result
            written = {each.role for each in finished if each.wrote}
            events = {}
            for index, each in enumerate(finished):
                with self._reported("event"):
                    event = self._complete(each, written)
                    if event is not None:
                        events[index] = event
            if finished:
                self.arrivals.end()
            if finished or then == "publish" or (then == "note" and not self._note()):
                self._publish(events)
            elif then == "note":
                if not self.ledger.updates.in_progress:
                    self._publisher.leave_memory(self.inspector.dump_memory)
                self._unlock_tables()
            return result

    def _note(self) -> bool:
        with self._reported("progress"):
            return self._publisher.note(self._records.progress())
        return False

    def _complete(
        self, finished: FinishedUpdate, written: set[str]
    ) -> tuple[Event, WeightTable | None] | None:
        """Capture what an update has changed; the event of it. ``written``: roles whose updates
        have ended together; each is captured once, for its own."""
        role = self.roles.named(finished.role)
        if role is None:
            return None
        before = self.arrivals.before(role.name, self.inspector.of(role).weights)
        changes, contents = TableChanges(), None
        if finished.wrote:
            with self._reported("capture"):
                self._capture_after_update(role, written)
                if finished.went_on_at is None:
                    self.inspector.memory.end_update()
                changes = compare_tables(_table(before), _table(self.inspector.of(role).weights))
                if not self.ledger.updates.is_in_progress(role.name):
                    contents = self.inspector.changed_contents(role, before)
        update = self.ledger.complete(
            finished, model_path=role.model_path, changes=changes, contents=contents
        )
        return None if update is None else self._records.event(role, update)

    def _capture_after_update(self, role: RunnerRole, written: set[str]) -> None:
        others = (
            other
            for other in self.roles
            if other.name not in written and not self.ledger.updates.is_in_progress(other.name)
        )
        # Another may have begun while this one arrived, and writes what would be read.
        begun = self.ledger.updates.is_in_progress(role.name)
        seconds = None if begun else self._fingerprint_seconds()
        reading = self.arrivals.reading
        self._capture(role, *others, fingerprint_seconds=seconds, reading=reading)

    def _publish(self, events: dict[int, tuple[Event, WeightTable | None]]) -> None:
        if not self.roles.engine.instance:
            return  # It is not known yet whose account this is.
        try:
            snapshot, tables = self._records.snapshot(), self._records.tables()
        except Exception as error:
            self.report("snapshot", error)
            self._publisher.withdraw(events)
        else:
            self._publisher.publish(snapshot, tables, events)
        self._publisher.leave_memory(self.inspector.dump_memory)
        self._unlock_tables()

    def _unlock_tables(self) -> None:
        """Between the calls of an update without a session too; not while one is running."""
        if not (self.ledger.updates.in_session or self.ledger.updates.running):
            self._publisher.unlock_tables(update_is_over=not self.ledger.updates.in_progress)

    # Before an update.

    def capture_before_update(self, source: Source | None) -> float | None:
        """An update is about to begin; after it nobody could tell that something else wrote, nor
        what it has added to torch's memory. Of all roles, and before the first of them is written:
        a draft holds tensors of the target's. When the capture began; ``None`` where there was
        none. ``source``: ``None`` for a session, of which nobody knows yet.
        """
        # From a group weights come in this thread's stream, where reading is before it and nobody
        # has to wait. Without a group they may come by RDMA, in no stream.
        groups = self.ledger.counters.update_groups
        in_stream = source == "distributed" or (source is None and groups > 0)
        in_progress = self.ledger.updates.in_progress
        self.arrivals.finish_reading(before=not in_progress)
        if in_progress:
            return None
        with self._lock, self._reported("capture"):
            there = self.inspector.memory_is_there and not self._weights_are_released
            known = [
                role
                for role in self.roles
                if self.inspector.of(role).left is not None
                and not self.inspector.nothing_ran_since(role)
            ]
            if self.arrivals.awaited:  # Nobody will know what was there when this one began.
                for role in self.roles:
                    self.inspector.start_over(role, known=False)
                self.inspector.memory.begin_update()
                return None
            self.inspector.begin_update(*self.roles)
            if not known or not there:
                return None
            began_at = self._clock()
            if not (in_stream and self.arrivals.begin_reading_before(*known)):
                self._find_unexpected_writes(*known, during="serving")
            return began_at
        return None

    def _compare_before(self, reading: Reading) -> dict[str, WeightCapture]:
        known = self.inspector.finish_reading(reading, self._fingerprint_seconds())
        self._count_skipped(*known)
        self._find_unexpected_writes(*known, during="serving", read=False)
        return {
            role.name: self.inspector.without_scratch(role, weights, reading.scratch[role])
            for role, weights in known.items()
        }

    def crash(self, error: BaseException | None) -> None:
        """SGLang's scheduler is about to end by an exception; by none, or by one that asks it to,
        is no crash. Its device may never answer again,
        so nothing is asked of it, and nobody is waited for who may be asking."""
        message = self._black_box.record_crash(error)
        if message is not None and self._lock.acquire(timeout=CRASH_SECONDS):
            try:
                self.arrivals.give_up()
                self.inspector.memory_is_there = False
                self.step(lambda ledger: ledger.updates.abort(message))
            finally:
                self._lock.release()

    def lock_tables(self) -> None:
        """Weights are about to be written. Not inside a step: it may wait for readers."""
        began_at = self._clock()
        with self._reported("table_lock"):
            self._publisher.lock_tables()
        self.ledger.updates.add_time("wait", began_at)

    # Captures beside updates.

    def capture(
        self,
        *roles: RunnerRole,
        loaded: bool = False,
        complete: bool = False,
        pools: bool = False,
    ) -> None:
        """Capture roles before the next step: something else than an update has changed them.
        ``loaded``: a load, just now; ``complete``: all is loaded that will be."""
        self.arrivals.finish_reading()
        with self._lock, self._reported("capture"):
            self._black_box.watch()
            seconds = self._fingerprint_seconds(load=True) if complete else None
            self._capture(*roles, loaded=loaded, pools=pools, fingerprint_seconds=seconds)

    def read_again(self, role: RunnerRole, part: int = 0, parts: int = 1) -> bool:
        """Somebody asks whether the weights are what they were; not inside an update. Of ``parts``
        one follows another, with batches between. Whether this was the last."""
        self.arrivals.finish_reading()
        with self._lock, self._reported("capture"):
            known = not (self.ledger.updates.in_progress or self.arrivals.awaited)
            if known and parts > 1:
                known = self.inspector.read_part(role, part, parts, self._fingerprint_seconds())
            if known:
                self._find_unexpected_writes(role, during="serving", read=parts <= 1)
            return known
        return False

    def _capture(
        self,
        *roles: RunnerRole,
        fingerprint_seconds: float | None,
        reading: Reading | None = None,
        **how: bool,
    ) -> None:
        self.inspector.capture(
            *roles, fingerprint_seconds=fingerprint_seconds, reading=reading, **how
        )
        if fingerprint_seconds is not None:
            self._count_skipped(*roles)

    def _count_skipped(self, *roles: RunnerRole) -> None:
        for role in roles:
            skipped = self.inspector.of(role).skipped
            if skipped is not None:
                self.ledger.counters.count_skipped(role.name, skipped)

    def _find_unexpected_writes(
        self, *roles: RunnerRole, during: During, garbage: Storages = frozenset(), read: bool = True
    ) -> None:
        """Whether anything but loads and updates has written weights. ``garbage``: storages of
        which that is known; ``read``: what they hold is still to be read."""
        if read:
            self._capture(*roles, fingerprint_seconds=self._fingerprint_seconds(), written=False)
        for role in roles:
            self.inspector.ignore(role, garbage)
            if during == "serving":
                self.inspector.learn_scratch(role)
            modified = self.inspector.of(role).modified.values()
            self.ledger.counters.count_modified(role.name, during, modified)

    def _fingerprint_seconds(self, *, load: bool = False) -> float:
        """How long they may take. A kernel that reads released memory ends the process."""
        if self._weights_are_released:
            return 0.0
        return LOAD_FINGERPRINT_SECONDS if load else UPDATE_FINGERPRINT_SECONDS

    # Memory that is given back and taken again.

    @property
    def _weights_are_released(self) -> bool:
        return WEIGHTS in self.ledger.counters.released

    def begin_release(self) -> None:
        """Memory is about to go. Where it is read, that ends first."""
        self.arrivals.finish_reading()
        with self._lock:
            self.inspector.memory_is_there = False

    def release(self, tags: Collection[str] | None) -> None:
        """Memory is gone; of these tags and of no others. ``None`` or empty: of all."""

        def notify(ledger: Ledger) -> None:
            ledger.counters.release(self._saved(tags))
            self.inspector.memory_is_there = True
            with self._reported("memory"):
                self.inspector.read_memory()
                self.inspector.memory.end_release()

        self.step(notify)

    def resume(self, tags: Collection[str] | None) -> None:
        """Memory is back. What it holds is garbage until an update, unless SGLang kept a copy."""

        def notify(ledger: Ledger) -> None:
            resumed = self._saved(tags)
            if not resumed:
                return
            ledger.counters.resume(resumed)
            for role in self.roles if WEIGHTS in resumed else ():
                with self._reported("capture"):
                    self._capture_resumed(role)
            self.inspector.read_memory()

        self.step(notify)

    def _capture_resumed(self, role: RunnerRole) -> None:
        if role.keeps_a_copy:
            garbage = self._without_a_copy()
            self._find_unexpected_writes(role, during="release", garbage=garbage)
        else:
            self._capture(role, fingerprint_seconds=self._fingerprint_seconds())
        self.inspector.start_over(role, known=role.keeps_a_copy)

    def _saved(self, tags: Collection[str] | None) -> set[str]:
        """Those whose memory the saver has; of others SGLang answers, and does nothing."""
        if not any(role.saves_memory for role in self.roles):
            return set()
        graphs = any(role.saves_graphs for role in self.roles)
        saved = {WEIGHTS, KV_CACHE} | ({CUDA_GRAPH} if graphs else set())
        return saved & set(tags or saved)

    def _without_a_copy(self) -> Storages:
        """Storages of models that are not copied. A draft that is holds some of its target's."""
        captures = (self.inspector.of(role) for role in self.roles if not role.keeps_a_copy)
        storages = (capture.weights.storages for capture in captures if capture.weights)
        return Storages().union(*storages)


def make_rank(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    report: Callable[[str, BaseException], None],
    hooks: Callable[[str], tuple[HookState, ...]],
    errors: Callable[[], dict[str, int]],
    clock: Callable[[], float] = time.time,
    allocations: Callable[[str], Segments] | None = None,
    fingerprinter: Fingerprinter | None = None,
) -> Rank:
    """A rank with its parts. ``report``: takes an exception of ours, and where it was caught."""
    roles = Roles(report)
    ledger = Ledger(
        clock=clock,
        trace_id=lambda number: trace_id(roles.engine.group or roles.engine.instance, number),
        # They know one another: the inspector's account asks which memory is released.
        cached_tokens=lambda: inspector.cached_tokens(),
    )
    inspector = ModelRunnerInspector(
        roles,
        report=report,
        clock=clock,
        allocations=allocations,
        fingerprinter=fingerprinter,
        shares=settings.manifest_dir is not None,
        memory=Memory(clock=clock, released=lambda: ledger.counters.released),
    )
    records = RankRecords(
        roles=roles, ledger=ledger, inspector=inspector, hooks=hooks, errors=errors, clock=clock
    )
    parts: dict[str, Any] = {
        "roles": roles,
        "ledger": ledger,
        "inspector": inspector,
        "records": records,
        "publisher": Publisher(settings, environ, report=report),
        "report": report,
        "clock": clock,
    }
    return Rank(black_box=BlackBoxRecorder(**parts), **parts)


def _table(weights: WeightCapture | None) -> WeightTable | None:
    return None if weights is None else weights.table
