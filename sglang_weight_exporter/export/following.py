# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Follows what loads and updates leave in the ranks of a runtime directory, to compare it with what
it should be. In a thread of its own, that nobody waits for."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.tables import Table, TableError, TableReader

#: Number of a load or update, the table's and the weights' fingerprints, and the version.
Left: TypeAlias = tuple[int, str, str, str]

logger = logging.getLogger("sglang_weight_exporter")

_POLL_SECONDS = 1.0
#: How long the span of a load or update waits for what it is compared with.
_SPAN_WAITS_SECONDS = 30.0


@dataclass(frozen=True)
class Finding:
    """What a load or an update left, beside what it should have."""

    #: ``None``: there was nothing to compare with, or it could not be read.
    match: bool | None = None
    #: Names of tensors that hold other bytes, in their order.
    differing: tuple[str, ...] = ()
    #: Of what was sent: name → the one that it was probably meant to have.
    renamed: tuple[tuple[str, str], ...] = ()


def is_left_by(role: Role, action: str) -> bool:
    """Whether the weights are what a load or an update left, and known."""
    last, table = role.last_update, role.table
    if last is None or last.action != action or not last.succeeded or role.in_progress is not None:
        return False
    return table is not None and bool(table.fingerprint) and not table.modified


class TableFollower(ABC):
    """Compares what each load or update has left, once.

    ``directory``: where what all ranks' is compared with is; ``None``: where each rank's own
    setting says. Engines of one host may be of different trainers.
    """

    #: Which attribute of a role says what came of it, what is compared, and which attribute of a
    #: rank says with what.
    attribute: str
    action: Literal["load", "update"]
    setting: Literal["reference_dir", "manifest_dir"]
    #: What is logged, with why behind it.
    sentence: str
    #: What trying again does not help against.
    hopeless: tuple[type[Exception], ...] = ()

    def __init__(self, snapshots: SnapshotReader, directory: Path | None, guard: Guard) -> None:
        self._snapshots = snapshots
        self._directory = directory
        self._guard = guard
        #: Rank and role → what was compared, and what came of it.
        self._found: dict[tuple[str, str], tuple[Left | None, Finding]] = {}
        self._living: set[tuple[str, str]] = set()
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        self._starts = False

    def start(self) -> None:
        """From now on. Whether a rank has anything to be compared with is seen when it is read."""
        self._starts = True

    def _begin(self) -> None:
        with self._lock:
            if self._starts:
                self._starts = False
                threading.Thread(target=self._run, name=self.attribute, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._guard.step(f"A pass for {self.attribute}"):
                self.follow()
            time.sleep(_POLL_SECONDS)

    def follow(self) -> None:
        """What goes wrong with one rank keeps no other from it."""
        living = set()
        for rank, snapshot in self._snapshots.read():
            directory = self._directory_of(snapshot)
            if directory is None:
                continue
            for role in snapshot.roles:
                living.add((snapshot.rank_id, role.name))
                with self._guard.step(f"Comparing weights for {self.attribute}"):
                    self._follow(rank, snapshot, role, directory)
        self._found = {key: found for key, found in self._found.items() if key in living}
        self._living = living

    def annotated(self, snapshot: Snapshot) -> Snapshot:
        """With what was found, as long as the weights are what was compared."""
        if self._directory_of(snapshot) is None:
            return snapshot
        self._begin()
        roles = []
        for role in snapshot.roles:
            left, finding = self._found.get((snapshot.rank_id, role.name), (None, Finding()))
            current = left is not None and left == self._left(role, snapshot.weight_version)
            match = finding.match if current else None
            roles.append(msgspec.structs.replace(role, **{self.attribute: match}))
        return msgspec.structs.replace(snapshot, roles=tuple(roles))

    def of_event(self, event: Event) -> Finding | None:
        """What came of comparing it; ``None``: nothing yet, and it is soon enough to ask again."""
        update, table = event.update, event.table
        if table is None or not table.fingerprint:
            return Finding()
        if update.action != self.action or not update.succeeded or not self._is_compared(event):
            return Finding()
        left, finding = self._found.get((event.rank_id, event.role), (None, Finding()))
        if left == self._left_by(update, table.sha256, table.fingerprint, update.weight_version):
            return finding
        if left is not None and left[0] > update.sequence:
            return Finding()  # The next came before anybody had looked.
        return Finding() if time.time() > update.ended_at + _SPAN_WAITS_SECONDS else None

    def _directory_of(self, snapshot: Snapshot) -> Path | None:
        own: str = getattr(snapshot, self.setting)
        return self._directory or (Path(own) if own else None)

    def _is_compared(self, event: Event) -> bool:
        return any(
            snapshot.rank_id == event.rank_id and self._directory_of(snapshot) is not None
            for _, snapshot in self._snapshots.read()
        )

    def _follow(self, rank: RankDirectory, snapshot: Snapshot, role: Role, directory: Path) -> None:
        key, left = (snapshot.rank_id, role.name), self._left(role, snapshot.weight_version)
        if left is None or self._found.get(key, (None,))[0] == left:
            return
        try:
            table = TableReader(rank, role.name, snapshot.engine, snapshot.ranks).read()
            if self._left(table.role, table.weight_version) == left:
                found = self._compare(table, directory)
                if found is not None:
                    self._found[key] = (left, found)
        except TableError:
            return  # In the middle of an update: it is read again soon.
        except self.hopeless as error:
            self._found[key] = (left, Finding())
            self._log(str(error))
        except OSError as error:
            self._log(f"{error}; it is tried again every second")

    @abstractmethod
    def _compare(self, table: Table, directory: Path) -> Finding | None:
        """With what is in the directory. ``None``: not yet."""

    def _left(self, role: Role, version: str) -> Left | None:
        """What distinguishes what was left from anything else; ``None`` where the weights are not
        what a load or an update left, or are not known."""
        last, table = role.last_update, role.table
        if last is None or table is None or not is_left_by(role, self.action):
            return None
        return self._left_by(last, table.sha256, table.fingerprint, version)

    def _left_by(self, update: Update, sha256: str, fingerprint: str, version: str) -> Left:
        return update.sequence, sha256, fingerprint, ""

    def _log(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("%s (%s).", self.sentence, sentence)


class Followers:
    """Several that follow the same ranks, as one."""

    def __init__(self, *followers: TableFollower) -> None:
        self._followers = followers

    def start(self) -> None:
        for each in self._followers:
            each.start()

    def annotated(self, snapshot: Snapshot) -> Snapshot:
        for each in self._followers:
            snapshot = each.annotated(snapshot)
        return snapshot

    def of_event(self, event: Event) -> Finding | None:
        """As a follower's: a load and an update are compared with different things."""
        found = [each.of_event(event) for each in self._followers]
        if None in found:
            return None
        return next((each for each in found if each and each.match is not None), Finding())
