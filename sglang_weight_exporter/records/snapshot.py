# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank says of itself now."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_weight_exporter.records.adapters import Adapters
from sglang_weight_exporter.records.base import (
    FEW,
    SCHEMA_VERSION,
    Count,
    DeviceName,
    Record,
    Seconds,
)
from sglang_weight_exporter.records.contents import Layer
from sglang_weight_exporter.records.costs import UpdateCost
from sglang_weight_exporter.records.engine import Device, Engine, HookState, Ranks
from sglang_weight_exporter.records.fingerprints import FingerprintCounts
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryBudget
from sglang_weight_exporter.records.pools import CacheCounts, KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.updates import (
    OperationCounts,
    Source,
    Update,
    UpdateCounts,
    UpdateInProgress,
    add_bytes,
    add_phases,
)
from sglang_weight_exporter.records.weights import Change, TableRef, WeightUsage


class Role(Record, frozen=True, kw_only=True):
    """One model of a rank: the target, or a draft; or what a process without an engine holds."""

    #: ``target``, ``draft``, ``draft_1``, …, ``encoder``, ``weight_cache``.
    name: str
    #: The device of the model runner.
    device: str
    architecture: str = ""
    quantization: str = ""
    #: The checkpoint that is served.
    model_path: str = ""
    weights: Annotated[tuple[WeightUsage, ...], FEW] | None = None
    #: Physical bytes by device: the sum of ``weights``, or while released what lies outside of the
    #: memory saver's regions.
    resident: Annotated[dict[DeviceName, Count], FEW] | None = None
    table: TableRef | None = None
    kv_pools: Annotated[tuple[KvPoolUsage, ...], FEW] | None = None
    kv_resident: Annotated[dict[DeviceName, Count], FEW] | None = None
    lora: Annotated[tuple[LoraUsage, ...], FEW] = ()
    #: ``None``: LoRA is off, or they could not be read.
    adapters: Adapters | None = None
    loaded_at: Seconds | None = None
    load_seconds: Seconds | None = None
    #: When weights last changed, also by an update that failed half-way.
    updated_at: Seconds | None = None
    #: When the last load or update began that ``updates`` counts: ranks that hold the same weights
    #: were called at the same moment, however long each took.
    update_started_at: Seconds | None = None
    updates: dict[Source, UpdateCounts] = {}
    moved: Count = 0
    changes: dict[Change, Count] = {}
    #: ``None``: fingerprints are switched off.
    fingerprints: FingerprintCounts | None = None
    #: Whether the load left what the reference of its checkpoint and configuration holds, as the
    #: exporter process has found; ranks do not know. ``None``: there is no other to compare with.
    reference_match: bool | None = None
    #: Whether the last update left what the manifest of its version says, as the exporter process
    #: has found. ``None``: there is no manifest, or too little could be compared.
    manifest_match: bool | None = None
    in_progress: UpdateInProgress | None = None
    #: Experts that move beside that update; alone they are ``in_progress``.
    rebalance: UpdateInProgress | None = None
    last_update: Update | None = None
    #: Classes of layers that updates have changed before and have left as they were since: how many
    #: of them in a row; 0 where that is usual. With fingerprints.
    layers_missed: dict[Layer, Count] = {}

    @property
    def going_on(self) -> tuple[UpdateInProgress, ...]:
        """Updates that nobody has reported the end of."""
        both = self.in_progress, self.rebalance
        return tuple(each for each in both if each is not None)

    @property
    def released(self) -> bool:
        """Whether the memory behind the weights has been given back for now."""
        held = sum(part.nbytes for part in self.weights or ())
        return self.resident is not None and sum(self.resident.values()) < held

    def settled(self, now: float) -> Role:
        """The role as it is once an update that is over (:meth:`UpdateInProgress.is_over`) has
        been counted."""
        progress = self.in_progress
        if progress is None or not progress.is_over(now):
            return self
        if progress.source is None:
            return msgspec.structs.replace(self, in_progress=self.rebalance, rebalance=None)
        counts = self.updates.get(progress.source, UpdateCounts())
        # The clock may have been set back.
        seconds = max(0.0, progress.last_call_at - progress.started_at)
        if not progress.failed:  # Of its span nothing is known yet.
            counts = msgspec.structs.replace(
                counts, trace_id="", updated_at=progress.last_call_at, seconds=seconds
            )
        ended = msgspec.structs.replace(
            counts,
            updates=counts.updates + (not progress.failed),
            failures=counts.failures + progress.failed,
            duration=counts.duration.observe(seconds),
            phases=add_phases(counts.phases, progress.phases),
            nbytes=add_bytes(counts.nbytes, progress.nbytes),
        )
        return msgspec.structs.replace(
            self,
            in_progress=self.rebalance,
            rebalance=None,
            updated_at=self.updated_at if progress.failed else progress.last_call_at,
            update_started_at=(self.update_started_at if progress.failed else progress.started_at),
            updates={**self.updates, progress.source: ended},
        )


