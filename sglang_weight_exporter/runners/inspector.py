# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What model runners hold: their weights, KV pools and adapter slots. Looks, and writes nothing."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import torch

from sglang_weight_exporter.capture.account import OwnedStorages
from sglang_weight_exporter.capture.allocations import (
    AllocationMap,
    Segments,
    memory_segments,
)
from sglang_weight_exporter.capture.fingerprint import (
    Fingerprinter,
    FingerprintError,
    FingerprintTimeoutError,
)
from sglang_weight_exporter.capture.object_tensors import Storage
from sglang_weight_exporter.capture.table_fingerprints import with_fingerprints
from sglang_weight_exporter.capture.weights import WeightCapture, capture_weights, storages_of
from sglang_weight_exporter.records.fingerprints import Skip
from sglang_weight_exporter.records.memory import MemoryDump, MemoryOwner, MemoryPart
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.weights import Kind
from sglang_weight_exporter.runners import pools as runner_pools
from sglang_weight_exporter.runners.memory import Memory, of_storages, of_weights
from sglang_weight_exporter.runners.prefix_cache import cached_tokens
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.weight_table import (
    WeightTable,
    modified_tensors,
    table_rows,
    without_fingerprints,
)

logger = logging.getLogger("sglang_weight_exporter")


@dataclass
class RoleCapture:
    """What the last look at a role found; ``None``: it could not be read, or is not there yet."""

    weights: WeightCapture | None = None
    kv_pools: tuple[KvPoolUsage, ...] | None = None
    kv_storages: tuple[Storage, ...] = ()
    #: Device name to bytes of KV pools that keep their memory while the pools are released.
    kv_outside_saver: dict[str, int] | None = None
    lora: tuple[LoraUsage, ...] = ()
    lora_storages: tuple[Storage, ...] = ()
    #: Why fingerprints were not taken; ``None`` where they were, or were not asked for.
    skipped: Skip | None = None
    #: The table as the last load or update left it, with fingerprints. ``None``: nobody knows.
    left: WeightTable | None = None
    #: Name → kind of tensors that hold other bytes than that.
    modified: dict[str, Kind] = field(default_factory=dict)


