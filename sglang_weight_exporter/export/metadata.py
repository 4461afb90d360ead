# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the ``weights_metadata`` files of ranks that ask for them, so that no engine waits for it.

Writing twenty thousand tensors as JSON takes a tenth of a second and more.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.tables import TableError, TableReader
from sglang_weight_exporter.store.weights_metadata import MetadataFiles

logger = logging.getLogger("sglang_weight_exporter")


class MetadataFollower:
    """Follows the ranks of a runtime directory.

    ``directory``: where all their files go; ``None``: where each rank's own setting says.
    """

    def __init__(self, snapshots: SnapshotReader, directory: Path | None, guard: Guard) -> None:
        self._snapshots = snapshots
        self._directory = directory
        self._guard = guard
        self._files: dict[str, MetadataFiles] = {}
        #: Rank and role → what its files were made of.
        self._made: dict[tuple[str, str], object] = {}
        self._logged: set[str] = set()

    def follow(self) -> None:
        """Write what ranks say now. What goes wrong with one rank keeps
        no other's from it."""
        living = set()
        for rank, snapshot in self._snapshots.read():
            directory = self._directory or (snapshot.metadata_dir and Path(snapshot.metadata_dir))
            if directory:
                living.add(snapshot.rank_id)
                with self._guard.step(f"Keeping weights_metadata files in {str(directory)!r}"):
                    files = self._files.setdefault(snapshot.rank_id, MetadataFiles(directory))
                    for role in snapshot.roles:
                        self._follow(files, rank, snapshot, role)
        for gone in self._files.keys() - living:
            with self._guard.step(f"Removing weights_metadata files of the rank {gone!r}"):
                self._forget(gone)

    def _forget(self, rank_id: str) -> None:
        """The addresses of a rank that is gone are nobody's."""
        files = self._files.pop(rank_id)
        roles = [role for rank, role in self._made if rank == rank_id]
        for role in roles:
            del self._made[rank_id, role]
        try:
            for role in roles:
                files.remove(role)
        finally:
            files.close()

    def _follow(
        self, files: MetadataFiles, rank: RankDirectory, snapshot: Snapshot, role: Role
    ) -> None:
        key = (snapshot.rank_id, role.name)
        content = (role.table, role.last_update)
        if role.loaded_at is None or self._made.get(key) == content:
            return
        try:
            if role.table is None:
                files.remove(role.name)
            else:
                reader = TableReader(rank, role.name, snapshot.engine, snapshot.ranks)
                files.update(reader.read())
            self._made[key] = content
        except TableError:
            return  # In the middle of an update: the next pass is soon.
        except OSError as error:
            if str(error) not in self._logged:
                self._logged.add(str(error))
                logger.warning(
                    "weights_metadata files cannot be written (%s). The engine is not affected; "
                    "they are tried again every second.",
                    error,
                )
