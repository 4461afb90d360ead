# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The writing side: what one rank keeps in its directory, from inside the engine process."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from sglang_weight_exporter.records import Event, Snapshot, WeightTable
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, write_atomically

#: How much may wait for a collector that does not answer. Events share a table that did not
#: change, so a thousand reloads in place fit into a megabyte.
EVENT_BYTES = 64 * 2**20
EVENT_COUNT = 1000


def table_file(role: str, sha256: str) -> str:
    """Name of a table's file; the content decides, so an unchanged table is written once."""
    return f"{role}-{sha256[:16]}.table"


def event_file(number: int, sha256: str) -> str:
    """Name of an event's file: sorts by number and names the table it belongs to."""
    return f"{number:012d}-{sha256[:16] or 'none'}.event"


def event_table_file(sha256: str) -> str:
    """Name under which the directory of events keeps a table that an event refers to."""
    return f"{sha256[:16]}.table"


def table_of(event: Path) -> str:
    """Stem of the table file that an event's file names."""
    return event.stem.partition("-")[2]


class RankStore:
    """One rank's directory, made and locked; removed by the exporter process after its death.

    Methods raise ``OSError`` when the file system does not let them write; what they would have
    replaced is then gone as well, because an old number is worse than none.
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
        self.directory = runtime_dir.ranks / rank_id
        self.events_dropped = 0
        self._event_bytes = event_bytes
        self._event_count = event_count
        self._encode = msgspec.msgpack.Encoder().encode
        self._create()

    def _create(self) -> None:
        """Make the directory under a hidden name and show it once its lock is held: whoever
        sees it sees it alive."""
        hidden = self.runtime_dir.ranks / f".{self.rank_id}"
        shutil.rmtree(hidden, ignore_errors=True)
        (hidden / "events").mkdir(parents=True, mode=0o700)
        hidden.chmod(0o700)
        self.lock = FileLock(hidden / "lock")
        self.lock.acquire()
        (hidden / "table.lock").touch(mode=0o600)  # Here for readers before the first update.
        self.table_lock = FileLock(self.directory / "table.lock")
        hidden.rename(self.directory)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot, and remove tables that it no longer names."""
        self._write(self.directory / "snapshot", self._encode(snapshot))
        keep = {role.table.file for role in snapshot.roles if role.table is not None}
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".table") and entry.name not in keep:
                Path(entry.path).unlink(missing_ok=True)

    def write_table(self, table: WeightTable) -> str:
        """Keep a table; returns its file's name. Takes effect with the next snapshot."""
        name = table_file(table.role, table.sha256)
        path = self.directory / name
        if not path.exists():
            self._write(path, self._encode(table))
        return name

    def lock_table(self, *, wait_seconds: float = 0.0) -> None:
        """Keep readers of tables out while weights are written; does nothing if they are out.

        An update waits for readers for so long and not longer, and then goes on without the lock:
        a reader that is still in there finds out from the snapshot.
        """
        deadline = time.monotonic() + wait_seconds
        with contextlib.suppress(OSError):
            while not self.table_lock.held and not self.table_lock.acquire():
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.001)

    def unlock_table(self) -> None:
        """Let readers in again."""
        self.table_lock.release()

    def append_event(self, event: Event) -> None:
        """Queue an event; the oldest ones make room and are counted as dropped."""
        events = self.directory / "events"
        sha256 = "" if event.table is None else event.table.sha256
        self._write(events / event_file(event.number, sha256), self._encode(event))
        if event.table is not None:
            with contextlib.suppress(FileExistsError):
                os.link(self.directory / event.table.file, events / event_table_file(sha256))
        self._drop_oldest(events)

    def _drop_oldest(self, directory: Path) -> None:
        # The directory itself is the queue: the exporter process takes events out of it, and only
        # this side removes tables, so that none goes while a new event begins to refer to it.
        sizes = {Path(entry.path): entry.stat().st_size for entry in os.scandir(directory)}
        events = deque(sorted(path for path in sizes if path.suffix == ".event"))
        tables = {path.stem: path for path in sizes if path.suffix == ".table"}
        while True:
            needed = {table_of(path) for path in events}
            for stem in tables.keys() - needed:
                path = tables.pop(stem)
                path.unlink(missing_ok=True)
            size = sum(sizes[path] for path in (*events, *tables.values()))
            if len(events) <= 1 or (size <= self._event_bytes and len(events) <= self._event_count):
                return
            try:
                events.popleft().unlink()
            except FileNotFoundError:
                continue  # Exported in this moment.
            self.events_dropped += 1

    def remove_snapshot(self) -> None:
        """Say nothing rather than something old."""
        (self.directory / "snapshot").unlink(missing_ok=True)

    def close(self) -> None:
        """Leave: the next look at the runtime directory finds this rank dead."""
        self.lock.release()

    def _write(self, path: Path, content: bytes) -> None:
        try:
            self._retrying(lambda: write_atomically(path, content))
        except OSError:
            self.remove_snapshot()
            raise

    def _retrying(self, write: Callable[[], None]) -> None:
        try:
            write()
        except FileNotFoundError:
            # The directory is gone: a session manager removes $XDG_RUNTIME_DIR when its user
            # logs out, also while an engine goes on in the background.
            if self.directory.exists():
                raise
            self.lock.close()
            RuntimeDir.open(self.runtime_dir.path, os.environ)
            self._create()
            write()
