# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors as bytes: safetensors files, sharded or not, read piece by piece.

The format (https://huggingface.co/docs/safetensors): eight bytes of the header's length, little
endian; the header, a JSON object of ``name: {dtype, shape, data_offsets}``; the tensors' bytes.
Needs neither torch nor the safetensors library; fingerprints need NumPy. Files are read and not
mapped: where another program shortens a file, a map of it ends the process that reads.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

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


#: What SGLang saves of each rank: ``ShardedStateLoader.DEFAULT_PATTERN``.
_SHARD = re.compile(r"model-rank-(\d+)-part-\d+\.safetensors")
_QUANTIZATION = ("quantization_config", "compression_config")
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file and says why."""


class _File:
    """A file that stays open: one that is put in its place later is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self._written_at = status.st_mtime_ns

    def read(self, start: int, nbytes: int) -> bytes:
        """Raises CheckpointError where they are there no more."""
        content = b""
        while len(content) < nbytes:
            more = os.pread(self._descriptor, nbytes - len(content), start + len(content))
            if not more:
                raise self._written()
            content += more
        return content

    def check_unwritten(self) -> None:
        """Raises CheckpointError where it was written since it was opened."""
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._written_at):
            raise self._written()

    def _written(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} was written while it was read, so what was read is old and new together. "
            "Wait for its writer and try again."
        )


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are in its file."""

    file: _File
    #: As torch calls it, or as the file does where torch has no name for it.
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class StoredBytes:
    """A tensor's bytes, read when a slice of them is asked for."""

    _tensor: StoredTensor

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def __getitem__(self, piece: slice) -> NDArray[np.uint8]:
        import numpy as np

        start, stop, _ = piece.indices(self.nbytes)
        content = self._tensor.file.read(self._tensor.start + start, stop - start)
        return np.frombuffer(content, dtype=np.uint8)


class Checkpoint:
    """The tensors of a directory of safetensors files, or of one file; of the files that SGLang
    would load, which looks at an index for their names alone (``_prepare_weights`` of
    ``model_loader/loader.py``)."""

    def __init__(self, path: Path, tp_rank: int | None = None) -> None:
        """Reads headers only. ``tp_rank``: whose part, where SGLang saved one of each rank
        (``sharded_state``). Raises CheckpointError."""
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        #: Tensors that are in several files, and the names of those.
        self.copies: dict[str, list[str]] = {}
        paths, places = _files(path, tp_rank)
        #: Whether the files are a rank's own.
        self.sharded = bool(paths) and _SHARD.fullmatch(paths[0].name) is not None
        self._files = list(map(_File, paths))
        for file in self._files:
            for name, tensor in _read_header(file):
                earlier = self.tensors.get(name)
                if earlier is not None:
                    copies = self.copies.setdefault(name, [earlier.file.path.name])
                    copies.append(file.path.name)
                if earlier is None or places.get(name) != earlier.file.path.name:
                    self.tensors[name] = tensor
        #: Tensors that the index names and no file has.
        self.absent = tuple(sorted(places.keys() - self.tensors.keys()))

    def config(self) -> dict[str, Any]:
        """``config.json`` beside the files, or nothing."""
        return self._json("config.json")

    def is_quantized(self) -> bool:
        """Whether it says so in any of the places where SGLang looks (``get_quant_config`` of
        ``model_loader/weight_utils.py``)."""
        config = self.config()
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        said = any(name in part for part in parts for name in _QUANTIZATION)
        return said or any(map(self._json, _QUANTIZATION_FILES))

    def _json(self, name: str) -> dict[str, Any]:
        path = (self.path if self.path.is_dir() else self.path.parent) / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no JSON: {error}.") from error
        return content if isinstance(content, dict) else {}

    def bytes_of(self, name: str) -> StoredBytes:
        return StoredBytes(self.tensors[name])

    def check_unwritten(self) -> None:
        """Raises CheckpointError where a file was written since its header was read."""
        for file in self._files:
            file.check_unwritten()

    def fingerprints(self, held: Mapping[str, fingerprint.Bytes] | None = None) -> dict[str, str]:
        """Name to fingerprint, of all tensors or of what was put together of them; on all cores
        that there are. Raises CheckpointError."""
        import numpy as np

        if held is None:
            held = {name: self.bytes_of(name) for name in self.tensors}
        batches = _batches(held)
        arrays = [[held[name] for name in batch] for batch in batches]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            taken = list(threads.map(fingerprint.of_arrays, arrays))
        self.check_unwritten()
        texts = fingerprint.texts(np.concatenate([*taken, np.empty((0, 2), np.uint64)]))
        return dict(zip((name for batch in batches for name in batch), texts, strict=True))


