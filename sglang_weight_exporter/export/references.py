# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of ranks beside references: their keys, how they compare, and who leaves the first.

The engine has no part in it: files of checkpoints and of a shared directory are read here, which
may take as long as the network wants.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.tables import Table, TableError, TableReader
from sglang_weight_exporter.verification.checkpoint import CheckpointError
from sglang_weight_exporter.verification.comparison import Comparison, compare
from sglang_weight_exporter.verification.confirmed_loaders import host_device_kind
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestError,
    Reference,
    ReferenceKey,
    Shard,
    manifest_of_table,
)
from sglang_weight_exporter.verification.reference import (
    References,
    checkpoint_identity,
    find_checkpoint,
    key_of,
)
from sglang_weight_exporter.weight_table import table_fingerprints

logger = logging.getLogger("sglang_weight_exporter")

_LOOK_EVERY = 1.0
#: How long the span of a load waits for the reference's files.
_SPAN_WAITS_SECONDS = 30.0


@dataclass(frozen=True)
class Finding:
    """A load beside its reference."""

    #: ``None``: there was none, or it could not be read.
    match: bool | None = None
    #: Names of tensors that hold other bytes, in their order.
    differing: tuple[str, ...] = ()


def bytes_by_name(table: Table) -> dict[str, int]:
    """Of memory that has several names, with the first of them."""
    counted: set[tuple[int, int]] = set()
    found = {}
    for row in table.rows():
        place = row.data_ptr, row.nbytes
        found[row.name] = 0 if place in counted else row.nbytes
        counted.add(place)
    return found


def device_kind(table: Table) -> str:
    """What a loader may ask of the device: its product's name, or what a CPU can do."""
    product = next((each.product for each in table.devices if each.name == table.role.device), "")
    return product or host_device_kind(table.role.device)


def own_key(
    table: Table, environ: Mapping[str, str], *, all_bytes: bool = False
) -> ReferenceKey | None:
    """What decides the bytes that this rank holds; ``None`` where its checkpoint is not found.
    Raises CheckpointError."""
    model_path = table.role.model_path or table.engine.model_path
    revision = table.engine.load_settings.get("revision", "")
    checkpoint = find_checkpoint(model_path, revision, environ)
    if checkpoint is None:
        return None
    return key_of(
        table.engine,
        table.ranks,
        table.role,
        table.columns,
        checkpoint=checkpoint_identity(checkpoint, all_bytes=all_bytes),
        device=device_kind(table),
    )


def reference_of(table: Table, environ: Mapping[str, str], *, all_bytes: bool = False) -> Manifest:
    """Raises CheckpointError where its checkpoint cannot be distinguished from others."""
    key = own_key(table, environ, all_bytes=all_bytes)
    model_path = table.role.model_path or table.engine.model_path
    if key is None:
        raise CheckpointError(
            f"The files of {model_path} are not found on this host, so it cannot be said which "
            "checkpoint this would be a reference of."
        )
    return manifest_of_table(
        table.columns,
        weight_version=table.weight_version,
        shard=Shard.of(table.engine, table.ranks, table.role.name),
        reference=Reference(
            key=key, model_path=model_path, host=socket.gethostname(), made_at=time.time()
        ),
    )


def compare_with_reference(
    table: Table, manifest: Manifest, environ: Mapping[str, str]
) -> Comparison:
    """Other bytes are a difference where all but the checkpoint is as it was for the reference.
    Raises CheckpointError."""
    expected = {name: tensor.fingerprint for name, tensor in manifest.tensors.items()}
    served = table_fingerprints(table.columns)
    key = None if manifest.reference is None else manifest.reference.key
    own = own_key(table, environ)
    doubt = "the reference is of another release, device or configuration, or of another place"
    same = key and own and msgspec.structs.replace(own, checkpoint=key.checkpoint) == key
    doubts = {} if same else dict.fromkeys(expected, doubt)
    return compare(served, expected, bytes_by_name(table), doubted=doubts)


