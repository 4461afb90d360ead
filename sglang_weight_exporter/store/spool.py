# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The queue of loads and updates that wait to be exported as spans: a directory a rank.

::

    NUMBER-SHA256.event    records.event.Event; sorts by number and names the table it belongs to
                           ("none" without one; the first 16 digits)
    NUMBER-black_box.event records.black_box.BlackBox, with what is new in it
    SHA256.table           a table that events here refer to, kept while any of them may

The rank appends and bounds the queue (:class:`SpoolWriter`), the exporter process takes events out
of it (:class:`SpoolReader`); neither waits for the other. Only the rank removes tables, so that
none goes while a new event begins to refer to it.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from sglang_weight_exporter.records.black_box import BlackBox
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.store.decoding import read
from sglang_weight_exporter.store.encoding import encode
from sglang_weight_exporter.store.files import Directory
from sglang_weight_exporter.weight_table import WeightTable

#: How much may wait for a collector that does not answer. Events share a table that did not
#: change, so a thousand reloads in place fit into a megabyte.
EVENT_BYTES = 64 * 2**20
EVENT_COUNT = 1000

#: What a file system answers that has no hard links, or has no room for one more.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}


def _event_file(number: int, table: str) -> str:
    return f"{number:012d}-{table or 'none'}.event"


_BLACK_BOX = "-black_box.event"


def _table_file(table: str) -> str:
    return f"{table}.table"


@dataclass(frozen=True)
class _Queued:
    file: str
    nbytes: int
    #: First digits of its table's fingerprint; empty without one.
    table: str


class SpoolWriter:
    """The rank's side. What waits is known here and not listed: appending costs the same
    whatever waits, and nothing races with the exporter, which only removes."""

    def __init__(
        self,
        directory: Directory,
        *,
        event_bytes: int = EVENT_BYTES,
        event_count: int = EVENT_COUNT,
    ) -> None:
        self.dropped = 0
        self._directory = directory
        self._event_bytes = event_bytes
        self._event_count = event_count
        self._queue: deque[_Queued] = deque()
        self._tables: dict[str, int] = {}
        #: How many events of the queue refer to a table.
        self._references: Counter[str] = Counter()
        self._nbytes = 0

    def is_at(self, path: Path) -> bool:
        """Whether this is still the queue at a path."""
        return self._directory.is_at(path)

    def move(self, directory: Directory) -> None:
        """The directory was made anew: what waited in the old one is gone with it."""
        self._directory.close()
        self._directory = directory
        self._queue.clear()
        self._tables.clear()
        self._references.clear()
        self._nbytes = 0

    def append(
        self, event: Event, table: WeightTable | None, *, beside: tuple[Directory, str] | None
    ) -> None:
        """Queue an event with its table; the oldest ones make room and are counted as dropped.

        ``beside``: the directory and name of a file that holds the table already.
        """
        sha256 = "" if table is None else table.sha256[:16]
        if table is not None and sha256 not in self._tables:
            self._tables[sha256] = self._keep_table(_table_file(sha256), table, beside)
            self._nbytes += self._tables[sha256]
        encoded = encode(event)
        queued = _Queued(_event_file(event.number, sha256), len(encoded), sha256)
        self._directory.write(queued.file, encoded)
        self._queue.append(queued)
        self._references[sha256] += 1
        self._nbytes += queued.nbytes
        self._make_room()

    def append_black_box(self, box: BlackBox) -> None:
        """Queue what is new in the rank's black box."""
        encoded = encode(box)
        queued = _Queued(f"{box.number:012d}{_BLACK_BOX}", len(encoded), "")
        self._directory.write(queued.file, encoded)
        self._queue.append(queued)
        self._references[""] += 1
        self._nbytes += queued.nbytes
        self._make_room()

    def _keep_table(
        self, file: str, table: WeightTable, beside: tuple[Directory, str] | None
    ) -> int:
        """Keep a table that events are to refer to; its size."""
        if beside is not None:
            try:
                beside[0].link(beside[1], self._directory, file)
                return self._directory.size(file)
            except FileExistsError:
                return self._directory.size(file)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
        encoded = encode(table)
        self._directory.write(file, encoded)
        return len(encoded)

    def _make_room(self) -> None:
        # Delivered ones first: the exporter takes the oldest first.
        while len(self._queue) > 1 and not self._directory.has(self._queue[0].file):
            self._forget()
        while len(self._queue) > 1 and (
            len(self._queue) > self._event_count or self._nbytes > self._event_bytes
        ):
            if self._directory.remove(self._queue[0].file):
                self.dropped += 1
            self._forget()

    def _forget(self) -> None:
        queued = self._queue.popleft()
        self._nbytes -= queued.nbytes
        self._references[queued.table] -= 1
        if not self._references[queued.table]:
            del self._references[queued.table]
            self._nbytes -= self._tables.pop(queued.table, 0)
            if queued.table:
                self._directory.remove(_table_file(queued.table))


@dataclass(frozen=True)
class SpoolReader:
    """The exporter's side. Any of this may fail at any moment: ranks die."""

    path: Path

    def waiting(self) -> list[Path]:
        """Files of events, oldest first; none where there is no such directory. What only has the
        name of one, such as a directory or a link, is none."""
        try:
            with os.scandir(self.path) as entries:
                return sorted(
                    Path(entry)
                    for entry in entries
                    if entry.name.endswith(".event") and entry.is_file(follow_symlinks=False)
                )
        except (FileNotFoundError, NotADirectoryError):
            return []

    def event(self, file: Path) -> Event:
        """Raises ``OSError`` and ``UnreadableError``."""
        return read(file, Event)

    def black_box(self, file: Path) -> BlackBox | None:
        """What is new in the rank's black box, where the file has that; ``None``: it has an event.
        Raises ``OSError`` and ``UnreadableError``."""
        return read(file, BlackBox) if file.name.endswith(_BLACK_BOX) else None

    def table(self, event: Event) -> WeightTable | None:
        """The table that an event came with. Raises ``OSError`` and ``UnreadableError``."""
        if event.table is None:
            return None
        return read(self.path / _table_file(event.table.sha256[:16]), WeightTable)

    def acknowledge(self, file: Path) -> None:
        """An event is exported, or dropped."""
        file.unlink(missing_ok=True)

    def size(self) -> tuple[float, int]:
        """When something was queued last, and the bytes of all that waits, tables included.
        Raises ``OSError``."""
        status = [path.lstat() for path in self.path.iterdir()]
        return max((each.st_mtime for each in status), default=0.0), sum(
            each.st_size for each in status
        )
