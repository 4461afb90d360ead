# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What held a GPU's memory when an allocation failed: torch's account at that moment, and whose the
memory is by the last captures. Walks over no module, and asks nothing of the device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from sglang_weight_exporter.capture.account import rest
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.records.black_box import (
    NAMED_OWNERS,
    OutOfMemory,
    Segment,
)
from sglang_weight_exporter.records.memory import MemoryOwner, MemoryPart
from sglang_weight_exporter.runners.captures import Captures
from sglang_weight_exporter.runners.memory import Memory
from sglang_weight_exporter.runners.memory_owners import largest_owners, owned_storages
from sglang_weight_exporter.runners.pools import graph_pools

#: Segments that are kept, the largest.
MOST_SEGMENTS = 4096


def describe_out_of_memory(
    captures: Captures,
    memory: Memory,
    *,
    at: float,
    device: int,
    requested: int,
    limit: int,
    free: int,
) -> tuple[OutOfMemory, tuple[Segment, ...]]:
    """The error, and what torch's allocator had of the GPU. The four numbers are torch's."""
    known = owned_storages(captures)
    read: list[Segments] = []

    def segments() -> Segments:
        read.append(Segments.of_cuda())
        return read[0]

    found = memory.now(device, segments, known, captures.pool_storages)
    name = f"cuda:{device}"
    owners = largest_owners(captures, name, NAMED_OWNERS)
    largest_free, kept = None, tuple[Segment, ...]()
    if read:
        left = rest(read[0], known, device=device, graph_pools=graph_pools())
        largest_free = left.largest_free
        owners += _others(found.parts if found is not None else None, left.largest_live)
        kept = _segments(read[0], device, left.of_graphs.tolist())
    error = OutOfMemory(
        at=at,
        device=name,
        requested=requested,
        free=free,
        limit=limit,
        total=_total(device),
        memory=found,
        largest_free=largest_free,
        owners=tuple(sorted(owners, key=lambda owner: -owner.nbytes)[:NAMED_OWNERS]),
    )
    return error, kept


def _others(
    parts: dict[MemoryPart, int] | None, largest: tuple[int, int] | None
) -> Iterable[MemoryOwner]:
    """What has no name and may be among the largest: graphs, and one tensor that is in no capture,
    such as a buffer that receives weights."""
    if parts and parts.get("cuda_graphs"):
        yield MemoryOwner(
            address=0, nbytes=parts["cuda_graphs"], part="cuda_graphs", name="CUDA graphs"
        )
    if largest is not None:
        address, nbytes = largest
        yield MemoryOwner(
            address=address,
            nbytes=nbytes,
            part="other_tensors",
            name="the largest tensor without a name",
        )


def _segments(segments: Segments, device: int, of_graphs: list[bool]) -> tuple[Segment, ...]:
    here = np.flatnonzero(segments.device == device)
    largest = here[np.argsort(segments.nbytes[here])[::-1][:MOST_SEGMENTS]]
    return tuple(
        Segment(
            address=int(segments.start[index]),
            nbytes=int(segments.nbytes[index]),
            of_graphs=of_graphs[index],
        )
        for index in largest.tolist()
    )


def _total(device: int) -> int | None:
    """Of properties that torch has read when it started."""
    if not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
