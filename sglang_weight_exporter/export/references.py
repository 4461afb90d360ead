# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of ranks beside references: their keys, how they compare, and who leaves the first.

The engine has no part in it: files of checkpoints and of a shared directory are read here, which
may take as long as the network wants.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglang_weight_exporter.export.following import Finding, TableFollower, is_left_by
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.records.engine import Device
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.verification.checkpoint import CheckpointError
from sglang_weight_exporter.verification.comparison import Comparison, compare
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
    """What a loader may ask of the device: its product's name; of a CPU what weights are packed
    for."""
    name = table.role.device
    device = next((each for each in table.devices if each.name == name), Device(name=name))
    packing = f" with {device.packing}" if device.packing else ""
    return device.product or name.partition(":")[0] + packing


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


class ReferenceFollower(TableFollower):
    """Compares each load of a runtime directory's ranks with its reference, or leaves the first."""

    attribute = "reference_match"
    action = "load"
    setting = "reference_dir"
    sentence = "A load is compared with no reference"
    hopeless = (CheckpointError, ManifestError)

    def __init__(
        self,
        snapshots: SnapshotReader,
        directory: Path | None,
        environ: Mapping[str, str],
        guard: Guard,
    ) -> None:
        super().__init__(snapshots, directory, guard)
        self._environ = environ

    def _compare(self, table: Table, directory: Path) -> Finding:
        if table.engine.load_settings.get("load_format") == "dummy":
            return Finding()
        manifest, references = reference_of(table, self._environ), References(directory)
        if manifest.reference is None or references.leave(manifest):
            return Finding()  # This is the first.
        there = references.find(manifest.reference.key)
        if there is None:
            return Finding()
        if there.fingerprint == manifest.fingerprint:
            return Finding(match=True)
        expected = {name: tensor.fingerprint for name, tensor in there.tensors.items()}
        held = table_fingerprints(table.columns)
        return Finding(
            match=False, differing=compare(held, expected, bytes_by_name(table)).differing
        )


def beside_reference(
    table: Table, directory: Path, environ: Mapping[str, str]
) -> tuple[Reference, tuple[str, ...]] | None:
    """The reference of what this rank has loaded, and the names of tensors that hold something
    else; ``None``: there is none. Raises CheckpointError, ManifestError and OSError."""
    if not is_left_by(table.role, "load"):
        return None
    key = own_key(table, environ)
    there = None if key is None else References(directory).find(key)
    if there is None or there.reference is None:
        return None
    return there.reference, compare_with_reference(table, there, environ).differing
