# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a process has of its GPUs through torch's allocator, kept up from capture to capture.

torch's counters are read at every capture, which takes 0.03 ms. Its segments with their blocks take
half a millisecond where the blocks are 1,000, and 10 where they are 20,000. An update leaves them
alone while what is reserved is what it was. What has changed inside of it since, the counters say:
a flush makes lists of free slots anew, and a batch leaves results, in what was free before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_weight_exporter.capture.account import Account, OwnedStorages, account, elsewhere
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.object_tensors import Storage
from sglang_weight_exporter.capture.weights import StorageRanges
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryPart
from sglang_weight_exporter.runners.pools import graph_pools

#: As many are read while somebody waits, at half a microsecond each.
MOST_BLOCKS = 100_000


@dataclass(frozen=True)
class _Counters:
    """torch's, of one device, in bytes."""

    reserved: int
    #: Blocks in use, those that are free and that the device may still use included; without them.
    active: int
    allocated: int
    #: Of blocks in use what was asked for.
    requested: int
    #: Free blocks in segments that are in use.
    inactive_split: int

    @classmethod
    def of(cls, stats: dict[str, Any]) -> _Counters:
        names = cls.__annotations__
        return cls(**{name: int(stats[f"{name}_bytes"]["all"]["current"]) for name in names})

    def shift(
        self, parts: dict[MemoryPart, int], before: _Counters
    ) -> dict[MemoryPart, int] | None:
        """Parts that were found with the counters ``before``, as they are now with as much
        reserved; ``None``: more has happened than the allocator's own share can explain."""
        active = self.active - before.active
        requested = self.requested - before.requested
        awaited = active - (self.allocated - before.allocated)
        fragments = self.inactive_split - before.inactive_split
        shifted = parts.copy()
        shifted["other_tensors"] += requested + awaited
        shifted["rounding"] += active - awaited - requested
        shifted["fragments"] += fragments
        shifted["cached"] -= active + fragments
        return shifted if min(shifted.values()) >= 0 else None


