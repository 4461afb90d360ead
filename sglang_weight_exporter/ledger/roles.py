# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the parts of a ledger share: each role's account, and what has finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from sglang_weight_exporter.ledger.costs import Costs
from sglang_weight_exporter.ledger.layers import LayerRounds
from sglang_weight_exporter.ledger.open_update import FinishedUpdate, OpenUpdate, elapsed
from sglang_weight_exporter.records.contents import ChangedRows
from sglang_weight_exporter.records.snapshot import Role, RoleProgress
from sglang_weight_exporter.records.updates import (
    SOURCES,
    Phase,
    Source,
    Update,
    UpdateCounts,
    UpdateInProgress,
    add_bytes,
    add_phases,
)
from sglang_weight_exporter.records.weights import CHANGES, Change, TableChanges


@dataclass
class RoleAccount:
    """One role: its last load, its updates, and those that go on."""

    loaded_at: float | None = None
    load_seconds: float | None = None
    updated_at: float | None = None
    update_started_at: float | None = None
    #: The checkpoint that is served; SGLang's own is overwritten by an update that fails.
    model_path: str = ""
    updates: dict[Source, UpdateCounts] = field(
        default_factory=lambda: {source: UpdateCounts() for source in SOURCES}
    )
    moved: int = 0
    changes: dict[Change, int] = field(default_factory=lambda: dict.fromkeys(CHANGES, 0))
    update: OpenUpdate | None = None
    rebalance: OpenUpdate | None = None
    last_update: Update | None = None
    layers: LayerRounds = field(default_factory=LayerRounds)
    #: When a load began that has left placeholders, whose values come later.
    loading_since: float | None = None
    #: A load that is reported once the role's pools are allocated: its table changes till then.
    unreported_load: Update | None = None

    @property
    def open(self) -> tuple[OpenUpdate, ...]:
        return tuple(each for each in (self.update, self.rebalance) if each is not None)

    @property
    def _going_on(self) -> tuple[UpdateInProgress | None, UpdateInProgress | None]:
        """For readers: one that is idle may be over for them, and a rebalance beside it is not."""
        first, second, *_ = (*(each.in_progress for each in self.open), None, None)
        return first, second

    def describe(self, record: Role) -> Role:
        """A record of the role, completed by this account."""
        in_progress, rebalance = self._going_on
        return msgspec.structs.replace(
            record,
            model_path=self.model_path,
            loaded_at=self.loaded_at,
            load_seconds=self.load_seconds,
            updated_at=self.updated_at,
            update_started_at=self.update_started_at,
            updates=dict(self.updates),
            moved=self.moved,
            changes=dict(self.changes),
            in_progress=in_progress,
            rebalance=rebalance,
            last_update=self.last_update,
            layers_missed=self.layers.missed,
        )

    def progress(self) -> RoleProgress | None:
        """What changes while an update goes on; ``None``: none does."""
        in_progress, rebalance = self._going_on
        if in_progress is None:
            return None
        return RoleProgress(
            in_progress=in_progress,
            rebalance=rebalance,
            # Of every source: a session may have had calls of several.
            calls={source: each.calls for source, each in self.updates.items() if each.calls},
        )

    def count_contents(self, source: Source, contents: ChangedRows) -> None:
        """What an update that succeeded has changed."""
        if contents.same:
            self.count(source, without_change=self.updates[source].without_change + 1)
        if source != "eplb":  # Experts move, and nothing is trained.
            self.layers.count(contents)

    def count(self, source: Source, **changes: object) -> None:
        """Replace counts of a source."""
        self.updates[source] = msgspec.structs.replace(self.updates[source], **changes)


