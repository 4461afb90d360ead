# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where one allocation ends and the next begins, by torch's caching allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
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
    #: Whether an allocation is in a pool of its own, as the memory saver's regions are, and not
    #: in torch's default pool.
    private: npt.NDArray[np.bool_]

    @classmethod
    def of_storages(cls) -> AllocationMap:
        """Each storage is an allocation, as torch's CPU allocator has it."""
        return cls.of_spans([])

    @classmethod
    def of_spans(cls, spans: Iterable[tuple[int, int, bool]]) -> AllocationMap:
        """From start, end, and whether it is private, of each allocation."""
        ordered = sorted(spans)
        return cls(
            np.array([start for start, _, _ in ordered], dtype=np.uint64),
            np.array([end for _, end, _ in ordered], dtype=np.uint64),
            np.array([private for _, _, private in ordered], dtype=bool),
        )

    @classmethod
    def of_cuda(cls) -> AllocationMap:
        """From the caching allocator: one ``cudaMalloc`` a segment.

        An expandable segment is mapped piece by piece, so there each block stands alone. Memory
        that came from elsewhere (CUDA IPC) is in no segment.
        """
        spans: list[tuple[int, int, bool]] = []
        # The snapshot is thousands of dictionaries that are gone in a moment; counted as new ones
        # they would have Python collect garbage, which takes an engine up to a second.
        collecting = gc.isenabled()
        gc.disable()
        try:
            for segment in _memory_segments():
                private = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
                address = segment["address"]
                if segment.get("is_expandable"):
                    for block in segment["blocks"]:
                        spans.append((address, address + block["size"], private))
                        address += block["size"]
                else:
                    spans.append((address, address + segment["total_size"], private))
            return cls.of_spans(spans)
        finally:
            spans.clear()
            if collecting:
                gc.enable()

    def lookup(self, storage_ptr: Addresses) -> Addresses:
        """Start of the allocation that each storage lies in."""
        if not len(self.start):
            return storage_ptr
        index, inside = self._find(storage_ptr)
        return np.where(inside, self.start[index], storage_ptr)

    def stays(
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
        private: npt.NDArray[np.bool_] = np.zeros(len(ptr), dtype=bool)
        if len(self.start):
            index, inside = self._find(ptr)
            private = inside & self.private[index]
        kept: dict[str, int] = {}
        for code, name in enumerate(device_values):
            here = device == code
            if not here.any():
                continue
            apart = private.any() and bool((private & here).any())
            whole = not name.startswith("cuda")
            kept[name] = int(nbytes[here & ~private].sum()) if apart or whole else 0
        return kept

    def _find(self, addresses: Addresses) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        index = np.searchsorted(self.start, addresses, side="right").astype(np.int64) - 1
        return index, (index >= 0) & (addresses < self.end[index])


def _memory_segments() -> list[dict[str, Any]]:
    memory_snapshot: Callable[..., list[dict[str, Any]]] = torch.cuda.memory.memory_snapshot
    try:
        # Without the history of allocations: a fraction of the time (torch 2.11 and later).
        return memory_snapshot(include_traces=False)
    except TypeError:
        return memory_snapshot()