def _batches(held: Mapping[str, fingerprint.Bytes]) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for name, each in held.items():
        if each.nbytes > room or not batches:
            batches.append([])
            room = _TOGETHER_BYTES
        batches[-1].append(name)
        room -= each.nbytes
    return batches


def _files(path: Path, tp_rank: int | None) -> tuple[list[Path], dict[str, str]]:
    """Files in the order in which they are loaded, and each tensor's file, as an index has it."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Name a directory or a safetensors file.")
    found = sorted(path.glob("*.safetensors"))
    shards = {file: match for file in found if (match := _SHARD.fullmatch(file.name))}
    if shards:
        own = [file for file, match in shards.items() if int(match[1]) == tp_rank]
        if not own:
            whose = "no rank is named" if tp_rank is None else f"none is of rank {tp_rank}"
            raise CheckpointError(
                f"{path} has parts of ranks that SGLang saved, and {whose}. Name the file of one."
            )
        return own, {}
    places = _index(path / "model.safetensors.index.json")
    if places:
        named = {path / name for name in places.values()}
        missing = [file.name for file in sorted(named) if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"The index names {', '.join(missing)}, which {path} does not have: the "
                "checkpoint is not complete. Wait for its writer, or download it again."
            )
        # Drafts that were left out of the index: ``maybe_add_mtp_safetensors``.
        files = [*sorted(named), *(file for file in found if file.name == "mtp.safetensors")]
    else:
        makers = [file for file in found if file.name.startswith("consolidated")]
        files = [file for file in found if file not in makers] or makers
    if not files:
        raise CheckpointError(
            f"{path} has no safetensors files. Other formats cannot be read without torch."
        )
    return list(dict.fromkeys(files)), places


def _index(path: Path) -> dict[str, str]:
    try:
        places = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {error}.") from error
    for name in set(places.values()):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{path} names {name}, which leads out of its directory. Name that file itself if "
                "it is meant."
            )
    return places


def _read_header(file: _File) -> Iterator[tuple[str, StoredTensor]]:
    path, size = file.path, file.size
    length = int.from_bytes(file.read(0, min(8, size)), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{path} is no safetensors file, or it was cut off: it has {size} bytes, and its "
            f"header would have {length}."
        )
    content = file.read(8, length)
    try:
        header = json.loads(content, object_pairs_hook=_no_name_twice)
        entries = [
            (
                name.encode().decode(),  # A lone surrogate could be written to no manifest.
                StoredTensor(
                    file=file,
                    dtype=DTYPES.get(entry["dtype"], (0, entry["dtype"]))[1],
                    shape=tuple(map(_count, entry["shape"])),
                    start=8 + length + _count(entry["data_offsets"][0]),
                    stop=8 + length + _count(entry["data_offsets"][1]),
                ),
                DTYPES.get(entry["dtype"], (0, ""))[0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The header of {path} cannot be read: {error!r}.") from error
    _check_layout(file, 8 + length, [tensor for _, tensor, _ in entries])
    for name, tensor, bits in entries:
        if bits and _bits(tensor.shape, bits) != tensor.nbytes * 8:
            raise CheckpointError(
                f"The header of {path} gives {name} {tensor.nbytes} bytes, which do not fit its "
                f"shape of {len(tensor.shape)} dimensions and {tensor.dtype}."
            )
        yield name, tensor


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name comes twice")
    return members


def _check_layout(file: _File, start: int, tensors: list[StoredTensor]) -> None:
    """As the library has it: one tensor behind the other, from the header to the end of the file.
    Whoever lets them overlap has other bytes in them than others read."""
    path, size, end = file.path, file.size, start
    for tensor in sorted(tensors, key=lambda each: (each.start, each.stop)):
        if tensor.stop > size or tensor.start > tensor.stop:
            raise CheckpointError(
                f"{path} ends before the bytes of its tensors: it was cut off. Copy it again."
            )
        if tensor.start != end:
            between = "overlap" if tensor.start < end else "leave a hole"
            raise CheckpointError(
                f"The tensors of {path} {between} at byte {tensor.start}, which the safetensors "
                "library refuses. Write the file again with it."
            )
        end = tensor.stop
    if end != size:
        raise CheckpointError(
            f"{path} has {size - end} bytes behind its last tensor, which the safetensors library "
            "refuses. Copy the file, or write it, again."
        )


def _bits(shape: tuple[int, ...], bits: int) -> int:
    """Of a tensor; -1 for more than a machine can number, as the library has it."""
    for size in shape:
        bits *= size
        if bits >= 1 << 66:
            return -1
    return bits


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:40]} is no size and no place")
    return value