class RoleAccounts:
    """The roles of a process, by name, under one lock.

    ``trace_id``: update number → the trace of its span.
    """

    def __init__(self, *, clock: Callable[[], float], trace_id: Callable[[int], str]) -> None:
        self.lock = threading.RLock()
        self.costs = Costs(self.lock, clock=clock)
        self.clock = clock
        self.by_name: dict[str, RoleAccount] = {}
        self.weight_version = ""
        #: Loads, updates and requests so far.
        self.number = 0
        self._trace_id = trace_id
        self._finished: list[FinishedUpdate] = []

    def __getitem__(self, name: str) -> RoleAccount:
        return self.by_name[name]

    def add(self, name: str) -> None:
        """A model runner of this role has appeared. One of the same name that went before it has
        left its counts, which belong to the process."""
        before = self.by_name.get(name, RoleAccount())
        self.by_name[name] = RoleAccount(
            updates=before.updates, moved=before.moved, changes=before.changes
        )

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def take_finished(self) -> list[FinishedUpdate]:
        finished, self._finished = self._finished, []
        return finished

    def finish_load(self, name: str, load: Update) -> None:
        """A load is reported."""
        # Ranks on several hosts know only now that they are one engine.
        load = msgspec.structs.replace(load, trace_id=self._trace_id(load.sequence))
        self[name].last_update = load
        self._finished.append(FinishedUpdate(name, load))

    def finish(self, name: str, open_: OpenUpdate, *, at: float | None = None) -> None:
        """Close an update and count it. ``at``: it ends only now, and not with its last call."""
        role = self[name]
        if role.update is open_:
            role.update = None
        elif role.rebalance is open_:
            role.rebalance = None
        else:
            return
        if open_.source is None:
            self._finished.append(FinishedUpdate(name, None))
            return
        if at is not None:
            open_.set_phase("wait", at)
        self._count(name, open_, open_.source, at)

    def finish_updates(self, *names: str) -> None:
        """Close what is open of these roles."""
        for name in names:
            if (open_ := self[name].update) is not None:
                self.finish(name, open_)

    def count_refused(self, name: str, open_: OpenUpdate) -> None:
        """Count an update that SGLang refused before it had begun."""
        if open_.source is not None:
            self._count(name, open_, open_.source, None)

    def _count(self, name: str, open_: OpenUpdate, source: Source, at: float | None) -> None:
        role = self[name]
        trace_id = self._trace_id(open_.number)
        counts = role.updates[source]
        role.count(source, failures=counts.failures + open_.failed)
        if open_.effect == "changed":
            role.count(
                source,
                updates=counts.updates + 1,
                trace_id=trace_id,
                updated_at=open_.last_call_at,
            )
            role.update_started_at = open_.started_at
        if open_.effect != "unchanged":
            role.updated_at = open_.last_call_at
        role.last_update = open_.finished(
            at=at, weight_version=self.weight_version, trace_id=trace_id
        )
        if source != "eplb":  # It goes on inside forward passes.
            cost = self.costs.end_update(name, open_.number, source, role.last_update.ended_at)
            role.last_update = msgspec.structs.replace(role.last_update, cost=cost)
        self._finished.append(FinishedUpdate(name, role.last_update, at))

    def complete(
        self,
        finished: FinishedUpdate,
        *,
        model_path: str,
        changes: TableChanges,
        contents: ChangedRows | None,
    ) -> Update | None:
        """Add what the capture after an update found. The capture is part of the update as long as
        SGLang waits for it."""
        update = finished.update
        role = self[finished.role]
        if update is None or update.source is None:
            return update
        complete = msgspec.structs.replace(
            update,
            model_path=model_path,
            changes=changes,
            contents=None if contents is None else contents.changes,
        )
        at = finished.at
        if finished.arrived_at is not None and finished.arrived_at > update.ended_at:
            late: dict[Phase, float] = {"receive": finished.arrived_at - update.ended_at}
            at, phases = finished.arrived_at, add_phases(complete.phases, late)
            complete = msgspec.structs.replace(complete, ended_at=at, phases=phases)
        if at is not None:
            now = self.clock() if finished.went_on_at is None else finished.went_on_at
            capture: dict[Phase, float] = {"capture": elapsed(at, now)}
            phases = add_phases(complete.phases, capture)
            complete = msgspec.structs.replace(complete, ended_at=max(at, now), phases=phases)
        _count_time(role, update.source, complete)
        if role.last_update is update:
            role.last_update = complete
        if update.effect != "unchanged":
            role.model_path = model_path
        if contents is not None and update.succeeded and update.effect == "changed":
            role.count_contents(update.source, contents)
        role.moved += changes.moved
        for change in CHANGES:
            role.changes[change] += getattr(changes, change)
        return complete


def _count_time(role: RoleAccount, source: Source, update: Update) -> None:
    counts = role.updates[source]
    seconds = elapsed(update.started_at, update.ended_at)
    role.count(
        source,
        duration=counts.duration.observe(seconds),
        seconds=seconds if update.effect == "changed" else counts.seconds,
        phases=add_phases(counts.phases, update.phases),
        nbytes=add_bytes(counts.nbytes, update.nbytes),
    )
