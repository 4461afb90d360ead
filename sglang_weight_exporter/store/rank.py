# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The writing side: what one rank keeps in its directory, from inside the engine process."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator

import msgspec

from sglang_weight_exporter.records.black_box import BlackBox
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.memory import MemoryDump
from sglang_weight_exporter.records.snapshot import Progress, Snapshot
from sglang_weight_exporter.store.encoding import encode
from sglang_weight_exporter.store.files import Directory
from sglang_weight_exporter.store.locks import FileLock, is_held
from sglang_weight_exporter.store.progress import FILE, ProgressWriter
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, RuntimeDirError
from sglang_weight_exporter.store.spool import EVENT_BYTES, EVENT_COUNT, SpoolWriter
from sglang_weight_exporter.weight_table import WeightTable

#: A capture of torch's memory, and the request for one.
MEMORY, MEMORY_WANTED = "memory", "memory.wanted"

#: What outlives the rank, and how large it may be.
BLACK_BOX, BLACK_BOX_BYTES = "black_box", 2**20

#: Longer than a tick of the kernel's clock, which times of files are of.
_TICK_NANOSECONDS = 50_000_000


def table_file(table: WeightTable) -> str:
    """Name of a table's file; the content decides, so an unchanged table is written once."""
    content = "-".join(filter(None, (table.sha256[:16], table.fingerprint[:16])))
    return f"{table.role}-{content}.table"