class ModelRunnerInspector:
    """The looks at all roles of a process.

    ``report`` is told of what could not be read; ``allocations`` is where one allocation ends and
    the next begins, by device, in place of torch's allocator; ``fingerprinter``: takes
    fingerprints, if they are to be taken; ``memory``: keeps the account of the GPUs.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float] = time.time,
        allocations: Callable[[str], AllocationMap] | None = None,
        fingerprinter: Fingerprinter | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._roles = roles
        self._report = report
        self._clock = clock
        self._allocations = allocations
        #: What torch's allocator has of the GPUs.
        self.memory = memory or Memory(clock=clock)
        self._captures: dict[RunnerRole, RoleCapture] = {}
        #: Addresses of storages that a weight-cache daemon holds, which count there.
        self._mapped: frozenset[int] = frozenset()
        #: How long the last look took.
        self.seconds: float | None = None
        self._fingerprinter = fingerprinter
        #: Whether tensors may be read, and not only where they are.
        self.memory_is_there = True
        self._scheduler: Callable[[], Any] = lambda: None
        self._told: set[Skip] = set()

    @property
    def takes_fingerprints(self) -> bool:
        return self._fingerprinter is not None

    def of(self, role: RunnerRole) -> RoleCapture:
        """What is known of a role, without looking."""
        return self._captures.get(role, RoleCapture())

    def start_over(self, role: RunnerRole, *, known: bool) -> None:
        """Later looks are compared with the last one, or, unless ``known``, with none until the
        next update."""
        look = self._captures.get(role)
        if look is not None:
            table = None if look.weights is None else look.weights.table
            look.left = table if known and table and table.fingerprint else None

    def ignore(self, role: RunnerRole, storages: frozenset[int]) -> None:
        """That tensors in these storages hold other bytes is no news."""
        look = self._captures.get(role)
        if storages and look is not None and look.modified and look.weights is not None:
            there = {
                row.name for row in table_rows(look.weights.table) if row.storage_ptr in storages
            }
            look.modified = {
                name: kind for name, kind in look.modified.items() if name not in there
            }

    def map(self, model: object) -> None:
        """A model's tensors were mapped from a weight-cache daemon, where they count."""
        if isinstance(model, torch.nn.Module):
            self._mapped |= storages_of(model)

    def watch(self, scheduler: Any) -> None:
        """Whose prefix cache it is."""
        self._scheduler = weakref.ref(scheduler)

    def _forward_passes(self) -> torch.cuda.Stream | None:
        """The stream that they are in, where they are in one of their own. With overlapped
        scheduling a request is served while the last batch still runs there."""
        stream = getattr(self._scheduler(), "forward_stream", None)
        return stream if isinstance(stream, torch.cuda.Stream) else None

    def cached_tokens(self) -> int | None:
        """Tokens in the prefix cache now; ``None`` where there is none, or it cannot be read."""
        scheduler = self._scheduler()
        if scheduler is None:
            return None
        try:
            return cached_tokens(scheduler)
        except Exception as error:
            self._report("prefix_cache", error)
            return None

    def capture(
        self,
        *roles: RunnerRole,
        derived: bool = False,
        pools: bool = False,
        fingerprint_seconds: float | None = None,
        written: bool = True,
    ) -> None:
        """Read pointers and bytes of weights again. What cannot be read becomes absent.

        ``derived``: find out anew where derived weights hang, which only a load changes; once
        requests are served, scratch memory may hang there too. ``pools``: pools and adapter slots
        may have changed as well. ``fingerprint_seconds``: weights may have changed, and
        their fingerprints may take so long; 0 where they may not be read. ``written``: by a load
        or an update; otherwise they should be as the last one left them.
        """
        started = time.perf_counter()
        segments = _Once(Segments.of_cuda)
        on_gpu = _Once(lambda: AllocationMap.of_segments(segments()))
        for role in roles:
            look = self._captures.setdefault(role, RoleCapture())
            map_of_allocations = self._map(role.device, on_gpu)
            try:
                look.weights = self._weights(role, look, map_of_allocations, derived=derived)
            except Exception as error:
                look.weights = None
                self._report("capture", error)
            if self._fingerprinter is not None and fingerprint_seconds is not None:
                self._take_fingerprints(role, look, self._fingerprinter, fingerprint_seconds)
                self._compare(look, written=written)
            if pools:
                try:
                    self._pools(role, look, map_of_allocations)
                except Exception as error:
                    look.kv_pools, look.kv_outside_saver, look.lora = None, None, ()
                    look.kv_storages, look.lora_storages = (), ()
                    self._report("kv_pool", error)
        living = set(self._roles)
        self._captures = {role: look for role, look in self._captures.items() if role in living}
        self.read_memory(segments, thorough=derived or pools)
        self.seconds = time.perf_counter() - started

    def begin_update(self) -> None:
        """Weights are about to be written."""
        try:
            self.memory.begin_update()
        except Exception as error:
            self._report("memory", error)

    def read_memory(
        self, segments: Callable[[], Segments] | None = None, *, thorough: bool = True
    ) -> None:
        """Read the account of the GPUs again. ``thorough``: its parts in any case."""
        pools = [storage for look in self._captures.values() for storage in look.kv_storages]
        try:
            self.memory.read(segments or Segments.of_cuda, self._known, pools, thorough=thorough)
        except Exception as error:
            self._report("memory", error)

    def dump_memory(self) -> MemoryDump | None:
        """torch's memory as it is now, with the names of what is known; ``None``: no GPU."""
        if not torch.cuda.is_initialized():
            return None
        return MemoryDump(
            at=self._clock(),
            segments=msgspec.json.encode(memory_segments(traces=True)),
            owners=tuple(self._owners()),
            graph_pools=tuple(runner_pools.graph_pools() or ()),
        )

    def _owners(self) -> Iterator[MemoryOwner]:
        pools = frozenset(
            storage.address for look in self._captures.values() for storage in look.kv_storages
        )
        for role, look in self._captures.items():
            if look.weights is not None:
                names: dict[int, tuple[str, MemoryPart]] = {}
                for row in table_rows(look.weights.table):
                    part: MemoryPart = "derived_weights" if row.kind == "derived" else "weights"
                    names.setdefault(row.storage_ptr, (row.name, part))
                start, nbytes, _ = look.weights.ranges
                for address, size in zip(start.tolist(), nbytes.tolist(), strict=True):
                    name, part = names[address]
                    yield MemoryOwner(
                        address=address, nbytes=size, part=part, name=f"{name} ({role.name})"
                    )
            groups: list[tuple[MemoryPart, Iterable[Storage]]] = [
                ("kv_pool", look.kv_storages),
                ("lora", look.lora_storages),
            ]
            if role.runner is not None:
                groups.append(("kv_tables", runner_pools.table_storages(role.runner, pools)))
            for part, storages in groups:
                for number, each in enumerate(storages):
                    yield MemoryOwner(
                        address=each.address,
                        nbytes=each.nbytes,
                        part=part,
                        name=f"{each.label} {number} ({role.name})",
                    )

    def _known(self) -> list[OwnedStorages]:
        """Storages by what they are part of."""
        known: list[OwnedStorages] = []
        pools = frozenset(
            storage.address for look in self._captures.values() for storage in look.kv_storages
        )
        for role, look in self._captures.items():
            if look.weights is not None:
                known += of_weights(look.weights.ranges)
            known.append(of_storages("kv_pool", look.kv_storages))
            known.append(of_storages("lora", look.lora_storages))
            if role.runner is not None:
                tables = runner_pools.table_storages(role.runner, pools)
                known.append(of_storages("kv_tables", tables))
        return known

    def _map(self, device: str, on_gpu: Callable[[], AllocationMap]) -> Callable[[], AllocationMap]:
        if self._allocations is not None:
            allocations = self._allocations
            return _Once(lambda: allocations(device))
        return on_gpu if device.startswith("cuda") else AllocationMap.of_storages

    def _earlier(self, role: RunnerRole) -> list[RoleCapture]:
        earlier = []
        for other in self._roles:
            if other is role:
                break
            earlier.append(self.of(other))
        return earlier

    def _weights(
        self,
        role: RunnerRole,
        look: RoleCapture,
        allocations: Callable[[], AllocationMap],
        *,
        derived: bool,
    ) -> WeightCapture | None:
        model = getattr(role.runner, "model", None)
        if not isinstance(model, torch.nn.Module):
            return None
        counted = self._mapped
        for other in self._earlier(role):
            if other.weights is not None:
                counted |= other.weights.storages
        before = look.weights
        capture = capture_weights(
            model,
            role=role.name,
            captured_at=self._clock(),
            counted_elsewhere=counted,
            allocations=allocations,
            previous=before,
            thorough=derived,
        )
        for usage in capture.usage:
            self._roles.describe(usage.device)
        if capture.unreadable and (before is None or before.unreadable != capture.unreadable):
            self._report("capture", UnreadableTensorsError(capture.unreadable))
        return capture

    def _take_fingerprints(
        self,
        role: RunnerRole,
        look: RoleCapture,
        fingerprinter: Fingerprinter,
        limit_seconds: float,
    ) -> None:
        """Anew or not at all: what was true before the update is true no more."""
        look.skipped = None
        if look.weights is None:
            return
        table = without_fingerprints(look.weights.table)
        if not (limit_seconds and self.memory_is_there):
            look.skipped = "released"
        elif not role.has_placeholders:
            try:
                table = with_fingerprints(
                    table,
                    role.runner.model,
                    look.weights.slots,
                    fingerprinter,
                    limit_seconds,
                    after=self._forward_passes(),
                )
            except FingerprintError as error:
                timed_out = isinstance(error, FingerprintTimeoutError)
                look.skipped = "time_limit" if timed_out else "unsupported"
                self._tell(look.skipped, error)
            except Exception as error:
                look.skipped = "error"
                self._report("fingerprint", error)
        look.weights = replace(look.weights, table=table)

    def _tell(self, reason: Skip, error: FingerprintError) -> None:
        """Once: it is counted each time, and nothing went wrong."""
        if reason not in self._told:
            self._told.add(reason)
            logger.warning(
                "sglang_weight_exporter: no fingerprint of the weights was taken (%s: %s). SGLang "
                "is not affected. Further ones are counted and not logged.",
                reason,
                error,
            )

    def _compare(self, look: RoleCapture, *, written: bool) -> None:
        table = None if look.weights is None else look.weights.table
        if written:
            look.left, look.modified = (table if table and table.fingerprint else None), {}
        elif table is not None and look.left is not None:
            try:
                look.modified = modified_tensors(look.left, table)
            except Exception as error:
                look.modified = {}
                self._report("fingerprint", error)

    def _pools(
        self, role: RunnerRole, look: RoleCapture, allocations: Callable[[], AllocationMap]
    ) -> None:
        runner = role.runner
        counted = {each.address for other in self._earlier(role) for each in other.kv_storages}
        storages = runner_pools.kv_storages(runner, counted)
        look.lora_storages = tuple(runner_pools.lora_storages(runner))
        look.lora = runner_pools.lora_usage(runner, look.lora_storages)
        if storages is None:
            look.kv_pools, look.kv_outside_saver, look.kv_storages = None, None, ()
            return
        look.kv_storages = tuple(storages)
        look.kv_pools = runner_pools.kv_usage(runner, storages)
        look.kv_outside_saver = _outside_saver(storages, allocations())


class UnreadableTensorsError(Exception):
    """Tensors that have no row in the table, by name."""

    def __init__(self, sentences: tuple[str, ...]) -> None:
        super().__init__(
            f"{len(sentences)} tensors have no storage that could be read, so they are in no "
            f"table and no sum: {'; '.join(sentences[:10])}"
        )


_Made = TypeVar("_Made")


class _Once(Generic[_Made]):
    """Asked for when it is needed, and not again in the same look."""

    def __init__(self, make: Callable[[], _Made]) -> None:
        self._make = make
        self._made: list[_Made] = []

    def __call__(self) -> _Made:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]


def _outside_saver(storages: list[Storage], allocations: AllocationMap) -> dict[str, int]:
    devices = tuple(dict.fromkeys(storage.device for storage in storages))
    return allocations.outside_saver(
        np.array([storage.address for storage in storages], dtype=np.uint64),
        np.array([storage.nbytes for storage in storages], dtype=np.uint64),
        np.array([devices.index(storage.device) for storage in storages], dtype=np.uint32),
        devices,
    )
