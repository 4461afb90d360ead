# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What weights should be: a file of names and fingerprints, written where they come from.

A JSON object: ``schema_version``, ``definition`` (of the fingerprint), ``weight_version`` (may be
empty), ``fingerprint`` (of all tensors together), ``shard`` (which part of the model a running rank
is that it was written from, or null), ``reference`` (what decides what a rank holds after a load,
where SGLang's own loader left this, or null) and ``tensors``, name to ``fingerprint`` (32
hexadecimal digits), ``dtype`` (as torch calls it) and ``shape``.

Schema 2 has ``sent`` in place of what is in ``tensors``: sums, of which those of any rank's shares
follow, and where several processes write one manifest ``part``: which of how many this is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from sglang_weight_exporter import fingerprint as _fingerprint
from sglang_weight_exporter.fingerprint.sums import DEFINITION as SUMS_DEFINITION
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.verification.sent import JoinError, SentTensor, check, joined
from sglang_weight_exporter.weight_table import WeightTable, table_fingerprints, table_rows

SCHEMA_VERSION = 1
#: Of a manifest with sums.
SUMS_SCHEMA = 2
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
    #: What a trainer sent, and the definition of its sums.
    sent: dict[str, SentTensor] | UnsetType = UNSET
    sums: int | UnsetType = UNSET
    part: tuple[int, int] | UnsetType = UNSET

    @property
    def names(self) -> Iterable[str]:
        return self.tensors if self.sent is UNSET else self.sent


def manifest_of(
    tensors: Mapping[str, ManifestTensor] | Mapping[str, SentTensor],
    *,
    weight_version: str = "",
    shard: Shard | None = None,
    part: tuple[int, int] | None = None,
) -> Manifest:
    """The manifest of tensors by name, of a version as SGLang names it."""
    sent = {name: each for name, each in tensors.items() if isinstance(each, SentTensor)}
    whole = {name: each for name, each in tensors.items() if isinstance(each, ManifestTensor)}
    if (sent and whole) or len(sent) + len(whole) < len(tensors):
        raise ManifestError(
            "A manifest is of what sum_tensors gave, or of what fingerprint_tensors gave."
        )
    manifest = Manifest(
        tensors=dict(sorted(whole.items())),
        fingerprint=_fingerprint.of_rank(
            {name: tensor.fingerprint for name, tensor in whole.items()}
        ),
        weight_version=weight_version,
        shard=shard,
    )
    if part is None and (whole or not tensors):
        return manifest
    return msgspec.structs.replace(
        manifest,
        schema_version=SUMS_SCHEMA,
        sums=SUMS_DEFINITION,
        sent=dict(sorted(sent.items())),
        part=UNSET if part is None else part,
    )


_PART = re.compile(r"(?P<whole>.+)\.part-(?P<number>\d+)-of-(?P<parts>\d+)\.json")


def part_of(path: str | os.PathLike[str], number: int, parts: int) -> Path:
    """The file of one of so many processes that write one manifest."""
    path = Path(path)
    return path.with_name(f"{path.stem}.part-{number}-of-{parts}.json")


def whole_of(path: Path) -> Path:
    """The manifest that a file is a part of, or is."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match['whole']}.json") if match else path


def read_parts(path: Path) -> Manifest | None:
    """A manifest that is in one file or in several; ``None``: it is not there, or not all of it
    yet. Raises ManifestError and OSError."""
    if path.exists():
        return read_manifest(path)
    files = [each for each in path.parent.glob("*.json") if whole_of(each) == path]
    parts = [read_manifest(each) for each in sorted(files)]
    numbers = {each.part for each in parts if each.part is not UNSET}
    if not parts or len(numbers) < max(count for _, count in numbers):
        return None
    if len({(each.part[1], each.weight_version) for each in parts if each.part is not UNSET}) > 1:
        raise ManifestError(f"The parts of {path} are of several manifests.")
    try:
        sent = joined([each.sent for each in parts if each.sent is not UNSET])
    except JoinError as error:
        raise ManifestError(f"The parts of {path} make no manifest: {error}") from error
    return msgspec.structs.replace(parts[0], sent=sent, part=UNSET)


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
    tensors: Mapping[str, ManifestTensor] | Mapping[str, SentTensor],
    *,
    weight_version: str = "",
    shard: Shard | None = None,
    part: tuple[int, int] | None = None,
) -> Manifest:
    """Write ``tensors`` to ``path``, whole or not at all; to a pipe or device as it is. ``part``:
    which of how many processes write one manifest together; each writes a file of its own, with
    its number in the name, and whoever reads them adds them up."""
    if part is not None:
        path = part_of(path, *part)
    manifest = manifest_of(tensors, weight_version=weight_version, shard=shard, part=part)
    save(path, manifest)
    return manifest


def save(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Whole or not at all; to a pipe or device as it is."""
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
        for name, tensor in ({} if manifest.sent is UNSET else manifest.sent).items():
            check(name, tensor)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ManifestError(f"{os.fspath(path)} is no manifest: {error}") from error
    written = manifest.schema_version, manifest.definition
    known = {(SCHEMA_VERSION, _fingerprint.DEFINITION), (SUMS_SCHEMA, _fingerprint.DEFINITION)}
    if written not in known or manifest.sums not in {UNSET, SUMS_DEFINITION}:
        raise ManifestError(
            f"{os.fspath(path)} has schema {written[0]} and fingerprints of definition "
            f"{written[1]}; here are schema {SUMS_SCHEMA} and definition "
            f"{_fingerprint.DEFINITION}, which do not compare. Write it again with this version."
        )
    return manifest
