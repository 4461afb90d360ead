# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Checksums that a trainer's delta has of the tensors that it makes, beside a checkpoint.

slime's and miles' deltas (``update_weight_from_disk_delta.py``) are directories of safetensors
files whose metadata has, by name, the checksum of the tensor after the delta, and an index that
names the kind. An engine patches its copy of the checkpoint with them and loads that.
"""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError

INDEX = "model.safetensors.index.json"
#: Bytes that are read at a time, and the most that a header may have.
_PIECE = 16 << 20
_MOST = 100_000_000


class _Hash(Protocol):
    def update(self, data: Any) -> Any: ...

    def hexdigest(self) -> str: ...


class _Adler32:
    """With eight digits, as slime writes it."""

    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _of_package(package: str, name: str) -> Callable[[], _Hash]:
    def make() -> _Hash:
        made: _Hash = getattr(importlib.import_module(package), name)()
        return made

    return make


#: By the name that deltas have: the package that it needs, and what takes it.
KINDS: dict[str, tuple[str, Callable[[], _Hash]]] = {
    "adler32": ("zlib", _Adler32),
    "xxh3-128": ("xxhash", _of_package("xxhash", "xxh3_128")),
    "blake3": ("blake3", _of_package("blake3", "blake3")),
}


class _Metadata(msgspec.Struct):
    version: str = ""
    checksum_format: str = ""


class _Index(msgspec.Struct):
    metadata: _Metadata
    weight_map: dict[str, str]


class _Header(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """What a delta says of the tensors that it changes."""

    version: str
    kind: str
    #: Name → checksum of the tensor's bytes after the delta.
    checksums: dict[str, str]

    @property
    def obstacle(self) -> str:
        """Why checksums of this kind cannot be computed here; empty where they can."""
        if self.kind not in KINDS:
            return f"its checksums are of the kind {self.kind or '(none)'}, which is not known"
        package = KINDS[self.kind][0]
        if importlib.util.find_spec(package) is None:
            return f"its checksums are {self.kind}, and {package} is not installed here"
        return ""

    def differing(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Names of tensors that the checkpoint lacks, or has with other bytes than the delta made.
        Raises CheckpointError."""
        found = tuple(
            name
            for name, expected in self.checksums.items()
            if name not in checkpoint.tensors or self._of(checkpoint, name) != expected
        )
        checkpoint.check_unwritten()
        return found

    def _of(self, checkpoint: Checkpoint, name: str) -> str:
        content, taken = checkpoint.bytes_of(name), KINDS[self.kind][1]()
        for at in range(0, content.nbytes, _PIECE):
            taken.update(content[at : at + _PIECE])
        return taken.hexdigest()


def read_delta(directory: Path) -> Delta:
    """Raises CheckpointError."""
    try:
        index = msgspec.json.decode((directory / INDEX).read_bytes(), type=_Index)
        checksums: dict[str, str] = {}
        for name in sorted(set(index.weight_map.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{directory / INDEX} names {name}, which is not beside it.")
            checksums |= _metadata(directory / name)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{directory} is no delta of a checkpoint: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error
    held = {name: checksums[name] for name in index.weight_map if name in checksums}
    return Delta(index.metadata.version, index.metadata.checksum_format, held)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST:
            raise CheckpointError(f"{path} is no safetensors file, or it was cut off.")
        return msgspec.json.decode(file.read(length), type=_Header).metadata
