# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The reading side: which ranks live on this host, and what they say of themselves."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.records.memory import MemoryDump
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.decoding import (
    AnyRecord,
    UnreadableError,
    read,
    read_json,
    read_snapshot,
)
from sglang_weight_exporter.store.files import Directory, write_atomically
from sglang_weight_exporter.store.locks import FileLock, is_held
from sglang_weight_exporter.store.progress import ProgressReader
from sglang_weight_exporter.store.rank import MEMORY, MEMORY_WANTED
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import SpoolReader
from sglang_weight_exporter.weight_table import WeightTable


@dataclass(frozen=True)
class RankDirectory:
    """One rank's directory, as found. Reading from it may fail at any moment: ranks die."""

    path: Path

    @property
    def rank_id(self) -> str:
        return self.path.name

    def is_alive(self) -> bool:
        return is_held(self.path / "lock")

    def snapshot(self, on_left_out: Callable[[str], None] | None = None) -> Snapshot:
        """Raises ``OSError`` and ``UnreadableError``; models that are damaged are left out, and
        ``on_left_out`` gets a sentence for each."""
        snapshot = read_snapshot(self.path / "snapshot", on_left_out)
        return ProgressReader(self.path).apply(snapshot)

    def table(self, file: str) -> WeightTable:
        return read(self.path / file, WeightTable)

    def ask_for_memory(self) -> None:
        """Have the rank leave its memory with the next thing that it publishes. Raises
        ``OSError``."""
        (self.path / MEMORY).unlink(missing_ok=True)
        write_atomically(self.path / MEMORY_WANTED, b"")

    @property
    def memory_is_wanted(self) -> bool:
        return (self.path / MEMORY_WANTED).exists()

    def memory(self) -> MemoryDump:
        """What it has left. Raises ``OSError`` and ``UnreadableError``."""
        return read(self.path / MEMORY, MemoryDump)

    @property
    def events(self) -> SpoolReader:
        """Loads and updates that wait to be exported."""
        return SpoolReader(self.path / "events")

    def noted(self, file: str, kind: type[AnyRecord]) -> AnyRecord:
        """What the exporter process noted. Raises ``OSError`` and ``UnreadableError``."""
        return read_json(self.path / file, kind)

    def note(self, file: str, content: bytes) -> None:
        """Raises ``OSError``."""
        write_atomically(self.path / file, content)

    def remove(self) -> None:
        """Remove what a dead rank left. One that has come back meanwhile is left alone."""
        with (
            contextlib.suppress(OSError),
            Directory.open(self.path.parent) as ranks,
            FileLock(self.path / "lock", create=False) as lock,
        ):
            if lock.acquire():
                ranks.remove_all(self.path.name)

    def move(self, into: Path) -> None:
        """The same, for later; in the place of its being removed. Raises ``OSError``."""
        with FileLock(self.path / "lock", create=False) as lock:
            if lock.acquire():
                self.path.rename(into / self.path.name)


def rank_directories(runtime_dir: RuntimeDir) -> Iterator[RankDirectory]:
    """Every rank's directory, alive or dead, in a stable order. A link is none: what it leads to
    is somebody else's, or another rank's.

    Raises ``OSError`` where that is not known now, as without a free descriptor.
    """
    try:
        with os.scandir(runtime_dir.ranks) as entries:
            paths = sorted(
                Path(entry)
                for entry in entries
                if not (entry.name.startswith(".") or entry.is_symlink())
            )
    except FileNotFoundError:
        return  # Removed, or never made: nobody is there.
    yield from map(RankDirectory, paths)


def keep_from_cleaners(runtime_dir: RuntimeDir) -> None:
    """Have every file look used, and no file look changed.

    Cleaners of temporary directories remove what nobody has used for days, and an engine may not
    change its weights for weeks: tmpreaper looks at the time of the last access, systemd-tmpfiles
    at the latest of all times. Raises nothing: what cannot be touched may be gone just now.
    """
    for directory, _, files in os.walk(runtime_dir.path):
        for path in (Path(directory), *(Path(directory, file) for file in files)):
            with contextlib.suppress(OSError):
                changed = path.lstat().st_mtime_ns
                os.utime(path, ns=(time.time_ns(), changed), follow_symlinks=False)


def read_endpoint(runtime_dir: RuntimeDir) -> ExporterEndpoint | None:
    """What the exporter process says of itself, if one is alive."""
    try:
        if not is_held(runtime_dir.exporter_lock):
            return None
        return read_json(runtime_dir.exporter_file, ExporterEndpoint)
    except (OSError, UnreadableError):
        return None


def write_endpoint(runtime_dir: RuntimeDir, endpoint: ExporterEndpoint) -> None:
    """Say where the exporter process serves. Raises ``OSError``."""
    write_atomically(runtime_dir.exporter_file, msgspec.json.encode(endpoint))


