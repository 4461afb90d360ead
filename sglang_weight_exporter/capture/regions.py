# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Contiguous runs of memory, merged inside one allocation and never across two.

Two allocations may lie side by side and still be two: an RDMA registration that spans both fails
when its key is looked up. Where one ends is the allocator's knowledge, not the addresses'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_weight_exporter.capture.allocations import Addresses


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