class RankStore:
    """One rank's directory, made and locked; removed by the exporter process after its death.

    Methods raise ``OSError`` when the file system does not let them write; a snapshot that would
    have been replaced is then gone as well, because an old number is worse than none. A directory
    that has vanished is made anew (a session manager removes ``$XDG_RUNTIME_DIR`` when its user
    logs out, also while an engine goes on in the background), and so is what a cleaner of old
    files took out of it.
    """

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        rank_id: str,
        *,
        event_bytes: int = EVENT_BYTES,
        event_count: int = EVENT_COUNT,
    ) -> None:
        self.runtime_dir = runtime_dir
        self.rank_id = rank_id
        self.path = runtime_dir.ranks / rank_id
        self._directory = self._make()
        events = self._directory.open_directory("events")
        self._events = SpoolWriter(events, event_bytes=event_bytes, event_count=event_count)
        #: Files of tables that are in the directory.
        self._tables: set[str] = set()
        #: Appearance of the directory after the last write of ours: what nobody has changed
        #: since need not be asked for again.
        self._left: tuple[int, ...] | None = None
        #: Nobody has; and inside of :meth:`publishing`, which asks once.
        self._untouched = self._publishing = False

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Around all that is written of one step: whether the directory is still there, and what
        was written before still in it, is asked once."""
        self._come_back()
        self._publishing = True
        try:
            yield
        finally:
            self._publishing = False
            with contextlib.suppress(OSError):
                self._left = _appearance(self._directory.status())

    def write_progress(self, progress: Progress, *, check: bool) -> None:
        """Note what has changed since the snapshot whose number it has, in one system call.
        ``check``: fail where readers would not find it any more."""
        if self._progress is None or (check and not self._progress.is_there()):
            raise FileNotFoundError(FILE)
        self._progress.write(progress)

    def _make(self) -> Directory:
        """Make the directory under a hidden name and show it once its lock is held: whoever
        sees it sees it alive."""
        hidden = f".{self.rank_id}"
        with self.runtime_dir.open_ranks() as ranks, contextlib.ExitStack() as undo:
            ranks.remove_all(hidden)
            undo.callback(ranks.remove_all, hidden)
            directory = undo.enter_context(ranks.open_directory(hidden, make=True))
            directory.open_directory("events", make=True).close()
            lock = undo.enter_context(FileLock(self.path / "lock", directory=directory))
            lock.acquire()
            table_lock = FileLock(self.path / "table.lock", directory=directory)
            undo.callback(table_lock.close)
            table_lock.acquire()  # Here for readers before the first update.
            table_lock.unlock()
            try:
                ranks.rename(hidden, self.rank_id)
            except OSError:
                self._check_nobody_has_it()
                ranks.remove_all(self.rank_id)
                ranks.rename(hidden, self.rank_id)
            undo.pop_all()
        self._lock, self._table_lock = lock, table_lock
        self._progress = self._make_progress(directory)
        return directory

    def _make_progress(self, directory: Directory) -> ProgressWriter | None:
        try:
            return ProgressWriter(directory)
        except OSError:
            return None  # Of a full disk; a snapshot is written in its place.

    def _check_nobody_has_it(self) -> None:
        """What stands at the path is removed, unless it is another process's: a fork of this one
        has the same name."""
        try:
            held = is_held(self.path / "lock")
        except OSError:
            return
        if held:
            raise FileExistsError(errno.EEXIST, "another process has it", str(self.path))

    @property
    def events_dropped(self) -> int:
        """Events that had to make room for newer ones."""
        return self._events.dropped

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot, and remove tables that it no longer names."""
        self._come_back()
        try:
            self._write("snapshot", encode(snapshot))
        except BaseException:  # Also what cannot be encoded, such as a number beyond 64 bits.
            self.withdraw()
            raise
        keep = {role.table.file for role in snapshot.roles if role.table is not None}
        for file in self._tables - keep:
            self._directory.remove(file)
            self._tables.discard(file)

    def write_table(self, table: WeightTable) -> str:
        """Keep a table; returns its file's name. Takes effect with the next snapshot."""
        self._come_back()
        file = table_file(table)
        if file not in self._tables or not (self._untouched or self._directory.has(file)):
            self._write(file, encode(table))
            self._tables.add(file)
        return file

    def append_event(self, event: Event, table: WeightTable | None) -> None:
        """Queue an event with the table after it; the oldest ones make room."""
        self._come_back()
        beside = None
        if table is not None and (file := table_file(table)) in self._tables:
            beside = (self._directory, file)
        self._events.append(event, table, beside=beside)

    def leave_black_box(self, box: BlackBox, event: BlackBox | None) -> None:
        """Replace the black box, and queue what is new in it."""
        self._come_back()
        content = encode(box)
        if len(content) > BLACK_BOX_BYTES:
            content = encode(msgspec.structs.replace(box, owners=(), segments=()))
        self._write(BLACK_BOX, content)
        if event is not None:
            self._events.append_black_box(event)

    @property
    def memory_is_wanted(self) -> bool:
        """Whether somebody has asked for the memory as the next capture finds it."""
        return self._directory.has(MEMORY_WANTED)

    def leave_memory(self, dump: MemoryDump | None) -> None:
        """Answer; with nothing, where it could not be read."""
        if dump is not None:
            self._write(MEMORY, encode(dump))
        self._directory.remove(MEMORY_WANTED)

    def is_published(self) -> bool:
        """Whether what was written last is still there for readers."""
        try:
            return (
                self._directory.is_at(self.path)
                and self._lock.is_current()
                and self._directory.has("snapshot")
            )
        except OSError:
            return True  # It is not known, so nothing is known to be wrong.

    def withdraw(self) -> None:
        """Say nothing rather than something old. Where the file system does not even let us
        remove, the rank counts as dead until it can be written again."""
        try:
            self._directory.remove("snapshot")
        except OSError:
            self._lock.release()

    def lock_table(self, *, wait_seconds: float = 0.0) -> float:
        """Keep readers of tables out while weights are written; does nothing if they are out.

        An update waits for readers for so long and not longer, and then goes on without the lock:
        a reader that is still in there finds out from the snapshot. Returns the seconds waited.
        """
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while not self._table_lock.held and not self._table_lock.acquire():
                if time.monotonic() >= started + wait_seconds:
                    break
                time.sleep(0.001)
        return time.monotonic() - started

    @property
    def table_is_locked(self) -> bool:
        """Whether an update has the table lock."""
        return self._table_lock.held

    def unlock_table(self) -> None:
        """Let readers in again."""
        self._table_lock.unlock()

    def close(self) -> None:
        """Leave: from now on readers find this rank dead."""
        self._lock.release()

    def _write(self, name: str, content: bytes) -> None:
        """Write a file, also where somebody has made a directory of that name."""
        try:
            self._directory.write(name, content)
        except IsADirectoryError:
            self._directory.remove_all(name)
            self._directory.write(name, content)

    def _is_untouched(self) -> bool:
        if self._left is None or not self._lock.held:
            return False
        try:
            found = _appearance(self.path.lstat())
        except OSError:
            return False
        # Of two changes in one tick of the kernel's clock the second does not show.
        return found == self._left and time.time_ns() - found[-1] > _TICK_NANOSECONDS

    def _come_back(self) -> None:
        """Be alive, in a directory that is there."""
        if self._publishing:
            return
        self._untouched = self._is_untouched()
        if self._untouched:
            return
        if self._directory.is_at(self.path):
            if self._progress is None or not self._progress.is_there():
                self._progress = self._make_progress(self._directory)
            if not self._table_lock.is_current():
                self._table_lock.close()
            if not self._lock.is_current():
                self._lock.close()
                with contextlib.suppress(OSError):  # Perhaps removed just now.
                    self._lock.acquire()
            if self._lock.held and self._directory.is_at(self.path):
                if not self._events.is_at(self.path / "events"):
                    with contextlib.suppress(OSError):
                        self._directory.remove("events")  # A file or a link; not a directory.
                    self._events.move(self._directory.open_directory("events", make=True))
                return
        self._lock.close()
        self._table_lock.close()
        with contextlib.suppress(RuntimeDirError):  # Its reason is the next line's, in short.
            RuntimeDir.open(self.runtime_dir.path, os.environ)
        try:
            directory = self._make()
        except RuntimeDirError as error:
            raise OSError(str(error)) from error
        self._directory.close()
        self._directory = directory
        self._tables.clear()
        self._events.move(directory.open_directory("events"))


def _appearance(status: os.stat_result) -> tuple[int, ...]:
    """What is different once an entry of a directory was made or removed."""
    return status.st_dev, status.st_ino, status.st_nlink, status.st_size, status.st_mtime_ns
