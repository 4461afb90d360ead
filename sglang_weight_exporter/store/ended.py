# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ranks left that ended in the middle of something: their directories, set aside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_weight_exporter.records.black_box import BlackBox, Doing
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.decoding import UnreadableError, read
from sglang_weight_exporter.store.files import Directory
from sglang_weight_exporter.store.rank import BLACK_BOX
from sglang_weight_exporter.store.reader import RankDirectory, rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Of how many ranks it is kept, and how much of all of them together: the newest.
KEPT_RANKS = 64
KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class EndedRank:
    """A rank that has ended, and what it has left; at least one of the two is there."""

    directory: RankDirectory
    box: BlackBox | None
    snapshot: Snapshot | None
    #: When it wrote last.
    at: float
    #: It goes on, after errors that somebody caught.
    alive: bool = False

    @property
    def known(self) -> BlackBox | Snapshot:
        """Which has the engine and the ranks."""
        known = self.box or self.snapshot
        assert known is not None
        return known

    @property
    def doing(self) -> Doing:
        """What it was in the middle of, by itself or by what it wrote last."""
        if self.box is not None and self.box.crash is not None:
            return self.box.crash.doing
        if self.snapshot is None:
            return Doing()
        return Doing(
            updates={
                role.name: role.in_progress
                for role in self.snapshot.roles
                if role.in_progress is not None and not role.in_progress.is_over(self.at)
            },
            operations=self.snapshot.running,
        )

    def __str__(self) -> str:
        """In one line, for a log."""
        engine, doing = self.known.engine.name, str(self.doing)
        crash = None if self.box is None else self.box.crash
        if crash is not None:
            reason = f"{crash.error}: {crash.message.splitlines()[0] if crash.message else ''}"
        elif self.box is not None and self.box.errors:
            reason = f"it said nothing; before that, {self.box.errors[-1]}"
        else:
            reason = "it said nothing"
        return (
            f"The rank {self.known.ranks} of engine {engine} (process {self.known.pid}) has ended"
            f"{' in the middle of ' + doing if doing else ''}: {reason}"
        )


def read_black_box(directory: RankDirectory) -> BlackBox | None:
    """``None``: there is none, or it cannot be read."""
    try:
        return read(directory.path / BLACK_BOX, BlackBox)
    except (OSError, UnreadableError):
        return None


def read_ended(directory: RankDirectory) -> EndedRank | None:
    """What a rank has left; ``None`` where that is nothing of note: it was not in the middle of
    anything."""
    box, snapshot = read_black_box(directory), None
    with contextlib.suppress(OSError, UnreadableError):
        snapshot = directory.snapshot()
    if box is None and snapshot is None:
        return None
    ended = EndedRank(directory, box, snapshot, _written_at(directory))
    return ended if box is not None or str(ended.doing) else None


def _written_at(directory: RankDirectory) -> float:
    times = [0.0]
    for name in ("snapshot", "progress", BLACK_BOX):
        with contextlib.suppress(OSError):
            times.append((directory.path / name).lstat().st_mtime)
    return max(times)


def ended_ranks(runtime_dir: RuntimeDir) -> list[EndedRank]:
    """All that is known of, the newest first: those that were kept, and those that nobody has yet
    looked after."""
    found = [
        ended
        for directory in _directories(runtime_dir)
        if (ended := read_ended(directory)) is not None
    ]
    return sorted(found, key=lambda ended: -ended.at)


def _directories(runtime_dir: RuntimeDir) -> Iterator[RankDirectory]:
    for directory in rank_directories(runtime_dir):
        with contextlib.suppress(OSError):
            if not directory.is_alive():
                yield directory
    yield from _kept(runtime_dir)


def _kept(runtime_dir: RuntimeDir) -> list[RankDirectory]:
    try:
        with os.scandir(runtime_dir.ended) as entries:
            return [
                RankDirectory(Path(entry))
                for entry in entries
                if entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def keep(runtime_dir: RuntimeDir, directory: RankDirectory) -> None:
    """Move a dead rank's directory aside; the oldest of those that were make room. Raises
    ``OSError``."""
    with Directory.open(runtime_dir.path) as root:
        root.open_directory(runtime_dir.ended.name, make=True).close()
    directory.move(runtime_dir.ended)
    newest = sorted(_kept(runtime_dir), key=lambda each: -_written_at(each))
    total = 0
    with Directory.open(runtime_dir.ended) as ended:
        for number, each in enumerate(newest, 1):
            total += _size(each)
            if number > KEPT_RANKS or total > KEPT_BYTES:
                ended.remove_all(each.rank_id)


def _size(directory: RankDirectory) -> int:
    total = 0
    for folder, _, files in os.walk(directory.path):
        for file in files:
            with contextlib.suppress(OSError):
                total += (Path(folder) / file).lstat().st_size
    return total
