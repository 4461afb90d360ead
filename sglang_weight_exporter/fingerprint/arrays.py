# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of bytes in the host's memory, by NumPy: of files, of names, of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from sglang_weight_exporter.fingerprint.definition import (
    CHUNK_BYTES,
    LANES,
    STEPS,
    Chunks,
    blocks,
    chunk_sums,
    fill,
    lane_starts,
    tensor_halves,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: NumPy's block: words and states together stay in a core's cache of second level.
_BLOCK_CHUNKS = 32


class Bytes(Protocol):
    """A one-dimensional ``uint8`` array of any alignment, or what gives slices of one."""

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, piece: slice, /) -> NDArray[np.uint8]: ...


def of_arrays(arrays: Sequence[Bytes]) -> NDArray[np.uint64]:
    """Fingerprints of the bytes of each: uint64 ``[arrays, 2]``. At most 2 MiB are asked for at a
    time."""
    import numpy as np

    chunks = Chunks.of([array.nbytes for array in arrays])
    sums = np.zeros((2, len(chunks.number)), dtype=np.int64)
    starts = [np.array(lane_starts(half), dtype=np.int64) for half in range(2)]
    space = np.empty(_BLOCK_CHUNKS * CHUNK_BYTES, dtype=np.uint8)
    for block in blocks(chunks.nbytes.tolist(), _BLOCK_CHUNKS):
        rows, where = fill(block, chunks, space, lambda tensor: arrays[tensor])
        words = space.view("<i8")[: len(rows) * STEPS * LANES].reshape(-1, STEPS, LANES)
        for half in range(2):
            sums[half, where] = chunk_sums(words, rows, starts[half], half)
    halves = [
        tensor_halves(
            sums[half], chunks.number.copy(), chunks.first, chunks.after, chunks.nbytes, half
        )
        for half in range(2)
    ]
    return np.stack(halves, axis=1).view(np.uint64)


def of_bytes(data: bytes | bytearray | memoryview) -> str:
    """The fingerprint of some bytes, as 32 hexadecimal digits."""
    import numpy as np

    return texts(of_arrays([np.frombuffer(data, dtype=np.uint8)]))[0]


def texts(fingerprints: NDArray[np.uint64]) -> list[str]:
    """uint64 ``[tensors, 2]`` as 32 hexadecimal digits each: half 0, then half 1."""
    digits = fingerprints.astype(">u8").tobytes().hex()
    return [digits[at : at + 32] for at in range(0, len(digits), 32)]


def of_rank(tensors: Mapping[str, str]) -> str:
    """The fingerprint of a rank: of its tensors' names and fingerprints, in any order.

    It is that of the bytes ``NAME NUL FINGERPRINT`` (UTF-8, and 16 bytes), sorted by name and
    joined: a name holds no NUL, so no two sets of names and fingerprints share these bytes.
    """
    parts = (name.encode() + b"\0" + bytes.fromhex(tensors[name]) for name in sorted(tensors))
    return of_bytes(b"".join(parts))
