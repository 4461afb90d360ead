# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One rank: puts together what happened, what is there, and who is notified.

It is handed a ledger that counts, an inspector that captures and a publisher that writes, and does
none of the three itself. The order of a step is always the same: the ledger is notified; the roles
whose updates have finished are captured; all of it is published. Steps of several threads follow
one another; none of them is held up while SGLang's own code runs.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.ledger import FinishedUpdate, Ledger
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.records.engine import HookState
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.fingerprints import During
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import NAMED_CHANGES, TableRef
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.store.rank import table_file
from sglang_weight_exporter.weight_table import WeightTable, compare_tables

Result = TypeVar("Result")

#: Tags of SGLang's memory saver (`sglang.srt.constants`).
WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"

#: What fingerprints may take of a load, kernels compiled, and of an update. A GPU's take some 10
#: milliseconds; a CPU reads about a gigabyte a second.
LOAD_FINGERPRINT_SECONDS = 30.0
UPDATE_FINGERPRINT_SECONDS = 2.0


class Rank:
    """The account of one process, published after every step.

    ``hooks``: SGLang's version → the state of every hook. ``errors``: exceptions of our own that
    were caught, by where.
    """

    def __init__(
        self,
        *,
        roles: Roles,
        inspector: ModelRunnerInspector,
        publisher: Publisher,
        hooks: Callable[[str], tuple[HookState, ...]],
        errors: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.roles = roles
        self.ledger = Ledger(
            clock=clock, trace_id=self._trace_id, cached_tokens=inspector.cached_tokens
        )
        self.inspector = inspector
        inspector.memory.released = lambda: self.ledger.released
        self._publisher = publisher
        self._hooks = hooks
        self._errors = errors
        self._clock = clock
        self._started_at = clock()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._events = 0
        #: Role → the fingerprint of the table in its last event.
        self._reported: dict[str, str] = {}

    def role(self, owner: Any) -> RunnerRole | None:
        """The role of a runner or of a component of one; ``None`` if it belongs to none."""
        with self._lock:
            role = self.roles.find(owner)
            if role is None:
                role = self.roles.add(owner)
                if role is not None:
                    self.ledger.add_role(role.name)
            return role

    def step(self, tell: Callable[[Ledger], Result], *, quietly: bool = False) -> Result | None:
        """Tell the ledger, look at what has ended, and publish.

        ``quietly``: publish only if something has ended. A forked child has its parent's memory
        and none of its weights, and does nothing.
        """
        if os.getpid() != self._pid:
            return None
        with self._lock:
            result = tell(self.ledger)
            ended = self.ledger.take_finished()
            written = {each.role for each in ended if _wrote(each)}
            events = dict(enumerate(self._complete(each, written) for each in ended))
            if events or not quietly:
                self._publish({index: event for index, event in events.items() if event})
            return result

    def capture(self, *roles: RunnerRole, derived: bool = False, pools: bool = False) -> None:
        """Look at roles before the next step: something else than an update has changed them."""
        if os.getpid() == self._pid:
            with self._lock:
                seconds = self._fingerprint_seconds(load=True) if derived else None
                self._capture(*roles, derived=derived, pools=pools, fingerprint_seconds=seconds)

    def _capture(self, *roles: RunnerRole, fingerprint_seconds: float | None, **how: bool) -> None:
        self.inspector.capture(*roles, fingerprint_seconds=fingerprint_seconds, **how)
        for role in roles if fingerprint_seconds is not None else ():
            skipped = self.inspector.of(role).skipped
            if skipped is not None:
                self.ledger.count_skipped(role.name, skipped)

    def _find_unexpected_writes(
        self, *roles: RunnerRole, during: During, garbage: frozenset[int] = frozenset()
    ) -> None:
        """Whether anything but loads and updates has written weights. ``garbage``: storages of
        which that is known."""
        self._capture(*roles, fingerprint_seconds=self._fingerprint_seconds(), written=False)
        for role in roles:
            self.inspector.ignore(role, garbage)
            self.ledger.count_modified(role.name, during, self.inspector.of(role).modified.values())

    def release(self, tags: Collection[str] | None) -> None:
        """Memory is gone; of these tags and of no others. ``None`` or empty: of all."""

        def tell(ledger: Ledger) -> None:
            ledger.release(self._saved(tags))
            self.inspector.memory_is_there = True
            self.inspector.read_memory()
            self.inspector.memory.end_release()

        self.step(tell)

    def resume(self, tags: Collection[str] | None) -> None:
        """Memory is back. What it holds is garbage until an update, unless SGLang kept a copy."""

        def tell(ledger: Ledger) -> None:
            resumed = self._saved(tags)
            if not resumed:
                return
            ledger.resume(resumed)
            for role in self.roles if WEIGHTS in resumed else ():
                if role.keeps_a_copy:
                    self._find_unexpected_writes(
                        role, during="release", garbage=self._without_a_copy()
                    )
                else:
                    self._capture(role, fingerprint_seconds=self._fingerprint_seconds())
                self.inspector.start_over(role, known=role.keeps_a_copy)
            self.inspector.read_memory()

        self.step(tell)

    def _saved(self, tags: Collection[str] | None) -> set[str]:
        """Those whose memory the saver has; of others SGLang answers, and does nothing."""
        target = self.roles.named("target")
        if target is None or not target.saves_memory:
            return set()
        saved = {WEIGHTS, KV_CACHE} | ({CUDA_GRAPH} if target.saves_graphs else set())
        return saved & set(tags or saved)

    def _without_a_copy(self) -> frozenset[int]:
        """Storages of models that are not copied. A draft that is holds some of its target's."""
        captures = (self.inspector.of(role) for role in self.roles if not role.keeps_a_copy)
        return frozenset[int]().union(*(look.weights.storages for look in captures if look.weights))

    def read_again(self, role: RunnerRole) -> None:
        """Somebody asks whether the weights are what they were; not inside an update."""
        if os.getpid() == self._pid:
            with self._lock:
                if not self.ledger.updating:
                    self._find_unexpected_writes(role, during="serving")

    def capture_before_update(self) -> float | None:
        """An update is about to begin; after it nobody could tell that something else wrote, nor
        what it has added to torch's memory. Of all roles, and before the first of them is written:
        a draft holds tensors of the target's. When this look began; ``None`` where there was none.
        """
        if os.getpid() != self._pid:
            return None
        with self._lock:
            there = self.inspector.memory_is_there and WEIGHTS not in self.ledger.released
            known = [role for role in self.roles if self.inspector.of(role).left is not None]
            if self.ledger.updating:
                return None
            self.inspector.begin_update()
            if not known or not there:
                return None
            began_at = self._clock()
            self._find_unexpected_writes(*known, during="serving")
            return began_at

    def _fingerprint_seconds(self, *, load: bool = False) -> float:
        """How long fingerprints may take now. A kernel that reads released memory ends the
        process."""
        if WEIGHTS in self.ledger.released:
            return 0.0
        return LOAD_FINGERPRINT_SECONDS if load else UPDATE_FINGERPRINT_SECONDS

    def lock_tables(self) -> None:
        """Weights are about to be written. Not inside a step: it may wait for readers."""
        if os.getpid() == self._pid:
            began_at = self._clock()
            self._publisher.lock_tables()
            self.ledger.add_time("wait", began_at)

    def _trace_id(self, number: int) -> str:
        """The same on every rank of the engine, on all of its hosts, without a word between
        them."""
        engine = self.roles.engine
        facts = f"{engine.group or engine.instance}|{number}"
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def _complete(
        self, ended: FinishedUpdate, written: set[str]
    ) -> tuple[Event, WeightTable | None] | None:
        """Look at what an update has changed; the event that tells of it. ``written``: roles whose
        updates have ended together; each is looked at once, for its own."""
        role = self.roles.named(ended.role)
        if role is None:
            return None
        if _wrote(ended):
            before = self.inspector.of(role).weights
            others = (
                other
                for other in self.roles
                if other.name not in written and not self.ledger.is_updating(other.name)
            )
            self._capture(role, *others, fingerprint_seconds=self._fingerprint_seconds())
            self.inspector.memory.end_update()
            after = self.inspector.of(role).weights
            changes = compare_tables(
                None if before is None else before.table, None if after is None else after.table
            )
            update = self.ledger.compare(
                ended,
                model_path=role.model_path,
                changes=changes,
                same_bytes=_same_bytes(before, after),
            )
        else:
            update = ended.update
        return None if update is None else self._event(role, update)

    def _event(self, role: RunnerRole, update: Update) -> tuple[Event, WeightTable | None]:
        self._events += 1
        weights = self.inspector.of(role).weights
        table = None if weights is None else weights.table
        event = Event(
            number=self._events,
            rank_id="",
            pid=self._pid,
            engine=self.roles.engine,
            ranks=self.roles.ranks,
            role=role.name,
            device=self.roles.describe(role.device),
            update=update,
            weights=None if weights is None else weights.usage,
            table=self._table_ref(role),
            previous_sha256=self._reported.get(role.name, ""),
        )
        self._reported[role.name] = "" if table is None else table.sha256
        return event, table

    def _publish(self, events: dict[int, tuple[Event, WeightTable | None]]) -> None:
        if not self.roles.engine.instance:
            return  # It is not known yet whose account this is.
        tables = {}
        for role in self.roles:
            weights = self.inspector.of(role).weights
            if weights is not None:
                tables[role.name] = weights.table
        self._publisher.publish(self._snapshot(), tables, events)
        self._publisher.leave_memory(self.inspector.dump_memory)
        if not self.ledger.in_session():
            self._publisher.unlock_tables(update_is_over=not self.ledger.updating)

    def _snapshot(self) -> Snapshot:
        engine = self.roles.engine
        memory = self.inspector.memory.devices()
        for each in memory:
            self.roles.describe(each.device)
        return Snapshot(
            rank_id="",
            pid=self._pid,
            started_at=self._started_at,
            engine=engine,
            ranks=self.roles.ranks,
            devices=self.roles.devices,
            memory=memory,
            budget=self.roles.budget,
            roles=tuple(map(self._role, self.roles)),
            weight_version=self.ledger.weight_version,
            hooks=self._hooks(engine.sglang_version),
            hook_errors=self._errors(),
            operations=self.ledger.operations,
            update_groups=self.ledger.update_groups,
            cache=self.ledger.cache,
            snapshot_seconds=self.inspector.seconds,
        )

    def _role(self, role: RunnerRole) -> Role:
        look = self.inspector.of(role)
        weights = None if look.weights is None else look.weights.usage
        config = getattr(role.runner, "model_config", None)
        architectures = getattr(getattr(config, "hf_config", None), "architectures", None) or ()
        released = self.ledger.released
        record = Role(
            name=role.name,
            device=role.device,
            architecture=", ".join(architectures),
            quantization=str(getattr(config, "quantization", None) or ""),
            weights=weights,
            resident=_resident(
                weights,
                None if look.weights is None else look.weights.outside_saver,
                WEIGHTS in released,
            ),
            table=self._table_ref(role),
            kv_pools=look.kv_pools,
            kv_resident=_resident(look.kv_pools, look.kv_outside_saver, KV_CACHE in released),
            lora=look.lora,
            fingerprints=(
                self.ledger.fingerprint_counts(role.name)
                if self.inspector.takes_fingerprints
                else None
            ),
        )
        return self.ledger.describe(role.name, record)

    def _table_ref(self, role: RunnerRole) -> TableRef | None:
        look = self.inspector.of(role)
        weights = look.weights
        if weights is None:
            return None
        released = WEIGHTS in self.ledger.released
        known = look.left is not None and weights.table.fingerprint != ""
        # Buffers are counted by their kind and are no weights here: a forward pass may write them.
        modified = tuple(name for name, kind in look.modified.items() if kind != "buffer")
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
        )


def _wrote(ended: FinishedUpdate) -> bool:
    """Whether an update or a session has ended, and no load."""
    return ended.update is None or ended.update.action == "update"


def _same_bytes(before: WeightCapture | None, after: WeightCapture | None) -> bool:
    if before is None or after is None:
        return False
    return "" != before.table.fingerprint == after.table.fingerprint


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