class Snapshot(Record, frozen=True, kw_only=True):
    """All that a rank says of itself; one file, replaced atomically."""

    schema: Count = SCHEMA_VERSION
    rank_id: str
    pid: Count
    started_at: Seconds
    engine: Engine
    ranks: Ranks = Ranks()
    devices: tuple[Device, ...] = ()
    #: Each device that torch's allocator has memory of; empty where there is no GPU.
    memory: Annotated[tuple[DeviceMemory, ...], FEW] = ()
    budget: MemoryBudget = MemoryBudget()
    #: Inode of the namespace that ``pid`` is of; 0: not known.
    pid_namespace: Count = 0
    roles: Annotated[tuple[Role, ...], FEW] = ()
    weight_version: str = ""
    hooks: Annotated[tuple[HookState, ...], FEW] = ()
    #: Exceptions of our own that were caught in the engine, by the hook they came from.
    hook_errors: dict[str, Count] = {}
    operations: Annotated[dict[str, OperationCounts], FEW] = {}
    update_groups: Count = 0
    #: ``None`` where no scheduler serves requests.
    cache: CacheCounts | None = None
    #: What updates have cost, by source, and the last one; nothing where no scheduler serves.
    costs: dict[Source, UpdateCost] = {}
    last_cost: UpdateCost | None = None
    #: Seconds the engine spent on the last capture and on writing it.
    snapshot_seconds: Seconds | None = None
    #: CUDA out-of-memory errors that torch has raised in the process; ``None``: not known.
    out_of_memory: Count | None = None
    events_dropped: Count = 0
    #: Counts the snapshots of the rank; 0 where nobody counts.
    number: Count = 0
    #: Operations that have begun and not ended, and since when.
    running: dict[str, Seconds] = {}
    #: Where the exporter process is to keep ``weights_metadata`` files, and where what loads and
    #: updates are compared with is; empty: nowhere. Absolute paths.
    metadata_dir: str = ""
    reference_dir: str = ""
    manifest_dir: str = ""

    @property
    def order(self) -> tuple[str, tuple[int, int, int], float]:
        """Sorts ranks for people: by engine, ranks, and start."""
        return self.engine.name, self.ranks.order, self.started_at

    def with_progress(self, progress: Progress) -> Snapshot:
        """The snapshot with what has changed since it was written; as it is, where the progress is
        another snapshot's."""
        if progress.snapshot != self.number:
            return self
        return msgspec.structs.replace(
            self,
            weight_version=progress.weight_version,
            cache=progress.cache,
            costs=progress.costs,
            last_cost=progress.last_cost,
            running=progress.running,
            out_of_memory=progress.out_of_memory,
            roles=tuple(
                _with_progress(role, progress.roles[role.name])
                if role.name in progress.roles
                else msgspec.structs.replace(role, in_progress=None, rebalance=None)
                for role in self.roles
            ),
        )


class RoleProgress(Record, frozen=True, kw_only=True):
    """What changes of a role while an update goes on."""

    in_progress: UpdateInProgress
    rebalance: UpdateInProgress | None = None
    #: Totals, of sources that it has come through.
    calls: dict[Source, Count] = {}


class Progress(Record, frozen=True, kw_only=True):
    """What changes of a rank between two snapshots. A small file that is written in place, because
    an update is made of thousands of calls."""

    schema: Count = SCHEMA_VERSION
    #: Number of the snapshot that it goes with.
    snapshot: Count
    #: Of roles with an update in progress.
    roles: dict[str, RoleProgress] = {}
    weight_version: str = ""
    cache: CacheCounts | None = None
    costs: dict[Source, UpdateCost] = {}
    last_cost: UpdateCost | None = None
    running: dict[str, Seconds] = {}
    out_of_memory: Count | None = None


def _with_progress(role: Role, progress: RoleProgress) -> Role:
    updates = dict(role.updates)
    for source, calls in progress.calls.items():
        updates[source] = msgspec.structs.replace(updates.get(source, UpdateCounts()), calls=calls)
    return msgspec.structs.replace(
        role, in_progress=progress.in_progress, rebalance=progress.rebalance, updates=updates
    )
