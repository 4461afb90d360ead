# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Sums over a tensor's words that add up: those of its parts give that of the whole.

A fingerprint does not follow from those of parts; this does, however a tensor is cut. So what a
trainer's ranks hold and what an engine's ranks hold are compared although they are cut otherwise.
``docs/fingerprint.md`` has the definition in words. For arrays of int64 of NumPy and torch alike.

A tensor is a matrix: its last dimension is the columns, all others together the rows, and a row's
bytes are words of eight, the last one filled with zeros. A word that is zero adds nothing, so a
share that was filled up with zeros has the sum of what it was filled up from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sglang_weight_exporter.fingerprint.definition import mix

#: The definition's version, kept beside stored sums. Those of two versions never compare.
DEFINITION = 1
WORD_BYTES = 8

# Odd constants without a pattern: 2^64 over the golden ratio, primes of xxHash; pi's digits.
ROW_KEY = 0x9E3779B97F4A7C15
COLUMN_KEY = 0xC2B2AE3D27D4EB4F
SEED = 0x243F6A8885A308D3
SECOND = 0x165667B19E3779F9
SECOND_SHIFTS = (32, 29)

_MASK = (1 << 64) - 1
NOTHING = "0" * 32


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def keys(rows: Any, columns: Any) -> Any:
    """What is mixed with the word at each place: int64 of what the two broadcast to."""
    return rows * _signed(ROW_KEY) + columns * _signed(COLUMN_KEY) + _signed(SEED)


def terms(words: Any, keys_of: Any) -> tuple[Any, Any]:
    """Both halves of what each word adds. ``words``: int64; neither argument is changed."""
    there = words != 0
    first = mix(words ^ keys_of)
    right, left = SECOND_SHIFTS
    second = (first ^ ((first >> right) & ((1 << (64 - right)) - 1))) * _signed(SECOND)
    second ^= (second >> left) & ((1 << (64 - left)) - 1)
    first *= there
    second *= there
    return first, second


def text(first: int, second: int) -> str:
    """A sum as it is written: 32 hexadecimal digits."""
    return f"{first & _MASK:016x}{second & _MASK:016x}"


def added(sums: Iterable[str]) -> str:
    """The sum of parts that have no word in common."""
    first = second = 0
    for each in sums:
        first += int(each[:16], 16)
        second += int(each[16:], 16)
    return text(first, second)


def matrix(shape: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Rows, and bytes of each."""
    if not shape:
        return 1, itemsize
    return math.prod(shape[:-1]), shape[-1] * itemsize


def words_of(nbytes: int) -> int:
    """How many words a row of so many bytes has."""
    return -(-nbytes // WORD_BYTES)
