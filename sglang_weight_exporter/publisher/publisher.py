# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank knows → its files. Each of them fails alone, says so, and is made up for later.

A full disk, a directory that is gone or read-only, no descriptor left: what could not be written
is kept and written with the next success. A static engine may have no next event for weeks, so a
thread tries again until all is written; while all is well there is none.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from sglang_weight_exporter.publisher.exporter_process import Supervisor
from sglang_weight_exporter.records.black_box import BlackBox
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.memory import MemoryDump
from sglang_weight_exporter.records.snapshot import Progress, Snapshot
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.engine_names import claim_engine_name
from sglang_weight_exporter.store.namespaces import pid_namespace
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import WeightTable

#: Between two tries at what could not be written: from, to, each twice the one before.
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 30.0

#: How long a rank that may be dying waits for a thread that writes.
PATIENCE_SECONDS = 0.05

#: How many events may wait in memory for a file system that takes none.
WAITING_EVENTS = 100


@dataclass(frozen=True)
class _Waiting:
    event: Event
    table: WeightTable | None


class Publisher:
    """One rank's way to its readers. Safe from any thread.

    ``report`` takes every failure, by the name of what failed.
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        *,
        report: Callable[[str, BaseException], None],
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._report = report
        self._first_retry_seconds = first_retry_seconds
        self._lock = threading.RLock()
        self._rank_id = os.urandom(8).hex()
        self._store: RankStore | None = None
        #: The name that the engine was given in the store.
        self._name = ""
        self._snapshot: Snapshot | None = None
        #: Of the last snapshot that readers have; 0: none.
        self._number = 0
        self._numbers = itertools.count(1)
        #: Whether an update was noted beside it.
        self._noted = False
        self._tables: dict[str, WeightTable] = {}
        self._events: deque[_Waiting] = deque()
        self._dropped = 0
        self._retrying = False
        #: Whether a thread writes down what memory was read.
        self._leaving = False
        #: Whether a thread looks after the exporter process, where it is this rank's to do so.
        self._supervised = False
        #: What is left of the time that the update which is under way may wait for readers.
        self._reader_seconds = settings.reader_wait_seconds

    def publish(
        self,
        snapshot: Snapshot,
        tables: Mapping[str, WeightTable],
        events: Mapping[int, tuple[Event, WeightTable | None]] | None = None,
    ) -> None:
        """Write what holds now, and what has ended. ``tables``: by role, those of the snapshot."""
        with self._lock:
            self._snapshot = snapshot
            self._tables = dict(tables)
            self._keep(events or {})
            self._write_or_retry()

    def note(self, progress: Progress) -> bool:
        """Note what has changed since the last snapshot, beside it; ``False`` where that cannot be
        done now, and a snapshot is needed."""
        with self._lock:
            if self._store is None or not self._number or self._retrying:
                return False
            try:
                self._store.write_progress(
                    msgspec.structs.replace(progress, snapshot=self._number),
                    check=not self._noted,
                )
                self._noted = bool(progress.roles)
            except OSError:
                return False
            except Exception as error:
                self._report("progress", error)
                return False
            return True

    def withdraw(self, events: Mapping[int, tuple[Event, WeightTable | None]]) -> None:
        """What holds now is not known: take away what was written. ``events`` go out with the next
        snapshot."""
        with self._lock:
            self._snapshot = None
            self._number = 0
            self._keep(events)
            self._withdraw()

    def _keep(self, events: Mapping[int, tuple[Event, WeightTable | None]]) -> None:
        for event, table in events.values():
            self._events.append(_Waiting(event, table))
            if len(self._events) > WAITING_EVENTS:
                self._events.popleft()
                self._dropped += 1

    def _withdraw(self) -> None:
        if self._store is not None:
            self._store.withdraw()

    def leave_memory(self, read: Callable[[], Callable[[], MemoryDump] | None]) -> None:
        """Leave the memory of the GPUs, if somebody has asked for it: read now, and written down by
        a thread that ends with that. The engine's own would take seconds for a long history."""
        with self._lock:
            store = self._store
            if store is None or self._leaving:
                return
            try:
                if store.memory_is_wanted:
                    write_down = read()
                    if write_down is None:
                        store.leave_memory(None)
                    else:
                        self._leaving = self._has_started("memory", self._leaver(write_down).start)
            except Exception as error:
                self._report("memory", error)

    def _leaver(self, write_down: Callable[[], MemoryDump]) -> threading.Thread:
        def leave() -> None:
            failure: Exception | None = None
            try:
                dump = write_down()
                with self._lock:
                    if self._store is not None:
                        self._store.leave_memory(dump)
            except Exception as error:
                failure = error
            with self._lock:  # Not before it was said that this has begun.
                self._leaving = False
            if failure is not None:
                self._report("memory", failure)

        return threading.Thread(target=leave, name="sglang-weight-exporter-memory", daemon=True)

    def leave_black_box(self, box: BlackBox, event: BlackBox | None, progress: Progress) -> bool:
        """Write what outlives this process, and beside the snapshot what has changed; whether that
        was possible. ``event``: what is new in it, for a span."""
        if not self._lock.acquire(timeout=PATIENCE_SECONDS):
            return False
        try:
            mine = {"rank_id": self._rank_id, "engine": self._engine(box.engine)}
            self._open().leave_black_box(
                msgspec.structs.replace(box, **mine),
                None if event is None else msgspec.structs.replace(event, **mine),
            )
            self.note(progress)
            return True
        except Exception as error:
            self._report("black_box", error)
            return False
        finally:
            self._lock.release()

    def lock_tables(self) -> None:
        """Weights are about to be written, and the snapshot says so already.

        All calls of an update together wait for readers for as long as the setting says.
        """
        with self._lock:
            store, seconds = self._store, self._reader_seconds
        if store is not None:
            try:
                waited = store.lock_table(wait_seconds=seconds)
                self._reader_seconds = max(0.0, seconds - waited)
            except Exception as error:
                self._report("table_lock", error)

    def unlock_tables(self, *, update_is_over: bool) -> None:
        """Readers may come in. Between the calls of an update without a session they find in the
        snapshot that it is not over: an update that nobody ends keeps nobody out."""
        with self._lock:
            if update_is_over:
                self._reader_seconds = self._settings.reader_wait_seconds
            if self._store is not None:
                try:
                    self._store.unlock_table()
                except Exception as error:
                    self._report("table_lock", error)

    def _come_back(self) -> None:
        """What a cleaner of old files has removed, or whoever removed the directory, is written
        again."""
        with self._lock:
            if self._store is not None and not self._store.is_published():
                self._write_or_retry()

    def _write_or_retry(self) -> None:
        if not self._write() and not self._retrying:
            thread = threading.Thread(
                target=self._retry, name="sglang-weight-exporter-retry", daemon=True
            )
            self._retrying = self._has_started("retry", thread.start)

    def _retry(self) -> None:
        pause = self._first_retry_seconds
        waiting = threading.Event()
        while True:
            waiting.wait(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
            with self._lock:
                if self._write():
                    self._retrying = False
                    return

    def _write(self) -> bool:
        """Write all that is not written; whether all of it is."""
        snapshot = self._snapshot
        if snapshot is None:
            return True
        try:
            store = self._open()
            if self._name:
                with store.publishing():
                    return self._write_to(store, snapshot)
            # The first one is written under a name that no other engine on this host has.
            with claim_engine_name(store.runtime_dir, snapshot.engine, snapshot.ranks) as name:
                self._name = name
                complete = self._write_to(store, snapshot)
                if not complete:
                    self._name = ""
            return complete
        except Exception as error:
            self._report("snapshot", error)
            self._withdraw()
            return False

    def _open(self) -> RankStore:
        """The rank's directory, made when it is first needed."""
        if self._store is None:
            runtime_dir = RuntimeDir.open(self._settings.runtime_dir, self._environ)
            self._store = RankStore(runtime_dir, self._rank_id)
        if self._settings.serve and not self._supervised:
            self._supervised = self._has_started(
                "supervisor",
                Supervisor(
                    self._store.runtime_dir,
                    self._environ,
                    come_back=self._come_back,
                ).start,
            )
        return self._store

    def _has_started(self, name: str, start: Callable[[], None]) -> bool:
        """Whether a thread could be started: a container may be at its limit of processes. The
        next update tries again."""
        try:
            start()
        except RuntimeError as error:
            self._report(name, error)
            return False
        return True

    def _write_to(self, store: RankStore, snapshot: Snapshot) -> bool:
        complete = True
        missing: set[str] = set()
        for role, table in self._tables.items():
            try:
                store.write_table(table)
            except Exception as error:
                self._report("table", error)
                missing.add(role)
                complete = False
        while self._events:
            waiting = self._events[0]
            event = msgspec.structs.replace(
                waiting.event, rank_id=self._rank_id, engine=self._engine(waiting.event.engine)
            )
            try:
                store.append_event(event, waiting.table)
            except OSError as error:
                self._report("event", error)
                complete = False
                break
            except Exception as error:
                # It cannot be encoded, and the next try would find the same.
                self._report("event", error)
                self._dropped += 1
            self._events.popleft()
        self._number = 0
        number = next(self._numbers)
        try:
            store.write_snapshot(self._complete(snapshot, store, number, without=missing))
            self._number, self._noted = number, False
        except Exception as error:
            self._report("snapshot", error)
            complete = False
        return complete

    def _complete(
        self,
        snapshot: Snapshot,
        store: RankStore,
        number: int,
        *,
        without: set[str] | Mapping[str, object],
    ) -> Snapshot:
        """The snapshot with what only the store knows; roles whose table could not be written
        have none."""
        return msgspec.structs.replace(
            snapshot,
            number=number,
            rank_id=self._rank_id,
            pid_namespace=pid_namespace(),
            engine=self._engine(snapshot.engine),
            events_dropped=store.events_dropped + self._dropped,
            metadata_dir=str(self._settings.metadata_dir or ""),
            reference_dir=str(self._settings.reference_dir or ""),
            manifest_dir=str(self._settings.manifest_dir or ""),
            roles=tuple(
                msgspec.structs.replace(role, table=None) if role.name in without else role
                for role in snapshot.roles
            ),
        )

    def _engine(self, engine: Engine) -> Engine:
        return msgspec.structs.replace(engine, name=self._name or engine.name)
