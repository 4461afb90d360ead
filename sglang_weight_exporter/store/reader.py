# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The reading side: which ranks live on this host, and what they say of themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from sglang_weight_exporter.records import (
    SCHEMA_VERSION,
    Endpoint,
    Event,
    Record,
    Snapshot,
    WeightTable,
)
from sglang_weight_exporter.store.locks import is_held
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

AnyRecord = TypeVar("AnyRecord", bound=Record)


class UnreadableError(Exception):
    """A file is damaged or of another version; the message names it and says what to do."""


class _Version(msgspec.Struct):
    schema: int


def decode(content: bytes, kind: type[AnyRecord], path: Path) -> AnyRecord:
    """A record from a file's content. Raises :class:`UnreadableError`."""
    try:
        version = msgspec.msgpack.decode(content, type=_Version).schema
        if version != SCHEMA_VERSION:
            raise UnreadableError(
                f"{path} was written by another version of sglang-weight-exporter (schema "
                f"{version}, this one reads {SCHEMA_VERSION}), so its rank is left out. Install "
                f"the same version beside SGLang and where the exporter process runs."
            )
        return msgspec.msgpack.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise UnreadableError(
            f"{path} is damaged ({error}), so it is left out. "
            f"The next update of its rank writes it anew."
        ) from error


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a file. Raises ``OSError`` and :class:`UnreadableError`."""
    return decode(path.read_bytes(), kind, path)


@dataclass(frozen=True)
class RankDirectory:
    """One rank's directory, as found. Reading from it may fail at any moment: ranks die."""

    path: Path

    @property
    def rank_id(self) -> str:
        return self.path.name

    def is_alive(self) -> bool:
        return is_held(self.path / "lock")

    def snapshot(self) -> Snapshot:
        return read(self.path / "snapshot", Snapshot)

    def table(self, file: str) -> WeightTable:
        return read(self.path / file, WeightTable)

    def events(self) -> list[Path]:
        """Files of waiting events, oldest first."""
        return sorted((self.path / "events").glob("*.event"))

    def event(self, path: Path) -> Event:
        return read(path, Event)

    def remove(self) -> None:
        """Remove what a dead rank left."""
        shutil.rmtree(self.path, ignore_errors=True)


def rank_directories(runtime_dir: RuntimeDir) -> Iterator[RankDirectory]:
    """Every rank's directory, alive or dead, in a stable order."""
    try:
        paths = sorted(runtime_dir.ranks.iterdir())
    except FileNotFoundError:
        return
    for path in paths:
        if not path.name.startswith("."):
            yield RankDirectory(path)


def read_endpoint(runtime_dir: RuntimeDir) -> Endpoint | None:
    """What the exporter process says of itself, if one is alive."""
    if not is_held(runtime_dir.exporter_lock):
        return None
    try:
        return msgspec.json.decode(runtime_dir.exporter_file.read_bytes(), type=Endpoint)
    except (OSError, msgspec.DecodeError):
        return None


@dataclass
class SnapshotReader:
    """Snapshots of the ranks that are alive, read again only when a file was replaced."""

    runtime_dir: RuntimeDir
    #: Called with the sentence for each file that could not be read, once for each version of it.
    on_unreadable: Callable[[str], None] = lambda sentence: None
    unreadable: int = 0
    _cache: dict[Path, tuple[tuple[int, int, int], Snapshot | None]] = field(default_factory=dict)

    def read(self) -> list[tuple[RankDirectory, Snapshot]]:
        """Live ranks with a snapshot, in a stable order. Never raises for a single rank."""
        found, seen = [], set()
        for directory in rank_directories(self.runtime_dir):
            try:
                if not directory.is_alive():
                    continue
                seen.add(directory.path)
                snapshot = self._snapshot(directory)
            except FileNotFoundError:
                continue  # Not written yet, or the rank has just gone.
            except OSError as error:
                self.unreadable += 1
                self.on_unreadable(f"{directory.path} cannot be read ({error.strerror}).")
                continue
            if snapshot is not None:
                found.append((directory, snapshot))
        for path in self._cache.keys() - seen:
            del self._cache[path]
        return found

    def _snapshot(self, directory: RankDirectory) -> Snapshot | None:
        path = directory.path / "snapshot"
        status = path.stat()
        key = (status.st_ino, status.st_mtime_ns, status.st_size)
        cached = self._cache.get(directory.path)
        if cached is not None and cached[0] == key:
            return cached[1]
        snapshot: Snapshot | None = None
        try:
            snapshot = directory.snapshot()
        except UnreadableError as error:
            self.unreadable += 1
            self.on_unreadable(str(error))
        self._cache[directory.path] = (key, snapshot)
        return snapshot
