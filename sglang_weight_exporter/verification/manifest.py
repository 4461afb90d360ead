# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What weights should be: a file of names and fingerprints, written where they come from.

A JSON object: ``schema_version``, ``definition`` (of the fingerprint), ``weight_version`` (may be
empty), ``fingerprint`` (of all tensors together), ``shard`` (which part of the model a running rank
is that it was written from, or null), ``reference`` (what decides what a rank holds after a load,
where SGLang's own loader left this, or null) and ``tensors``, name to ``fingerprint`` (32
hexadecimal digits), ``dtype`` (as torch calls it) and ``shape``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglang_weight_exporter import fingerprint as _fingerprint
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.weight_table import WeightTable, table_fingerprints, table_rows

SCHEMA_VERSION = 1
#: Bytes of a file that is read: of a million tensors.
_LARGEST = 1 << 28


class ManifestError(Exception):
    """A manifest cannot be read or written; the message says why."""


class ManifestTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: what it holds, and as what."""

    fingerprint: str
    dtype: str
    shape: tuple[int, ...]


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """The place of a rank in its model, and into how many parts the model is cut. Ranks of one
    shard hold the same."""

    model_name: str
    role: str
    tp_rank: int
    pp_rank: int
    moe_ep_rank: int
    tp_size: int | None
    pp_size: int | None
    ep_size: int | None

    @classmethod
    def of(cls, engine: Engine, ranks: Ranks, role: str) -> Shard:
        return cls(
            model_name=engine.model_name,
            role=role,
            tp_rank=ranks.tp,
            pp_rank=ranks.pp,
            moe_ep_rank=ranks.moe_ep or 0,
            tp_size=engine.tp_size,
            pp_size=engine.pp_size,
            ep_size=engine.ep_size,
        )


class ReferenceKey(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which bytes a rank holds after a load."""

    #: Of its files' headers and sizes, or of all their bytes.
    checkpoint: str
    release: str
    #: Of SGLang's, as they were given: how weights are read, converted and packed.
    settings: dict[str, str]
    quantization: str
    role: str
    tp_rank: int
    pp_rank: int
    moe_ep_rank: int
    tp_size: int | None
    pp_size: int | None
    ep_size: int | None
    device: str
    #: Of names, dtypes and shapes.
    layout: str

    @property
    def is_of_all_bytes(self) -> bool:
        """Whether the checkpoint is told apart by them."""
        return self.checkpoint.startswith("bytes:")

    @property
    def digest(self) -> str:
        """Its name: 16 hexadecimal digits."""
        content = msgspec.json.encode(self, order="deterministic")
        return hashlib.sha256(content).hexdigest()[:16]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """That a manifest is what SGLang's own loader left, and of what."""

    key: ReferenceKey
    #: For whoever reads it; another path may have the same checkpoint.
    model_path: str
    host: str
    made_at: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Names and fingerprints."""

    tensors: dict[str, ManifestTensor]
    fingerprint: str
    weight_version: str = ""
    shard: Shard | None = None
    reference: Reference | None = None
    schema_version: int = SCHEMA_VERSION
    definition: int = _fingerprint.DEFINITION


def manifest_of(
    tensors: Mapping[str, ManifestTensor], *, weight_version: str = "", shard: Shard | None = None
) -> Manifest:
    """The manifest of tensors by name, of a version as SGLang names it."""
    return Manifest(
        tensors=dict(sorted(tensors.items())),
        fingerprint=_fingerprint.of_rank(
            {name: tensor.fingerprint for name, tensor in tensors.items()}
        ),
        weight_version=weight_version,
        shard=shard,
    )


def manifest_of_table(
    table: WeightTable,
    *,
    weight_version: str = "",
    shard: Shard | None = None,
    reference: Reference | None = None,
) -> Manifest:
    """Of a rank's table with fingerprints."""
    held = table_fingerprints(table)
    return Manifest(
        tensors={
            row.name: ManifestTensor(
                fingerprint=held[row.name], dtype=row.dtype, shape=row.shape_in_memory
            )
            for row in sorted(table_rows(table))
            if row.name in held
        },
        fingerprint=table.fingerprint,
        weight_version=weight_version,
        shard=shard,
        reference=reference,
    )


def write_manifest(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ManifestTensor],
    *,
    weight_version: str = "",
    shard: Shard | None = None,
) -> Manifest:
    """Write ``tensors`` to ``path``, whole or not at all; to a pipe or device as it is."""
    manifest = manifest_of(tensors, weight_version=weight_version, shard=shard)
    save(path, manifest)
    return manifest


def save(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """As ``write_manifest`` does."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(encode(manifest))
        return
    path = path.resolve()
    temporary = path.with_name(f".manifest-{os.urandom(8).hex()}")
    try:
        with temporary.open("xb") as file:
            file.write(encode(manifest))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(manifest: Manifest) -> bytes:
    """JSON, a tensor a line."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Raises ManifestError, also for a manifest that another definition wrote."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ManifestError(f"{os.fspath(path)} is longer than any manifest.")
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ManifestError(f"{os.fspath(path)} is no manifest: {error}") from error
    written = manifest.schema_version, manifest.definition
    if written != (SCHEMA_VERSION, _fingerprint.DEFINITION):
        raise ManifestError(
            f"{os.fspath(path)} has schema {written[0]} and fingerprints of definition "
            f"{written[1]}; here are schema {SCHEMA_VERSION} and definition "
            f"{_fingerprint.DEFINITION}, which do not compare. Write it again with this version."
        )
    return manifest