def remove_endpoint(runtime_dir: RuntimeDir) -> None:
    """The exporter process ends. Raises ``OSError``."""
    runtime_dir.exporter_file.unlink(missing_ok=True)


#: Of a file: another one is at its path when any of these is another.
Version: TypeAlias = tuple[int, int, int]


def _version(path: Path) -> Version:
    status = path.lstat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _version_if_there(path: Path) -> Version | None:
    try:
        return _version(path)
    except FileNotFoundError:
        return None


@dataclass
class SnapshotReader:
    """Snapshots of the ranks that are alive, read again only when a file was replaced. Safe from
    any thread."""

    runtime_dir: RuntimeDir
    #: Called with the sentence for each file that could not be read, once for each version of it.
    on_unreadable: Callable[[str], None] = lambda sentence: None
    unreadable: int = 0
    _cache: dict[Path, tuple[Version, Snapshot | None]] = field(default_factory=dict)
    #: Ranks whose lock nobody held, by the files that they had then: one that takes it again,
    #: because it could not write for a while, writes a snapshot after that.
    _dead: dict[Path, tuple[Version, Version | None]] = field(default_factory=dict)
    _progress: dict[Path, ProgressReader] = field(default_factory=dict)
    #: What was said of a rank that could not be read, until it can be.
    _logged: dict[Path, str] = field(default_factory=dict)
    #: It is said once, not at each scrape.
    _listing_failed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> list[tuple[RankDirectory, Snapshot]]:
        """Live ranks with a snapshot, in a stable order. Never raises: what cannot be read is none
        this time, is counted, and is said once."""
        with self._lock:
            return self._read()

    def of(self, directory: RankDirectory) -> tuple[Version, Snapshot | None]:
        """The snapshot of one rank, dead or alive, or ``None`` if it is damaged, and what says
        whether it is still that. Raises ``OSError``."""
        with self._lock:
            return self._snapshot(directory)

    def _read(self) -> list[tuple[RankDirectory, Snapshot]]:
        found, seen, obstacles = [], set(), dict[Path, str]()
        for directory in self._directories():
            seen.add(directory.path)
            try:
                if not self._is_alive(directory):
                    continue
                _, snapshot = self._snapshot(directory)
                if snapshot is not None:
                    snapshot = self._progress.setdefault(
                        directory.path, ProgressReader(directory.path)
                    ).apply(snapshot)
            except FileNotFoundError:
                continue  # Not written yet, or the rank has just gone.
            except OSError as error:
                reason = error.strerror or str(error)
                obstacles[directory.path] = f"{directory.path} cannot be read ({reason})."
                continue
            if snapshot is not None:
                found.append((directory, snapshot))
        for path in self._cache.keys() - seen:
            del self._cache[path]
            self._progress.pop(path, None)
        self._dead = {path: self._dead[path] for path in seen & self._dead.keys()}
        for path, sentence in obstacles.items():
            if self._logged.get(path) != sentence:
                self.complain(sentence)
        self._logged = obstacles
        return found

    def _is_alive(self, directory: RankDirectory) -> bool:
        """As the directory says. Of thousands that are dead each is asked once, while somebody
        clears them away or waits for a collector to take their last spans."""
        key = (_version(directory.path / "lock"), _version_if_there(directory.path / "snapshot"))
        if self._dead.get(directory.path) == key:
            return False
        alive = directory.is_alive()
        if not alive:
            self._dead[directory.path] = key
        return alive

    def _directories(self) -> list[RankDirectory]:
        try:
            directories = list(rank_directories(self.runtime_dir))
        except OSError as error:
            self.unreadable += 1
            if not self._listing_failed:
                self.on_unreadable(
                    f"{self.runtime_dir.ranks} cannot be listed ({error.strerror}). No rank is "
                    "served until it can be. Look at what it is, and at its owner and mode."
                )
            self._listing_failed = True
            return []
        self._listing_failed = False
        return directories

    def _snapshot(self, directory: RankDirectory) -> tuple[Version, Snapshot | None]:
        version = _version(directory.path / "snapshot")
        cached = self._cache.get(directory.path)
        if cached is not None and cached[0] == version:
            return cached
        snapshot: Snapshot | None = None
        try:
            snapshot = directory.snapshot(self.complain)
            if snapshot.rank_id != directory.rank_id:
                # Two would publish the same series, perhaps with other values.
                self.complain(
                    f"{directory.path} is a copy of what rank {snapshot.rank_id} has, so it is "
                    "left out. Remove it."
                )
                snapshot = None
        except UnreadableError as error:
            self.complain(str(error))
        self._cache[directory.path] = found = (version, snapshot)
        return found

    def complain(self, sentence: str) -> None:
        """Something that a rank has written is left out."""
        self.unreadable += 1
        self.on_unreadable(sentence)
