# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What torch's caching allocator has of each GPU: its segments, where one allocation ends and the
next begins, and what the memory saver has of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Segments:
    """What torch's caching allocator has, as columns: its segments, and the blocks in them."""

    start: Addresses
    nbytes: Addresses
    #: Index of the GPU in this process.
    device: npt.NDArray[np.int64]
    #: Code into ``pools``.
    pool: npt.NDArray[np.int64]
    #: Mapped piece by piece, and not one allocation.
    expandable: npt.NDArray[np.bool_]
    #: torch's names of memory pools; (0, 0) is the default one.
    pools: tuple[tuple[int, int], ...]
    #: By address inside each segment, and segment after segment.
    block_start: Addresses
    block_nbytes: Addresses
    #: What was asked for, which the allocator has rounded up.
    block_requested: Addresses
    block_active: npt.NDArray[np.bool_]
    #: Index of the segment that the block lies in.
    block_segment: npt.NDArray[np.int64]

    @cached_property
    def private(self) -> npt.NDArray[np.bool_]:
        """Whether a segment is in another pool than torch's default one."""
        return self._private_pools[self.pool] if len(self.pool) else np.zeros(0, dtype=bool)

    @cached_property
    def _private_pools(self) -> npt.NDArray[np.bool_]:
        return np.array([pool != DEFAULT_POOL for pool in self.pools], dtype=bool)

    @cached_property
    def _allocations(self) -> tuple[Addresses, Addresses, npt.NDArray[np.int64]]:
        """Start and end of each allocation, by address, and its pool.

        One ``cudaMalloc`` a segment. An expandable segment is mapped piece by piece, so there each
        block stands alone. Memory that came from elsewhere (CUDA IPC) is in none.
        """
        whole, apart = ~self.expandable, self.expandable[self.block_segment]
        start = np.concatenate((self.start[whole], self.block_start[apart]))
        nbytes = np.concatenate((self.nbytes[whole], self.block_nbytes[apart]))
        pool = np.concatenate((self.pool[whole], self.pool[self.block_segment[apart]]))
        order = np.argsort(start)
        return start[order], (start + nbytes)[order], pool[order]

    def _find(self, addresses: Addresses) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The allocation at or before each address, and whether the address lies in it."""
        start, end, _ = self._allocations
        index = np.searchsorted(start, addresses, side="right").astype(np.int64) - 1
        return index, (index >= 0) & (addresses < end[index])

    def allocation_of(self, storage_ptr: Addresses) -> Addresses:
        """Start of the allocation that each storage lies in; one that lies in none is its own."""
        if not len(self.start):
            return storage_ptr
        index, inside = self._find(storage_ptr)
        return np.where(inside, self._allocations[0][index], storage_ptr)

    def pool_of(self, storage_ptr: Addresses) -> npt.NDArray[np.int64]:
        """The private pool that each storage lies in, as a code; -1: in none."""
        if not len(self.start):
            return np.full(len(storage_ptr), -1, dtype=np.int64)
        index, inside = self._find(storage_ptr)
        pool = self._allocations[2][index]
        return np.where(inside & self._private_pools[pool], pool, -1)

    def outside_saver(
        self,
        ptr: Addresses,
        nbytes: Addresses,
        device: npt.NDArray[np.uint32],
        device_values: tuple[str, ...],
    ) -> dict[str, int]:
        """Bytes by device that stay mapped while the memory saver's regions are released.

        Storages by address, bytes and code into ``device_values``. The saver (torch_memory_saver
        0.0.9 and later) gives each of its regions a private pool; what lies in the default pool is
        outside of them. Where nothing of a GPU is in a private pool, it is an older one whose
        regions cannot be told apart, and all of that GPU's bytes count as released. It never
        releases memory that is not a GPU's.
        """
        private = self.pool_of(ptr) >= 0
        kept: dict[str, int] = {}
        for code, name in enumerate(device_values):
            here = device == code
            if not here.any():
                continue
            apart = private.any() and bool((private & here).any())
            whole = not name.startswith("cuda")
            kept[name] = int(nbytes[here & ~private].sum()) if apart or whole else 0
        return kept

    @classmethod
    def none(cls) -> Segments:
        """Of a device whose every storage is an allocation of its own, as a CPU's is."""
        return cls.of_snapshot([])

    @classmethod
    def of_cuda(cls) -> Segments:
        """Those of all GPUs that this process uses."""
        with no_collections():
            return cls.of_snapshot(memory_segments())

    @classmethod
    def of_snapshot(cls, snapshot: Iterable[dict[str, Any]]) -> Segments:
        """From what ``torch.cuda.memory_snapshot()`` answers."""
        codes: dict[tuple[int, int], int] = {}
        segments: list[tuple[int, int, int, int, bool]] = []
        sizes: list[int] = []
        requested: list[int] = []
        active: list[bool] = []
        counts: list[int] = []
        for segment in snapshot:
            pool = tuple(segment.get("segment_pool_id", DEFAULT_POOL))
            blocks = segment["blocks"]
            segments.append(
                (
                    segment["address"],
                    segment["total_size"],
                    segment.get("device", 0),
                    codes.setdefault((int(pool[0]), int(pool[1])), len(codes)),
                    bool(segment.get("is_expandable")),
                )
            )
            counts.append(len(blocks))
            sizes += [block["size"] for block in blocks]
            requested += [block.get("requested_size", block["size"]) for block in blocks]
            active += [block["state"] != "inactive" for block in blocks]
        columns = list(zip(*segments, strict=True)) if segments else [()] * 5
        start = np.array(columns[0], dtype=np.uint64)
        block_nbytes = np.array(sizes, dtype=np.uint64)
        block_segment = np.repeat(np.arange(len(counts)), counts)
        # From the beginning of the first segment, less what the segments before have.
        before = np.zeros(len(sizes) + 1, dtype=np.uint64)
        np.cumsum(block_nbytes, out=before[1:])
        first = np.concatenate(([0], np.cumsum(counts)))[:-1].astype(np.int64)
        return cls(
            start=start,
            nbytes=np.array(columns[1], dtype=np.uint64),
            device=np.array(columns[2], dtype=np.int64),
            pool=np.array(columns[3], dtype=np.int64),
            expandable=np.array(columns[4], dtype=bool),
            pools=tuple(codes),
            block_start=start[block_segment] + before[:-1] - before[first[block_segment]],
            block_nbytes=block_nbytes,
            block_requested=np.array(requested, dtype=np.uint64),
            block_active=np.array(active, dtype=bool),
            block_segment=block_segment,
        )


#: torch's name of the pool that tensors come from unless somebody says otherwise.
DEFAULT_POOL = (0, 0)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Around what makes thousands of dictionaries that are gone soon: counted as new ones they
    would have Python collect garbage, which takes an engine up to a second."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def memory_segments(*, traces: bool = False) -> list[dict[str, Any]]:
    memory_snapshot: Callable[..., list[dict[str, Any]]] = torch.cuda.memory.memory_snapshot
    try:
        # Without the history of allocations: a fraction of the time (torch 2.11 and later).
        return memory_snapshot(include_traces=traces)
    except TypeError:
        return memory_snapshot()
