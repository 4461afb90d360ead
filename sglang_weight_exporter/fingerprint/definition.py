# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of a fingerprint, for arrays of NumPy and tensors of torch alike.

``docs/fingerprint.md`` has the definition in words, what it detects for certain and the bound for
the rest. Both libraries have arrays of int64 that wrap, with the same operators; ``kernel.py`` is
a third way to the same numbers. Imports NumPy only where it is used: a process that compares
fingerprints needs none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The definition's version, kept beside stored fingerprints. Those of two versions never compare.
DEFINITION = 2
#: Words of eight bytes side by side in a row of a chunk: each lane is a chain of its own.
LANES = 1024
#: Rows of a chunk.
STEPS = 8
ROW_BYTES = LANES * 8
CHUNK_BYTES = ROW_BYTES * STEPS

# Odd constants without a pattern: 2^64 over the golden ratio and a prime of xxHash; pi's digits;
# SplitMix64's finalizer (Steele, Lea, Flood 2014).
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
#: The halves fold differently, so that what cancels in one cannot cancel in the other: a flip of
#: bit 63 leaves a multiplication as it was, and the next word of the lane could undo the fold.
FOLDS = (32, 29)
SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
LANE_KEY = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MIX_LAST = 31

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as int64 has it."""
    return value - (1 << 64) if value >> 63 else value


def _low(bits: int) -> int:
    return (1 << bits) - 1


def mix(z: Any) -> Any:
    """SplitMix64's finalizer, a bijection, on an int64 array of NumPy or torch, in place."""
    for shift, multiplier in MIX:
        z ^= (z >> shift) & _low(64 - shift)
        z *= _signed(multiplier)
    z ^= (z >> MIX_LAST) & _low(64 - MIX_LAST)
    return z


def _mix_word(z: int) -> int:
    for shift, multiplier in MIX:
        z = (z ^ (z >> shift)) * multiplier & _MASK
    return z ^ (z >> MIX_LAST)


@functools.cache
def lane_starts(half: int) -> tuple[int, ...]:
    """Where each lane begins, as signed words: the lane's number is in it."""
    return tuple(
        _signed(_mix_word((SEEDS[half] + lane * LANE_KEY) & _MASK)) for lane in range(LANES)
    )


def chunk_sums(words: Any, rows: Sequence[int], starts: Any, half: int) -> Any:
    """One half of each chunk's sum.

    ``words``: int64 ``[chunks, STEPS, LANES]``; ``rows``: how many rows of each chunk there are,
    in descending order; ``starts``: int64 ``[LANES]``. Returns int64 ``[chunks]``.
    """
    multiplier, fold = _signed(MULTIPLIERS[half]), FOLDS[half]
    state = words[:, 0] ^ starts
    left = len(rows)
    for step in range(rows[0] if rows else 0):
        while rows[left - 1] <= step:
            left -= 1
        part = state[:left]
        if step:
            part ^= words[:left, step]
        part *= multiplier
        part ^= (part >> fold) & _low(64 - fold)
    return mix(state).sum(1)


def tensor_halves(chunks: Any, number: Any, first: Any, after: Any, nbytes: Any, half: int) -> Any:
    """One half of each tensor's fingerprint, int64 ``[tensors]``.

    ``chunks``: int64 sums of all chunks, tensor after tensor; ``number``: of each chunk in its
    tensor, from 1; ``first`` and ``after``: where each tensor's chunks begin and end; ``nbytes``:
    of each tensor. All are arrays of the same library and device; ``number`` is overwritten.
    """
    terms = mix(chunks ^ mix(number))
    sums = terms.cumsum(0)
    # Sums before each tensor: a difference of wrapped sums is the wrapped sum.
    last = sums[after - 1] * (after > 0)
    before = sums[first - 1] * (first > 0)
    return mix(last - before + nbytes + _signed(SEEDS[half]))


@dataclass(frozen=True)
class Run:
    """Chunks of one tensor that are taken together."""

    tensor: int
    #: Number of the first in its tensor, from 0.
    chunk: int
    count: int
    #: Rows of each; fewer than STEPS only in a tensor's last chunk, which is a run of its own.
    rows: int


def blocks(sizes: Iterable[int], chunks: int) -> Iterator[list[Run]]:
    """Every chunk of tensors of ``sizes`` bytes, in blocks of at most ``chunks``.

    Full chunks come first and then the tensors' ends, so that rows descend in every block.
    """
    full, ends = [], []
    for tensor, nbytes in enumerate(sizes):
        whole, rest = divmod(nbytes, CHUNK_BYTES)
        full += [
            Run(tensor, chunk, min(chunks, whole - chunk), STEPS)
            for chunk in range(0, whole, chunks)
        ]
        if rest:
            ends.append(Run(tensor, whole, 1, -(-rest // ROW_BYTES)))
    ends.sort(key=lambda run: -run.rows)
    block: list[Run] = []
    room = chunks
    for run in itertools.chain(full, ends):
        while run.count > room:
            if room:
                block.append(Run(run.tensor, run.chunk, room, run.rows))
            yield block
            run = Run(run.tensor, run.chunk + room, run.count - room, run.rows)
            block, room = [], chunks
        block.append(run)
        room -= run.count
    if block:
        yield block


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of tensors lie when they are numbered through, as NumPy int64 arrays."""

    nbytes: NDArray[np.int64]
    first: NDArray[np.int64]
    after: NDArray[np.int64]
    #: Each chunk's number in its tensor, from 1; one more at the end.
    number: NDArray[np.int64]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Chunks:
        import numpy as np

        nbytes = np.array(sizes, dtype=np.int64)
        count = -(-nbytes // CHUNK_BYTES)
        after = np.cumsum(count)
        first = after - count
        number = np.arange(1, int(count.sum()) + 1, dtype=np.int64) - np.repeat(first, count)
        # One more, so that empty tensors have a place to read when there are no others.
        return cls(nbytes, first, after, np.append(number, 0))


def fill(
    block: Sequence[Run], chunks: Chunks, space: Any, flat: Callable[[int], Any]
) -> tuple[list[int], list[int]]:
    """Copy a block's bytes into ``space`` (``uint8``, of NumPy or torch) and pad its ends.

    ``flat(tensor)``: its bytes as a one-dimensional ``uint8`` array. Returns the rows of each
    chunk in ``space``, and its place among all chunks.
    """
    rows: list[int] = []
    where: list[int] = []
    for run in block:
        start = run.chunk * CHUNK_BYTES
        stop = min(start + run.count * CHUNK_BYTES, int(chunks.nbytes[run.tensor]))
        at = len(rows) * CHUNK_BYTES
        space[at : at + stop - start] = flat(run.tensor)[start:stop]
        space[at + stop - start : at + run.count * CHUNK_BYTES] = 0
        rows += [run.rows] * run.count
        place = int(chunks.first[run.tensor]) + run.chunk
        where += range(place, place + run.count)
    return rows, where


def as_number(fingerprint: str) -> int:
    """The first 53 of its bits: what a float of Prometheus holds exactly."""
    return int(fingerprint[:16], 16) >> 11
