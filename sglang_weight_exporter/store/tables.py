# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Pointer tables of this host, for programs that read them: consistent, and notified of changes.

A table is consistent when no update was in progress from before it was read until after it. What
decides is the snapshot: an update writes it before it touches a tensor. The table lock does more,
where ``SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS`` is set: an update that finds a reader inside
waits for it. Nothing stays locked when a reader or an engine dies.

A reader takes nothing from the engine but processor time and memory bandwidth: it opens files for
reading, which locks no directory, and what it has read it keeps until the snapshot says otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import TableRef
from sglang_weight_exporter.store.decoding import (
    LARGEST_RECORD,
    UnreadableError,
    decode_snapshot,
)
from sglang_weight_exporter.store.files import read_file
from sglang_weight_exporter.store.progress import ProgressReader
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import VARIABLE, NoRuntimeDirError, RuntimeDir
from sglang_weight_exporter.weight_table import Region, Row, WeightTable, table_regions, table_rows

#: A reader that waits asks again after a tenth of the time it has waited, in these bounds
#: (seconds): it notices by that much too late. To ask after a sleep takes 0.4 ms, with cold caches,
#: and not 0.03 ms as in a loop.
_POLL_SECONDS = (0.01, 0.05)


class TableError(Exception):
    """No consistent table can be had; the message says why."""


class UpdateInProgressError(TableError):
    """Weights are being updated, and were for as long as the reader would wait."""


class RankGoneError(TableError):
    """The engine process has ended: its addresses mean nothing any more."""


@dataclass(frozen=True)
class Table:
    """The pointer table of one model of one rank, as it was when no update was in progress."""

    rank_id: str
    #: The engine process, whose addresses these are.
    pid: int
    started_at: float
    engine: Engine
    ranks: Ranks
    role: Role
    weight_version: str
    columns: WeightTable
    #: Those that hold anything of the rank.
    devices: tuple[Device, ...] = ()
    #: Where it was read; ``None``: not on this host, or out of a trace.
    directory: RankDirectory | None = None

    @property
    def update(self) -> int:
        """Number of the load or update that made the weights what they are."""
        return 0 if self.role.last_update is None else self.role.last_update.sequence

    @property
    def released(self) -> bool:
        """Whether the memory behind the addresses has been given back for now."""
        return self.role.released

    def rows(self) -> Iterator[Row]:
        """Named tensors in the model's order: parameters, then buffers."""
        return table_rows(self.columns)

    def regions(self) -> Iterator[Region]:
        """Contiguous runs inside one allocation, by device and address."""
        return table_regions(self.columns)