class ReferenceFollower:
    """Compares each load of a runtime directory's ranks with its reference, or leaves the first.

    In a thread of its own, that nobody waits for.
    """

    def __init__(
        self,
        snapshots: SnapshotReader,
        directory: Path | None,
        environ: Mapping[str, str],
        guard: Guard,
    ) -> None:
        self._snapshots = snapshots
        self._references = None if directory is None else References(directory)
        self._environ = environ
        self._guard = guard
        #: Rank and role → the load that was compared, and what came of it.
        self._found: dict[tuple[str, str], tuple[object, Finding]] = {}
        self._logged: set[str] = set()

    def start(self) -> None:
        if self._references is not None:
            threading.Thread(target=self._run, name="references", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._guard.step("Comparing loads with references"):
                self.follow()
            time.sleep(_LOOK_EVERY)

    def follow(self) -> None:
        """Never raises for a single rank."""
        living = set()
        for rank, snapshot in self._snapshots.read():
            for role in snapshot.roles:
                living.add((snapshot.rank_id, role.name))
                self._follow(rank, snapshot, role)
        self._found = {key: found for key, found in self._found.items() if key in living}

    def annotated(self, snapshot: Snapshot) -> Snapshot:
        """With what was found, as long as the weights are what the load left."""
        if self._references is None:
            return snapshot
        roles = []
        for role in snapshot.roles:
            load, finding = self._found.get((snapshot.rank_id, role.name), (None, Finding()))
            current = load is not None and load == _load(role)
            match = finding.match if current else None
            roles.append(msgspec.structs.replace(role, reference_match=match))
        return msgspec.structs.replace(snapshot, roles=tuple(roles))

    def of_event(self, event: Event) -> Finding | None:
        """What came of comparing this load; ``None``: nothing yet, and it is soon enough to ask
        again. An update is compared with nothing."""
        update, table = event.update, event.table
        if self._references is None or table is None or not table.fingerprint:
            return Finding()
        if update.action != "load" or not update.succeeded:
            return Finding()
        load, finding = self._found.get((event.rank_id, event.role), (None, Finding()))
        if load == (update.sequence, table.sha256, table.fingerprint):
            return finding
        return Finding() if time.time() > update.ended_at + _SPAN_WAITS_SECONDS else None

    def _follow(self, rank: RankDirectory, snapshot: Snapshot, role: Role) -> None:
        key, load = (snapshot.rank_id, role.name), _load(role)
        if load is None or self._found.get(key, (None,))[0] == load:
            return
        try:
            table = TableReader(rank, role.name, snapshot.engine, snapshot.ranks).read()
            if _load(table.role) == load:
                self._found[key] = (load, self._compare(table))
        except TableError:
            return  # In the middle of an update: it is read again soon.
        except (CheckpointError, ManifestError) as error:
            self._found[key] = (load, Finding())
            self._log(str(error))
        except OSError as error:
            self._log(f"{error}; it is tried again every second")

    def _compare(self, table: Table) -> Finding:
        assert self._references is not None  # `start` and `follow` are for a directory.
        if table.engine.load_settings.get("load_format") == "dummy":
            return Finding()
        manifest = reference_of(table, self._environ)
        if manifest.reference is None or self._references.leave(manifest):
            return Finding()  # This is the first.
        there = self._references.find(manifest.reference.key)
        if there is None:
            return Finding()
        if there.fingerprint == manifest.fingerprint:
            return Finding(match=True)
        expected = {name: tensor.fingerprint for name, tensor in there.tensors.items()}
        held = table_fingerprints(table.columns)
        return Finding(
            match=False, differing=compare(held, expected, bytes_by_name(table)).differing
        )

    def _log(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("A load is compared with no reference (%s).", sentence)


def beside_reference(
    table: Table, directory: Path, environ: Mapping[str, str]
) -> tuple[Reference, tuple[str, ...]] | None:
    """The reference of what this rank has loaded, and the names of tensors that hold something
    else; ``None``: there is none. Raises CheckpointError, ManifestError and OSError."""
    if _load(table.role) is None:
        return None
    key = own_key(table, environ)
    there = None if key is None else References(directory).find(key)
    if there is None or there.reference is None:
        return None
    return there.reference, compare_with_reference(table, there, environ).differing


def _load(role: Role) -> object:
    """What distinguishes a load from another one; ``None`` where the weights are not what a load
    left, or are not known."""
    last, table = role.last_update, role.table
    if last is None or last.action != "load" or not last.succeeded or role.in_progress is not None:
        return None
    if table is None or not table.fingerprint or table.modified:
        return None
    return last.sequence, table.sha256, table.fingerprint
