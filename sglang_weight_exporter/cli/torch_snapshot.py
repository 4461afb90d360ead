# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots that torch has pickled, or what pretends to be one: read without running anything, and
in the memory that a file of that size may take."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

#: A pickle of a history of a million allocations, and no more than a machine has.
LARGEST_PICKLE = 2**32
#: Bytes of memory for a byte of the file: a block's dictionary takes ten for one, and it is
#: written twice.
_MEMORY_FOR_A_BYTE = 64
#: And for the smallest of them.
_ROOM = 2**28

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: torch's DeviceIndex is a signed byte.
_Device = Annotated[int, msgspec.Meta(ge=0, le=127)]


class _Block(msgspec.Struct):
    size: _Bytes
    state: str
    requested_size: _Bytes = 0
    frames: tuple[Any, ...] = ()


class _Segment(msgspec.Struct):
    address: _Bytes
    total_size: _Bytes
    blocks: list[_Block]
    device: _Device = 0
    segment_pool_id: tuple[int, int] = (0, 0)


class _Event(msgspec.Struct):
    """``addr`` is missing where memory ran out (``oom``), and of no interest there."""

    action: str
    addr: _Bytes = 0
    frames: tuple[Any, ...] = ()


class SnapshotError(Exception):
    """What is wrong with a snapshot, as a sentence."""


@contextlib.contextmanager
def bounded_memory(file: Path) -> Iterator[None]:
    """The block may take some memory for each byte of the file. Raises :class:`SnapshotError` in
    place of what a pickle can make of it that asks for more. Raises ``OSError``."""
    kept, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _ROOM + _MEMORY_FOR_A_BYTE * file.stat().st_size
    if kept != resource.RLIM_INFINITY:
        limit = min(limit, kept)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError as error:
        raise SnapshotError(
            f"{file} asks for more memory than a snapshot of its size needs, so it is refused."
        ) from error
    except RecursionError as error:
        raise SnapshotError(
            f"{file} is nested more deeply than any snapshot, so it is refused."
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (kept, hard))


class _Builtins(pickle.Unpickler):
    """A snapshot is dictionaries, lists, numbers and text. What a pickle could run besides is
    refused: the file may have come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        raise SnapshotError(
            f"It asks for {module}.{name}, which no snapshot of torch needs, so nothing of it was "
            "read."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise SnapshotError("It refers to objects outside of itself, so nothing of it was read.")


def read_snapshot(file: Path) -> dict[str, Any]:
    """What torch has pickled: ``segments``, and whatever else was there. Raises ``OSError`` and
    :class:`SnapshotError`."""
    size = file.stat().st_size
    if size > LARGEST_PICKLE:
        raise SnapshotError(f"{file} has {size:,} bytes, which is no snapshot of torch.")
    try:
        content = _Builtins(io.BytesIO(file.read_bytes())).load()
        if isinstance(content, list):  # Of torch.cuda.memory_snapshot().
            content = {"segments": content}
        if not isinstance(content, dict):
            raise SnapshotError("It holds no snapshot of torch.")
        checked_segments(content.get("segments"))
        _check(content.get("device_traces", []), list[list[_Event]], "history is")
    except SnapshotError as error:
        raise SnapshotError(f"{file} is refused. {error}") from error
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise SnapshotError(f"{file} is no pickle that could be read ({error}).") from error
    return content


def decoded_segments(content: bytes) -> list[dict[str, Any]]:
    """What a rank has left of ``torch.cuda.memory_snapshot()``, as JSON. Raises
    :class:`SnapshotError`."""
    try:
        segments = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SnapshotError(f"What a rank has left of its memory is damaged ({error}).") from error
    return checked_segments(segments)


def checked_segments(segments: Any) -> list[dict[str, Any]]:
    """The same, with each block's address. Raises :class:`SnapshotError`."""
    _check(segments, list[_Segment], "segments are")
    blocks = [block for segment in segments for block in segment["blocks"]]
    for parts in (segments, blocks):
        if len({id(part) for part in parts}) != len(parts):
            raise SnapshotError("A segment or a block is in it twice.")
    for segment in segments:
        address, end = segment["address"], segment["address"] + segment["total_size"]
        for block in segment["blocks"]:
            block["address"] = address
            address += block["size"]
        if address != end:
            raise SnapshotError("The blocks of a segment do not fill it.")
    checked: list[dict[str, Any]] = segments
    return checked


def _check(content: Any, kind: Any, what: str) -> None:
    try:
        msgspec.convert(content, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise SnapshotError(f"Its {what} not as torch has them ({error}).") from error
