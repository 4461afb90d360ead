# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Contiguous runs of memory, merged inside one allocation and never across two.

Two allocations may lie side by side and still be two: an RDMA registration that spans both fails
when its key is looked up. Where one ends is the allocator's knowledge, not the addresses'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class AllocationMap:
    """Non-overlapping allocations sorted by address; a storage in none of them is its own."""

    start: Addresses
    end: Addresses

    @classmethod
    def of_storages(cls) -> AllocationMap:
        """Each storage is an allocation, as torch's CPU allocator has it."""
        return cls(np.array([], dtype=np.uint64), np.array([], dtype=np.uint64))

    @classmethod
    def of_cuda(cls) -> AllocationMap:
        """From the caching allocator: one ``cudaMalloc`` a segment.

        An expandable segment is mapped piece by piece, so there each block stands alone. Memory
        that came from elsewhere (CUDA IPC) is in no segment.
        """
        spans: list[tuple[int, int]] = []
        for segment in _memory_segments():
            if segment.get("is_expandable"):
                address = segment["address"]
                for block in segment["blocks"]:
                    spans.append((address, address + block["size"]))
                    address += block["size"]
            else:
                spans.append((segment["address"], segment["address"] + segment["total_size"]))
        spans.sort()
        return cls(
            np.array([start for start, _ in spans], dtype=np.uint64),
            np.array([end for _, end in spans], dtype=np.uint64),
        )

    def lookup(self, storage_ptr: Addresses) -> Addresses:
        """Start of the allocation that each storage lies in."""
        if not len(self.start):
            return storage_ptr
        index = np.searchsorted(self.start, storage_ptr, side="right").astype(np.int64) - 1
        inside = (index >= 0) & (storage_ptr < self.end[index])
        return np.where(inside, self.start[index], storage_ptr)


def _memory_segments() -> list[dict[str, Any]]:
    memory_snapshot: Callable[..., list[dict[str, Any]]] = torch.cuda.memory.memory_snapshot
    try:
        # Without the history of allocations: a fraction of the time (torch 2.11 and later).
        return memory_snapshot(include_traces=False)
    except TypeError:
        return memory_snapshot()


@dataclass(frozen=True)
class Regions:
    """Regions as columns, sorted by device and address. ``device`` holds the caller's codes."""

    ptr: Addresses
    nbytes: Addresses
    device: npt.NDArray[np.uint32]


def merge_spans(
    *,
    start: Addresses,
    nbytes: Addresses,
    allocation: Addresses,
    device: npt.NDArray[np.uint32],
) -> Regions:
    """Merge spans that touch or overlap inside one allocation; empty spans belong to none."""
    some = nbytes > 0
    start, nbytes, allocation, device = start[some], nbytes[some], allocation[some], device[some]
    order = np.lexsort((start, allocation, device))
    start, allocation, device = start[order], allocation[order], device[order]
    end = start + nbytes[order]
    if not len(start):
        return Regions(start, nbytes, device)
    new_group = np.ones(len(start), dtype=bool)
    new_group[1:] = (allocation[1:] != allocation[:-1]) | (device[1:] != device[:-1])
    furthest = _running_maximum(end, new_group)
    first = new_group.copy()
    first[1:] |= start[1:] > furthest[:-1]
    heads = np.flatnonzero(first)
    return Regions(
        ptr=start[heads],
        nbytes=np.maximum.reduceat(end, heads) - start[heads],
        device=device[heads],
    )


def _running_maximum(values: Addresses, new_group: npt.NDArray[np.bool_]) -> Addresses:
    result = np.empty_like(values)
    bounds = np.append(np.flatnonzero(new_group), len(values))
    if len(bounds) == len(values) + 1:
        return values
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        np.maximum.accumulate(values[begin:end], out=result[begin:end])
    return result
