# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whose the memory of a process is: weights, pools, slots and tables, with and without names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import torch

from sglang_weight_exporter.capture.account import OwnedStorages
from sglang_weight_exporter.capture.allocations import memory_segments, no_collections
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
    with no_collections():
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
        yield from _pool_owners(role, held)


def pool_owners(captures: Captures) -> Iterator[MemoryOwner]:
    """The same without weights, whose names are in their table."""
    for role, held in captures:
        yield from _pool_owners(role, held)


def largest_owners(captures: Captures, device: str, count: int) -> list[MemoryOwner]:
    """What of a device has the most memory: weights by tensor, pools as a whole. Of the names of
    20,000 tensors only those are made that are among them."""
    found: list[MemoryOwner] = []
    for role, held in captures:
        found += _largest_weights(role, held, device, count)
        for part, storages in _groups(held):
            labels: dict[str, list[Storage]] = {}
            for each in storages:
                if each.device == device:
                    labels.setdefault(each.label, []).append(each)
            for label, group in labels.items():
                more = f", {len(group):,} buffers" if len(group) > 1 else ""
                found.append(
                    MemoryOwner(
                        address=group[0].address,
                        nbytes=sum(each.nbytes for each in group),
                        part=part,
                        name=f"{label} ({role.name}){more}",
                    )
                )
    once = {owner.address: owner for owner in reversed(found)}  # A draft has some of its target's.
    return sorted(once.values(), key=lambda owner: -owner.nbytes)[:count]


def _pool_owners(role: RunnerRole, held: RoleCapture) -> Iterator[MemoryOwner]:
    for part, storages in _groups(held):
        for number, each in enumerate(storages):
            yield MemoryOwner(
                address=each.address,
                nbytes=each.nbytes,
                part=part,
                name=f"{each.label} {number} ({role.name})",
            )


def _largest_weights(
    role: RunnerRole, held: RoleCapture, device: str, count: int
) -> Iterator[MemoryOwner]:
    if held.weights is None or not held.weights.table.rows:
        return
    table = held.weights.table
    storages = np.frombuffer(table.storage_ptr, np.uint64)
    sizes = np.frombuffer(table.storage_nbytes, np.uint64)
    devices = np.frombuffer(table.device, np.uint32)
    here = np.zeros(table.rows, dtype=bool)
    if device in table.device_values:
        here = devices == table.device_values.index(device)
    # Each storage once, under its first name.
    _, first = np.unique(storages, return_index=True)
    first = first[here[first]]
    names = table.names.decode().split("\n")
    kinds = np.frombuffer(table.kind, np.uint32)
    for row in first[np.argsort(sizes[first])[::-1][:count]].tolist():
        derived = table.kind_values[int(kinds[row])] == "derived"
        yield MemoryOwner(
            address=int(storages[row]),
            nbytes=int(sizes[row]),
            part="derived_weights" if derived else "weights",
            name=f"{names[row]} ({role.name})",
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
