# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors as bytes: safetensors files, sharded or not, read through memory maps.

The format (https://huggingface.co/docs/safetensors): eight bytes of the header's length, little
endian; the header, a JSON object of ``name: {dtype, shape, data_offsets}``; the tensors' bytes.
Needs neither torch nor the safetensors library; fingerprints need NumPy.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_weight_exporter import fingerprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bits of an element, and the name that torch has for the dtype.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
}
#: The library's own limit; a longer "length" is another file's first eight bytes.
_MAX_HEADER = 100_000_000
#: Tensors that one thread takes at a time: few enough to spread, enough to share blocks.
_TOGETHER_BYTES = 64 << 20


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file and says why."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are in its file."""

    path: Path
    #: As torch calls it, or as the file does where torch has no name for it.
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Checkpoint:
    """The tensors of a directory of safetensors files, or of one file."""

    def __init__(self, path: Path) -> None:
        """Reads headers only. Raises CheckpointError."""
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in _files(path):
            for name, tensor in _read_header(file):
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name} is in {self.tensors[name].path.name} and in {file.name} of "
                        f"{path}: which one is meant cannot be known. Remove one of the files, or "
                        "name a file."
                    )
                self.tensors[name] = tensor

    def config(self) -> dict[str, Any]:
        """``config.json`` beside the files, or nothing."""
        directory = self.path if self.path.is_dir() else self.path.parent
        try:
            content = json.loads((directory / "config.json").read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(f"{directory / 'config.json'} is no JSON: {error}") from error
        return content if isinstance(content, dict) else {}

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, mapped and not read."""
        import numpy as np

        tensor = self.tensors[name]
        if not tensor.nbytes:
            return np.empty(0, dtype=np.uint8)
        if tensor.path not in self._maps:
            with tensor.path.open("rb") as file:
                self._maps[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(
            self._maps[tensor.path], dtype=np.uint8, count=tensor.nbytes, offset=tensor.start
        )

    def fingerprints(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Name to fingerprint, of all tensors or of these; on all cores that there are."""
        import numpy as np

        batches = _batches(self.tensors, self.tensors if names is None else names)
        arrays = [[self.bytes_of(name) for name in batch] for batch in batches]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            taken = list(threads.map(fingerprint.of_arrays, arrays))
        texts = fingerprint.texts(np.concatenate([*taken, np.empty((0, 2), np.uint64)]))
        return dict(zip((name for batch in batches for name in batch), texts, strict=True))


def _batches(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for name in names:
        nbytes = tensors[name].nbytes
        if nbytes > room or not batches:
            batches.append([])
            room = _TOGETHER_BYTES
        batches[-1].append(name)
        room -= nbytes
    return batches


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Name a directory or a safetensors file.")
    index = path / "model.safetensors.index.json"
    try:
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except FileNotFoundError:
        files = sorted(path.glob("*.safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error!r}.") from error
    else:
        files = [path / name for name in named]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {', '.join(missing)}, which {path} does not have: the checkpoint "
                "is not complete. Wait for its writer, or download it again."
            )
    if not files:
        raise CheckpointError(
            f"{path} has no safetensors files. Other formats cannot be read without torch."
        )
    return files


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is no safetensors file, or it was cut off: it has {size} bytes, and its "
                f"header would have {length}."
            )
        try:
            header = json.loads(file.read(length))
            entries = [
                (
                    name,
                    StoredTensor(
                        path=path,
                        dtype=DTYPES.get(entry["dtype"], (0, entry["dtype"]))[1],
                        shape=tuple(entry["shape"]),
                        start=8 + length + entry["data_offsets"][0],
                        stop=8 + length + entry["data_offsets"][1],
                    ),
                    DTYPES.get(entry["dtype"], (0, ""))[0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"The header of {path} cannot be read: {error!r}.") from error
    for name, tensor, bits in entries:
        if tensor.stop > size or tensor.start > tensor.stop:
            raise CheckpointError(
                f"{path} ends before the bytes of {name}: it was cut off. Copy it again."
            )
        if bits and math.prod(tensor.shape) * bits != tensor.nbytes * 8:
            raise CheckpointError(
                f"The header of {path} gives {name} {tensor.nbytes} bytes, which do not fit its "
                f"shape {list(tensor.shape)} of {tensor.dtype}."
            )
        yield name, tensor