class TableReader:
    """Reads the table of one role of one rank, again and again."""

    def __init__(self, directory: RankDirectory, role: str, engine: Engine, ranks: Ranks) -> None:
        self.directory = directory
        self.role = role
        self.engine = engine
        self.ranks = ranks
        self._progress = ProgressReader(directory.path)
        #: As last read, each with what says whether it is still that. Replaced as a whole, so
        #: threads may share a reader.
        self._last_snapshot: tuple[bytes, Snapshot] | None = None
        self._last_columns: tuple[TableRef, WeightTable] | None = None

    def read(self, timeout: float = 0.0) -> Table:
        """A consistent table, waiting up to ``timeout`` seconds for one. No update waits for it.

        Raises :class:`UpdateInProgressError`, :class:`RankGoneError`, or :class:`TableError` when
        the table could not be captured.
        """
        with self._consistent(timeout, hold=False) as table:
            return table

    @contextlib.contextmanager
    def hold(self, timeout: float = 0.0) -> Iterator[Table]:
        """A consistent table, and the table lock, shared, for as long as the block runs.

        An update waits for the end of the block for at most the engine's
        ``SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS``, by default not at all: whoever reads
        memory at these addresses asks :meth:`is_current` before using what it read.
        """
        with self._consistent(timeout, hold=True) as table:
            yield table

    @contextlib.contextmanager
    def _consistent(self, timeout: float, *, hold: bool) -> Iterator[Table]:
        waiting = _Waiting(timeout)
        while True:
            with contextlib.ExitStack() as lock:
                shared = lock.enter_context(self._shared_lock())
                if not hold:
                    lock.close()  # A call that begins now says so in the snapshot first.
                table, obstacle = self._attempt() if shared else (None, self._busy())
                if not self.directory.is_alive():
                    raise RankGoneError(
                        f"The engine process of rank {self.directory.rank_id} has ended, so its "
                        f"addresses mean nothing any more. Look for the tables that there are now."
                    )
                if table is not None:
                    yield table
                    return
            if not waiting.pause():
                raise obstacle

    def is_current(self, table: Table) -> bool:
        """Whether nothing has begun to change the weights since the table was read."""
        try:
            role = self._role(self._snapshot())
        except (OSError, TableError, UnreadableError):
            return False
        return self.directory.is_alive() and _state(role) == _state(table.role)

    def wait_for_change(self, table: Table, timeout: float) -> Table:
        """The table after the next load or update, also one in place that moved nothing.

        Raises ``TimeoutError`` when there was none in ``timeout`` seconds, and otherwise what
        :meth:`read` raises.
        """
        waiting = _Waiting(timeout)
        while self.is_current(table):
            if not waiting.pause():
                raise TimeoutError(f"The weights did not change in {timeout:g} seconds.")
        return self.read(waiting.left)

    def _snapshot(self) -> Snapshot:
        """What the rank says now, decoded only when it is not what it said last.

        Its content is compared and not the time of the file: two of one tick of the kernel's
        clock, in one inode after the other, look the same.
        """
        path = self.directory.path / "snapshot"
        content = read_file(path, LARGEST_RECORD)
        last = self._last_snapshot
        if last is None or last[0] != content:
            self._last_snapshot = last = (content, decode_snapshot(content, path))
        return self._progress.apply(last[1])

    def _attempt(self) -> tuple[Table | None, TableError]:
        """A table if it is the same before and after reading, or else why there is none."""
        try:
            snapshot = self._snapshot()
            role = self._role(snapshot)
            if role.table is None:
                return None, TableError(
                    f"There is no table of the {self.role} model of rank {snapshot.rank_id} "
                    f"(process {snapshot.pid}): the model is not loaded yet, or it could not be "
                    f"read. `sglang-weight-exporter status` says more."
                )
            # The table lock was free: no call of an update was running.
            for progress in role.going_on:
                if not progress.is_over(time.time()):
                    return None, self._busy()
                if role.table.captured_at < progress.last_call_at:
                    return None, self._unseen()
            last = self._last_columns
            if last is None or last[0] != role.table:
                last = (role.table, self.directory.table(role.table.file))
                if _state(self._role(self._snapshot())) != _state(role):
                    return None, self._busy()
                self._last_columns = last
        except FileNotFoundError:
            return None, self._busy()  # Replaced in this moment, or the rank has gone.
        except UnreadableError as error:
            return None, TableError(str(error))
        return Table(
            rank_id=snapshot.rank_id,
            pid=snapshot.pid,
            started_at=snapshot.started_at,
            engine=snapshot.engine,
            ranks=snapshot.ranks,
            role=role,
            weight_version=snapshot.weight_version,
            columns=last[1],
            devices=snapshot.devices,
            directory=self.directory,
        ), TableError()

    def _role(self, snapshot: Snapshot) -> Role:
        for role in snapshot.roles:
            if role.name == self.role:
                return role
        raise TableError(f"Rank {snapshot.rank_id} has no model with the role {self.role}.")

    def _busy(self) -> TableError:
        return UpdateInProgressError(
            f"The weights of the {self.role} model of rank {self.directory.rank_id} are being "
            f"updated, so the table may be a mixture of old and new. Wait longer for its end."
        )

    def _unseen(self) -> TableError:
        return UpdateInProgressError(
            f"The weights of the {self.role} model of rank {self.directory.rank_id} were updated "
            f"by calls whose end this SGLang does not report, and they were not captured since: "
            f"tensors may have moved. The next update captures them first. Have the client ask for "
            f"the cache to be flushed with its last call (flush_cache), which ends the update."
        )

    @contextlib.contextmanager
    def _shared_lock(self) -> Iterator[bool]:
        """The table lock, shared; ``False`` while an update has it."""
        try:
            # Opened for reading: the runtime directory may be mounted read-only.
            # O_NONBLOCK: a FIFO of this name would wait for a writer.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.directory.path / "table.lock", flags)
        except FileNotFoundError:
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                shared = True
            except BlockingIOError:
                shared = False
            yield shared
        finally:
            os.close(descriptor)


class _Waiting:
    """For something that another process does, by asking again and again."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._started = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until the timeout."""
        return max(0.0, self._started + self._timeout - time.monotonic())

    def pause(self) -> bool:
        """Sleep until it is time to ask again; ``False`` at once when the time is over."""
        left = self.left
        if left:
            shortest, longest = _POLL_SECONDS
            waited = time.monotonic() - self._started
            time.sleep(min(max(shortest, waited / 10), longest, left))
        return left > 0.0


def _state(role: Role) -> tuple[object, ...]:
    """What is different after anything has touched the weights or begun to."""
    return (
        tuple((progress.started_at, progress.calls) for progress in role.going_on),
        None if role.last_update is None else role.last_update.sequence,
        None if role.table is None else role.table.sha256,
        role.resident,
    )


def open_tables(
    runtime_dir: Path | None = None,
    *,
    engine: str | None = None,
    role: str | None = None,
) -> list[TableReader]:
    """A reader for each model of each rank that is alive on this host, in a stable order.

    ``runtime_dir``: the engine's ``SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR``; the default is the same
    as the engine's; one that does not exist has no ranks. Raises :class:`RuntimeDirError` when it
    cannot be trusted.
    """
    try:
        directory = RuntimeDir.find(runtime_dir or _from_environ(), os.environ)
    except NoRuntimeDirError:
        return []
    return [
        TableReader(rank, found.name, snapshot.engine, snapshot.ranks)
        for rank, snapshot in sorted(
            SnapshotReader(directory).read(), key=lambda read: read[1].order
        )
        for found in snapshot.roles
        if engine in {None, snapshot.engine.name} and role in {None, found.name}
    ]


def _from_environ() -> Path | None:
    path = os.environ.get(VARIABLE, "").strip()
    return Path(path).expanduser().absolute() if path else None
