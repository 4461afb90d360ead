# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The records of a rank, from its roles, its ledger and the inspector's captures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from sglang_weight_exporter.ledger import Ledger
from sglang_weight_exporter.records.engine import HookState
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Progress, Role, Snapshot
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import NAMED_CHANGES, TableRef
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.store.rank import table_file
from sglang_weight_exporter.weight_table import WeightTable

#: Tags of SGLang's memory saver (`sglang.srt.constants`).
WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"


class RankRecords:
    """Snapshots and events of one rank.

    ``hooks``: SGLang's version → the state of every hook. ``errors``: exceptions of our own that
    were caught, by where.
    """

    def __init__(
        self,
        *,
        roles: Roles,
        ledger: Ledger,
        inspector: ModelRunnerInspector,
        hooks: Callable[[str], tuple[HookState, ...]],
        errors: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self._roles = roles
        self._ledger = ledger
        self._inspector = inspector
        self._hooks = hooks
        self._errors = errors
        self._started_at = clock()
        self._events = 0
        #: Role → the fingerprint of the table in its last event.
        self._reported: dict[str, str] = {}

    def tables(self) -> dict[str, WeightTable]:
        """By role, those that the snapshot names."""
        captures = {role.name: self._inspector.of(role).weights for role in self._roles}
        return {name: weights.table for name, weights in captures.items() if weights is not None}

    def event(self, role: RunnerRole, update: Update) -> tuple[Event, WeightTable | None]:
        """What is exported of a load or update that has ended, with the table after it."""
        self._events += 1
        weights = self._inspector.of(role).weights
        table = None if weights is None else weights.table
        event = Event(
            number=self._events,
            rank_id="",
            pid=os.getpid(),
            engine=self._roles.engine,
            ranks=self._roles.ranks,
            role=role.name,
            device=self._roles.describe(role.device),
            update=update,
            weights=None if weights is None else weights.usage,
            table=self._table_ref(role),
            previous_sha256=self._reported.get(role.name, ""),
        )
        self._reported[role.name] = "" if table is None else table.sha256
        return event, table

    def snapshot(self) -> Snapshot:
        """All that holds now."""
        engine = self._roles.engine
        memory = self._inspector.memory.devices()
        for each in memory:
            self._roles.describe(each.device)
        return Snapshot(
            rank_id="",
            pid=os.getpid(),
            started_at=self._started_at,
            engine=engine,
            ranks=self._roles.ranks,
            devices=self._roles.devices,
            memory=memory,
            budget=self._roles.budget,
            roles=tuple(map(self._role, self._roles)),
            weight_version=self._ledger.weight_version,
            hooks=self._hooks(engine.sglang_version),
            hook_errors=self._errors(),
            operations=self._ledger.counters.operations,
            update_groups=self._ledger.counters.update_groups,
            cache=self._ledger.prefix_cache.counts,
            costs=self._ledger.costs.totals,
            last_cost=self._ledger.costs.last,
            snapshot_seconds=self._inspector.seconds,
            out_of_memory=self._ledger.counters.out_of_memory,
            running=self._ledger.counters.running,
        )

    def progress(self) -> Progress:
        """What has changed since the snapshot, while an update or an operation goes on."""
        return Progress(
            snapshot=0,
            roles=self._ledger.progress(),
            weight_version=self._ledger.weight_version,
            cache=self._ledger.prefix_cache.counts,
            costs=self._ledger.costs.totals,
            last_cost=self._ledger.costs.last,
            running=self._ledger.counters.running,
            out_of_memory=self._ledger.counters.out_of_memory,
        )

    def _role(self, role: RunnerRole) -> Role:
        capture = self._inspector.of(role)
        weights = None if capture.weights is None else capture.weights.usage
        outside_saver = None if capture.weights is None else capture.weights.outside_saver
        config = getattr(role.runner, "model_config", None)
        architectures = getattr(getattr(config, "hf_config", None), "architectures", None) or ()
        released = self._ledger.counters.released
        fingerprints = None
        if self._inspector.takes_fingerprints:
            fingerprints = self._ledger.counters.fingerprints(role.name)
        record = Role(
            name=role.name,
            device=role.device,
            architecture=", ".join(architectures),
            quantization=str(getattr(config, "quantization", None) or ""),
            weights=weights,
            resident=_resident(weights, outside_saver, WEIGHTS in released),
            table=self._table_ref(role),
            kv_pools=capture.kv_pools,
            kv_resident=_resident(capture.kv_pools, capture.kv_outside_saver, KV_CACHE in released),
            lora=capture.lora,
            adapters=self._inspector.adapters(role),
            fingerprints=fingerprints,
        )
        return self._ledger.describe(role.name, record)

    def _table_ref(self, role: RunnerRole) -> TableRef | None:
        capture = self._inspector.of(role)
        weights = capture.weights
        if weights is None:
            return None
        released = WEIGHTS in self._ledger.counters.released
        known = capture.left is not None and weights.table.fingerprint != ""
        # Buffers are no weights here: after a release they may be SGLang's to compute again.
        modified = tuple(name for name, kind in capture.modified.items() if kind != "buffer")
        return TableRef(
            file=table_file(weights.table),
            sha256=weights.table.sha256,
            rows=weights.table.rows,
            regions=weights.regions,
            captured_at=weights.table.captured_at,
            fingerprint="" if released else weights.table.fingerprint,
            fingerprint_seconds=None if released else weights.table.fingerprint_seconds,
            modified=None if released or not known else len(modified),
            modified_names=modified[:NAMED_CHANGES],
            scratch=len(capture.scratch),
            scratch_names=capture.scratch[:NAMED_CHANGES],
        )


def trace_id(engine: str, number: int) -> str:
    """Of an update's span: the same on all ranks that have ``engine`` in common, unasked."""
    return hashlib.sha256(f"{engine}|{number}".encode()).hexdigest()[:32]


def _resident(
    usage: tuple[Any, ...] | None, outside_saver: dict[str, int] | None, released: bool
) -> dict[str, int] | None:
    """Bytes by device that have physical memory now."""
    if usage is None:
        return None
    totals: dict[str, int] = {}
    for part in usage:
        totals[part.device] = totals.get(part.device, 0) + part.nbytes
    if not released:
        return totals
    return {device: (outside_saver or {}).get(device, 0) for device in totals}
