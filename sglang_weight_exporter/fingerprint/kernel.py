# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 -- Triton writes constants of a kernel in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The fingerprint as Triton kernels: one launch for all tensors of a device, over a table of
their addresses. Importing this imports Triton.

A program takes a chunk. Its lanes are spread over the threads, two neighbours a thread, so that a
row is read in 16 bytes a thread; the states stay in registers, and a second small launch adds the
chunks up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_weight_exporter.fingerprint import definition

_LANES = tl.constexpr(definition.LANES)
_STEPS = tl.constexpr(definition.STEPS)
_P0 = tl.constexpr(definition.MULTIPLIERS[0])
_P1 = tl.constexpr(definition.MULTIPLIERS[1])
_FOLD0 = tl.constexpr(definition.FOLDS[0])
_FOLD1 = tl.constexpr(definition.FOLDS[1])
_SEED0 = tl.constexpr(definition.SEEDS[0])
_SEED1 = tl.constexpr(definition.SEEDS[1])
_LANE_KEY = tl.constexpr(definition.LANE_KEY)
_MIX_SHIFT0 = tl.constexpr(definition.MIX[0][0])
_MIX_SHIFT1 = tl.constexpr(definition.MIX[1][0])
_MIX_LAST = tl.constexpr(definition.MIX_LAST)
_MIX0 = tl.constexpr(definition.MIX[0][1])
_MIX1 = tl.constexpr(definition.MIX[1][1])

#: Threads of a program over 32, for the chunks' kernel and for the tensors'.
CHUNK_WARPS = 4
TENSOR_WARPS = 4
#: Chunks that the tensors' kernel adds up at a time.
TENSOR_BLOCK = 256


@triton.jit
def _mix(z):
    z ^= z >> _MIX_SHIFT0
    z *= _MIX0
    z ^= z >> _MIX_SHIFT1
    z *= _MIX1
    z ^= z >> _MIX_LAST
    return z


@triton.jit
def _words(base, word, nbytes, ALIGNED: tl.constexpr):
    """Words of a tensor's end, or of a tensor at an odd address; zeros beyond its bytes."""
    at = word * 8
    single = base.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        whole = at + 8 <= nbytes
        words = tl.load(base.to(tl.pointer_type(tl.uint64)) + word, mask=whole, other=0)
        bytewise = (at < nbytes) & (at + 8 > nbytes)  # One word a tensor at most.
    else:
        words = tl.zeros_like(word).to(tl.uint64)
        bytewise = at < nbytes
    for byte in tl.static_range(8):
        here = bytewise & (at + byte < nbytes)
        value = tl.load(single + at + byte, mask=here, other=0)
        words |= value.to(tl.uint64) << (8 * byte)
    return words


# One variant whatever the number of chunks: nothing is compiled at a later update.
@triton.jit(do_not_specialize=["chunks"])
def chunk_kernel(
    data_ptr,  # int64 [tensors]: addresses
    nbytes_ptr,  # int64 [tensors]
    first_ptr,  # int32 [tensors]: a tensor's first chunk
    tensor_ptr,  # int32 [chunks]: a chunk's tensor
    sums_ptr,  # int64 [2, chunks]: what comes out
    chunks,
    HASH: tl.constexpr,  # False: only reads, to measure against
):
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    base = tl.load(data_ptr + tensor)
    nbytes = tl.load(nbytes_ptr + tensor)
    start = (chunk - tl.load(first_ptr + tensor)).to(tl.int64) * (_LANES * _STEPS)
    lane = tl.arange(0, _LANES)
    if HASH:
        key = lane.to(tl.uint64) * _LANE_KEY
        a = _mix(key + _SEED0)
        b = _mix(key + _SEED1)
    else:
        a = tl.zeros([_LANES], tl.uint64)
        b = a
    if ((start + _LANES * _STEPS) * 8 <= nbytes) & (base % 16 == 0):
        row = tl.multiple_of((base + start * 8).to(tl.pointer_type(tl.uint64)), 16)
        for step in tl.static_range(_STEPS):
            words = tl.load(row + step * _LANES + lane, eviction_policy="evict_first")
            if HASH:
                a = (a ^ words) * _P0
                a ^= a >> _FOLD0
                b = (b ^ words) * _P1
                b ^= b >> _FOLD1
            else:
                a += words
    else:
        rows = tl.minimum((nbytes - start * 8 + _LANES * 8 - 1) // (_LANES * 8), _STEPS)
        for step in range(rows):
            word = start + step * _LANES + lane
            if base % 8 == 0:
                words = _words(base, word, nbytes, True)
            else:
                words = _words(base, word, nbytes, False)
            if HASH:
                a = (a ^ words) * _P0
                a ^= a >> _FOLD0
                b = (b ^ words) * _P1
                b ^= b >> _FOLD1
            else:
                a += words
    if HASH:
        a = _mix(a)
        b = _mix(b)
        tl.store(sums_ptr + chunks + chunk, tl.sum(b, 0).to(tl.int64, bitcast=True))
    tl.store(sums_ptr + chunk, tl.sum(a, 0).to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["chunks"])
def tensor_kernel(
    sums_ptr,  # int64 [2, chunks]
    nbytes_ptr,  # int64 [tensors]
    first_ptr,  # int32 [tensors]
    after_ptr,  # int32 [tensors]: one after its last chunk
    fingerprints_ptr,  # int64 [tensors, 2]: what comes out
    chunks,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    half = tl.program_id(1)
    first = tl.load(first_ptr + tensor)
    count = tl.load(after_ptr + tensor) - first
    total = tl.zeros([BLOCK], tl.uint64)
    for at in range(0, count, BLOCK):
        number = at + tl.arange(0, BLOCK)
        there = number < count
        place = sums_ptr + half.to(tl.int64) * chunks + first + number
        sums = tl.load(place, mask=there, other=0).to(tl.uint64, bitcast=True)
        total += tl.where(there, _mix(sums ^ _mix((number + 1).to(tl.uint64))), 0)
    nbytes = tl.load(nbytes_ptr + tensor).to(tl.uint64, bitcast=True)
    result = tl.sum(total, 0) + nbytes
    if half == 0:
        result += _SEED0
    else:
        result += _SEED1
    tl.store(fingerprints_ptr + tensor * 2 + half, _mix(result).to(tl.int64, bitcast=True))
