# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What torch's allocator has of a device, and what SGLang sized the KV pool from."""

from __future__ import annotations

from typing import Literal, get_args

from sglang_weight_exporter.records.base import (
    SCHEMA_VERSION,
    Count,
    DeviceName,
    Record,
    Seconds,
)

#: What holds the memory that torch's allocator has of a device. Disjoint, and together all of it;
#: ``docs/memory.md`` says what each is.
MemoryPart = Literal[
    "weights",
    "derived_weights",
    "lora",
    "kv_pool",
    "kv_tables",
    "cuda_graphs",
    "other_tensors",
    "rounding",
    "fragments",
    "cached",
]
MEMORY_PARTS: tuple[MemoryPart, ...] = get_args(MemoryPart)


class DeviceMemory(Record, frozen=True, kw_only=True):
    """What a process has of one device through torch's allocator, at its last capture."""

    device: DeviceName
    at: Seconds
    #: torch's own counts: live blocks; segments, those included whose memory is given back for
    #: now; and the most of each since the process started, or since somebody reset it.
    allocated: Count
    reserved: Count
    allocated_peak: Count
    reserved_peak: Count
    #: Bytes of ``reserved`` that have no physical memory, because the memory saver released them.
    released: Count = 0
    #: Bytes of KV pools in virtual memory that is not the allocator's.
    mapped: Count = 0
    #: Bytes by what holds them; they sum to ``reserved - released + mapped``. ``None``: not known.
    parts: dict[MemoryPart, Count] | None = None
    #: Why they are not, as a sentence.
    reason: str = ""
    #: ``reserved`` before and after the last update; ``None`` before the first.
    before_update: Count | None = None
    after_update: Count | None = None
    #: The most that an update was seen to need beyond what was reserved when it began, and what of
    #: the memory was released then; ``None`` before the first.
    update_peak: Count | None = None
    update_peak_released: Count = 0
    #: What was left of ``reserved`` after the last release.
    after_release: Count | None = None

    @property
    def physical(self) -> int:
        """Bytes that the parts sum to."""
        return self.reserved - self.released + self.mapped


class MemoryOwner(Record, frozen=True, kw_only=True):
    """A piece of a GPU's memory, and what it is."""

    address: Count
    nbytes: Count
    part: MemoryPart
    #: ``model.norm.weight (target)``; of a tied tensor its first name.
    name: str


class MemoryDump(Record, frozen=True, kw_only=True):
    """What a capture has left of torch's memory, because somebody had asked for it."""

    schema: Count = SCHEMA_VERSION
    at: Seconds
    #: What ``torch.cuda.memory_snapshot()`` answered, as JSON.
    segments: bytes
    owners: tuple[MemoryOwner, ...]
    #: torch's names of the pools of CUDA graphs, where SGLang says them.
    graph_pools: tuple[tuple[Count, Count], ...] = ()


class MemoryBudget(Record, frozen=True, kw_only=True):
    """What SGLang made the size of the KV pool from; ``None``: this release does not say."""

    #: ``--mem-fraction-static``, as given or as SGLang chose it.
    fraction: Seconds | None = None
    #: Free bytes of the GPU before the weights were loaded; of a group, of the rank with the least.
    before_load: Count | None = None
    #: ``--max-total-tokens``; ``None`` also where it was not given.
    token_limit: Count | None = None