class Memory:
    """One process's account of its GPUs. ``released``: tags of memory that is given back now."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        stats: Callable[[], dict[int, dict[str, Any]]] | None = None,
        released: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._clock = clock
        self._released = released
        self._stats = stats or _cuda_stats
        self._devices: dict[int, DeviceMemory] = {}
        #: As of the last capture.
        self._counters: dict[int, _Counters] = {}
        #: Devices with segments that grow: of these torch counts free blocks in another way.
        self._expandable: set[int] = set()
        #: Of the update that goes on, by device: what was reserved when it began, the peak that
        #: torch knew by then, and the most that was seen since.
        self._update: dict[int, _Update] = {}

    def devices(self) -> tuple[DeviceMemory, ...]:
        """What was found last, by index of the device."""
        return tuple(self._devices.values())

    def begin_update(self) -> None:
        """An update is about to begin."""
        self._update = {device: _Update(each) for device, each in self._stats().items()}

    def note_update(self) -> None:
        """Memory is about to be given back, maybe in the middle of one."""
        if self._update:
            for device, stats in self._stats().items():
                if device in self._update:
                    self._update[device].note(stats)

    def end_update(self) -> None:
        """It has ended, and memory was read after it."""
        for device, update in self._update.items():
            found = self._devices.get(device)
            if found is None:
                continue
            most = update.most_of(found.reserved, found.reserved_peak)
            self._change(device, before_update=update.before, after_update=found.reserved)
            if found.update_peak is None or most > found.update_peak:
                self._change(device, update_peak=most, update_peak_released=found.released)
        self._update = {}

    def end_release(self) -> None:
        """Memory has been given back, and was read after that."""
        for device, each in self._devices.items():
            self._change(device, after_release=each.reserved - each.released)

    def _change(self, device: int, **fields: Any) -> None:
        self._devices[device] = msgspec.structs.replace(self._devices[device], **fields)

    def read(
        self,
        segments: Callable[[], Segments],
        known: Callable[[], Iterable[OwnedStorages]],
        pools: Iterable[Storage],
        *,
        thorough: bool,
    ) -> None:
        """``segments``: reads them, or has them already where the table needed them.
        ``known``: the storages that are somebody's. ``pools``: those of KV pools. ``thorough``:
        read the segments in any case."""
        found = self._stats()
        pools = list(pools)
        owners: list[OwnedStorages] | None = None
        for device, stats in found.items():
            before = self._devices.get(device)
            parts = None if thorough else self._parts_now(device, stats)
            if before is not None and parts is not None:
                taken = Account(parts, before.released), before.mapped
            else:
                owners = list(known()) if owners is None else owners
                taken = self._account(device, segments, owners, pools)
            self._counters[device] = _Counters.of(stats)
            self._devices[device] = self._record(device, stats, *taken)
        self._devices = {device: self._devices[device] for device in found}

    def _parts_now(self, device: int, stats: dict[str, Any]) -> dict[MemoryPart, int] | None:
        """Without reading segments; ``None``: that cannot be known."""
        before, counters = self._devices.get(device), self._counters.get(device)
        if before is None or before.parts is None or counters is None:
            return None
        now = _Counters.of(stats)
        if now == counters:
            return before.parts
        if now.reserved != counters.reserved or device in self._expandable:
            return None
        return now.shift(before.parts, counters)

    def now(
        self,
        device: int,
        segments: Callable[[], Segments],
        known: list[OwnedStorages],
        pools: Iterable[Storage],
    ) -> DeviceMemory | None:
        """The account of one GPU, beside those of captures; ``None``: torch has nothing there.

        Somebody waits for it, so that many blocks are not read: 20,000 take 10 ms."""
        stats = self._stats().get(device)
        if stats is None:
            return None
        blocks = sum(_current(stats, name) for name in ("active", "inactive_split", "segment"))
        taken = Account(None, reason=f"torch has more than {MOST_BLOCKS:,} blocks"), 0
        if blocks <= MOST_BLOCKS:
            taken = self._account(device, segments, known, list(pools))
        return self._record(device, stats, *taken)

    def _account(
        self,
        device: int,
        segments: Callable[[], Segments],
        known: list[OwnedStorages],
        pools: list[Storage],
    ) -> tuple[Account, int]:
        """The account, and the bytes of KV pools that are in virtual memory of their own."""
        released = self._released()
        try:
            found = segments()
        except Exception as error:  # As with cudaMallocAsync, which has no segments to show.
            return Account(
                None, reason=f"torch's allocator does not show its segments ({error})"
            ), 0
        growing = bool(found.expandable[found.device == device].any())
        (self._expandable.add if growing else self._expandable.discard)(device)
        taken = account(found, known, device=device, released=released, graph_pools=graph_pools())
        mine = [pool for pool in pools if pool.device == f"cuda:{device}"]
        mapped = elsewhere(found, *_columns(mine))
        if taken.parts is None or not mapped:
            return taken, 0
        if "kv_cache" in released:
            return Account(None, reason="released memory is not the allocator's"), 0
        taken.parts["kv_pool"] += mapped
        return taken, mapped

    def _record(
        self, device: int, stats: dict[str, Any], taken: Account, mapped: int
    ) -> DeviceMemory:
        before = self._devices.get(device)
        return DeviceMemory(
            device=f"cuda:{device}",
            at=self._clock(),
            allocated=stats["allocated_bytes"]["all"]["current"],
            reserved=_reserved(stats),
            allocated_peak=stats["allocated_bytes"]["all"]["peak"],
            reserved_peak=_reserved_peak(stats),
            released=taken.released,
            mapped=mapped,
            parts=taken.parts,
            reason=taken.reason,
            before_update=None if before is None else before.before_update,
            after_update=None if before is None else before.after_update,
            update_peak=None if before is None else before.update_peak,
            update_peak_released=0 if before is None else before.update_peak_released,
            after_release=None if before is None else before.after_release,
        )


class _Update:
    """What torch has reserved of a device while an update goes on.

    torch's peak is the process's; others read it, so nobody resets it here. Where it is higher
    after the update than before, the update made it. Else what is known is what was reserved when
    it was read, at last before a flush gives back what is free: until then torch keeps what
    it has reserved.
    """

    def __init__(self, stats: dict[str, Any]) -> None:
        self.before = self._most = _reserved(stats)
        self._peak = _reserved_peak(stats)

    def note(self, stats: dict[str, Any]) -> None:
        self._most = max(self._most, _reserved(stats))

    def most_of(self, reserved: int, peak: int) -> int:
        """Beyond what was reserved before; what is given are torch's counts after it."""
        most = max(self._most, reserved, peak if peak > self._peak else 0)
        return most - self.before


def of_storages(part: MemoryPart, storages: Iterable[Storage]) -> OwnedStorages:
    """Storages of pools, slots and tables as a part."""
    return OwnedStorages(part, *_columns(storages))


def of_weights(ranges: StorageRanges) -> tuple[OwnedStorages, OwnedStorages]:
    """Storages of weights as two parts."""
    start, nbytes, derived = ranges
    return (
        OwnedStorages("weights", start[~derived], nbytes[~derived]),
        OwnedStorages("derived_weights", start[derived], nbytes[derived]),
    )


def _columns(storages: Iterable[Storage]) -> tuple[Any, Any]:
    storages = list(storages)
    return (
        np.array([storage.address for storage in storages], dtype=np.uint64),
        np.array([storage.nbytes for storage in storages], dtype=np.uint64),
    )


def _current(stats: dict[str, Any], name: str) -> int:
    return int(stats.get(name, {}).get("all", {}).get("current", 0))


def _reserved(stats: dict[str, Any]) -> int:
    return int(stats["reserved_bytes"]["all"]["current"])


def _reserved_peak(stats: dict[str, Any]) -> int:
    return int(stats["reserved_bytes"]["all"]["peak"])


def _cuda_stats() -> dict[int, dict[str, Any]]:
    """torch's counters of each GPU that it has memory of. Starts nothing on a GPU."""
    if not torch.cuda.is_initialized():
        return {}
    found = {}
    for device in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        if _reserved(stats):
            found[device] = stats
    return found
