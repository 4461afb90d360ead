# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whose the memory of a process is: weights, pools, slots and tables, with and without names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import msgspec
import torch

from sglang_weight_exporter.capture.account import OwnedStorages
from sglang_weight_exporter.capture.allocations import memory_segments
from sglang_weight_exporter.capture.object_tensors import Storage
from sglang_weight_exporter.records.memory import MemoryDump, MemoryOwner, MemoryPart
from sglang_weight_exporter.runners import pools as runner_pools
from sglang_weight_exporter.runners.captures import Captures, RoleCapture
from sglang_weight_exporter.runners.memory import of_storages, of_weights
from sglang_weight_exporter.runners.roles import RunnerRole
from sglang_weight_exporter.weight_table import table_rows


def owned_storages(captures: Captures) -> list[OwnedStorages]:
    """Storages by what they are part of, as of now."""
    captures.capture_tables()
    owned: list[OwnedStorages] = []
    for _, held in captures:
        if held.weights is not None:
            owned += of_weights(held.weights.ranges)
        owned += [of_storages(*group) for group in _groups(held)]
    return owned


def dump_memory(captures: Captures, *, at: float) -> Callable[[], MemoryDump] | None:
    """torch's memory as it is now, with the names of what is known; ``None``: no GPU.

    What is called to have it written down takes a hundred times as long as reading it, and may run
    on another thread.
    """
    if not torch.cuda.is_initialized():
        return None
    segments = memory_segments(traces=True)
    captures.capture_tables()
    held = [(role, replace(each)) for role, each in captures]
    graph_pools = tuple(runner_pools.graph_pools() or ())

    def write_down() -> MemoryDump:
        # Segment by segment: other threads run between two of them.
        encoded = b",".join(map(msgspec.json.encode, segments))
        owners = tuple(memory_owners(held))
        return MemoryDump(at=at, segments=b"[%b]" % encoded, owners=owners, graph_pools=graph_pools)

    return write_down


def memory_owners(captures: Iterable[tuple[RunnerRole, RoleCapture]]) -> Iterator[MemoryOwner]:
    """What is known of the memory, a storage each, with a name."""
    for role, held in captures:
        yield from _weight_owners(role, held)
        for part, storages in _groups(held):
            for number, each in enumerate(storages):
                yield MemoryOwner(
                    address=each.address,
                    nbytes=each.nbytes,
                    part=part,
                    name=f"{each.label} {number} ({role.name})",
                )


def _weight_owners(role: RunnerRole, held: RoleCapture) -> Iterator[MemoryOwner]:
    if held.weights is None:
        return
    names: dict[int, tuple[str, MemoryPart]] = {}
    for row in table_rows(held.weights.table):
        part: MemoryPart = "derived_weights" if row.kind == "derived" else "weights"
        names.setdefault(row.storage_ptr, (row.name, part))
    start, nbytes, _ = held.weights.ranges
    for address, size in zip(start.tolist(), nbytes.tolist(), strict=True):
        name, part = names[address]
        yield MemoryOwner(address=address, nbytes=size, part=part, name=f"{name} ({role.name})")


def _groups(held: RoleCapture) -> tuple[tuple[MemoryPart, tuple[Storage, ...]], ...]:
    return (
        ("kv_pool", held.kv_storages),
        ("lora", held.lora_storages),
        ("kv_tables", held.table_storages),
    )
