# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sums that add up as a Triton kernel: one launch for all shares of a device. Importing this
imports Triton.

A program takes a chunk of a share's words, a lane after the other as the fingerprint's kernel does.
Where a lane is in its matrix it divides once, and steps on from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_weight_exporter.fingerprint import definition, sums
from sglang_weight_exporter.fingerprint.kernel import _mix

_LANES = tl.constexpr(definition.LANES)
_STEPS = tl.constexpr(definition.STEPS)
_ROW_KEY = tl.constexpr(sums.ROW_KEY)
_COLUMN_KEY = tl.constexpr(sums.COLUMN_KEY)
_SEED = tl.constexpr(sums.SEED)
_SECOND = tl.constexpr(sums.SECOND)
_SHIFT0 = tl.constexpr(sums.SECOND_SHIFTS[0])
_SHIFT1 = tl.constexpr(sums.SECOND_SHIFTS[1])

#: Threads of a program over 32.
WARPS = 4


# One variant whatever the number of chunks: nothing is compiled at a later update.
@triton.jit(do_not_specialize=["chunks"])
def sum_kernel(
    data_ptr,  # int64 [shares]: addresses, multiples of 8
    words_ptr,  # int64 [shares]
    width_ptr,  # int64 [shares]: words of a row
    row_ptr,  # int64 [shares]: the first row in the logical tensor
    column_ptr,  # int64 [shares]: the first column
    first_ptr,  # int32 [shares]: a share's first chunk
    share_ptr,  # int32 [chunks]: a chunk's share
    sums_ptr,  # int64 [2, chunks]: what comes out
    chunks,
):
    chunk = tl.program_id(0)
    share = tl.load(share_ptr + chunk)
    base = tl.load(data_ptr + share).to(tl.pointer_type(tl.uint64))
    words = tl.load(words_ptr + share)
    width = tl.load(width_ptr + share)
    lane = tl.arange(0, _LANES)
    word = (chunk - tl.load(first_ptr + share)).to(tl.int64) * (_LANES * _STEPS) + lane
    row = word // width
    column = word - row * width
    step_rows = _LANES // width
    step_columns = _LANES - step_rows * width
    row += tl.load(row_ptr + share)
    left = tl.load(column_ptr + share)
    a = tl.zeros([_LANES], tl.uint64)
    b = tl.zeros([_LANES], tl.uint64)
    for _ in range(_STEPS):
        held = tl.load(base + word, mask=word < words, other=0)
        key = row.to(tl.uint64) * _ROW_KEY + (left + column).to(tl.uint64) * _COLUMN_KEY + _SEED
        first = _mix(held ^ key)
        second = (first ^ (first >> _SHIFT0)) * _SECOND
        second ^= second >> _SHIFT1
        a += tl.where(held != 0, first, 0)
        b += tl.where(held != 0, second, 0)
        word += _LANES
        column += step_columns
        over = column >= width
        column = tl.where(over, column - width, column)
        row += step_rows + over.to(tl.int64)
    tl.store(sums_ptr + chunk, tl.sum(a, 0).to(tl.int64, bitcast=True))
    tl.store(sums_ptr + chunks + chunk, tl.sum(b, 0).to(tl.int64, bitcast=True))
