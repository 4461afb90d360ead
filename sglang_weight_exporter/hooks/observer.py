# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One rank's memory of what happened to its weights; every event of it becomes a file.

Each method is what one meaning in the table of targets stands for: a generator that runs to its
``yield`` before SGLang's code and goes on with the outcome after it. Exceptions are caught by the
caller. SGLang calls all targets of a rank from one thread, so there are no locks.

An update of several calls ends in one of three ways, whichever the release offers: the end of its
session (0.5.21 and later), a request that asks for the cache to be flushed, or no call for
:data:`IDLE_SECONDS` (a heuristic, for clients that never ask).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from sglang_weight_exporter.capture import devices
from sglang_weight_exporter.capture.changes import compare
from sglang_weight_exporter.capture.regions import AllocationMap
from sglang_weight_exporter.capture.weights import WeightCapture, capture_weights, storages_of
from sglang_weight_exporter.export.supervisor import Supervisor
from sglang_weight_exporter.hooks import identity, pools
from sglang_weight_exporter.hooks.calls import Around, Call, Outcome, effect_of, verdict_on
from sglang_weight_exporter.records import (
    CHANGES,
    SOURCES,
    Change,
    Device,
    Effect,
    Engine,
    Event,
    KvPoolUsage,
    LoraUsage,
    OperationCounts,
    Ranks,
    Role,
    Snapshot,
    Source,
    TableRef,
    Update,
    UpdateCounts,
    UpdateInProgress,
)
from sglang_weight_exporter.store.claims import claim_engine_name
from sglang_weight_exporter.store.rank import RankStore, table_file
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, RuntimeDirError
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.store.weights_metadata import MetadataFiles

if TYPE_CHECKING:
    from sglang_weight_exporter.hooks.install import Installation
    from sglang_weight_exporter.settings import Settings

logger = logging.getLogger("sglang_weight_exporter")

#: An update whose release reports no end counts as ended after this long without a call.
IDLE_SECONDS = 10.0

#: Tags of SGLang's memory saver (`sglang.srt.constants`).
_WEIGHTS, _KV_CACHE = "weights", "kv_cache"


@dataclass
class _OpenUpdate:
    """A load or update that has begun."""

    source: Source | None
    number: int
    started_at: float
    last_call_at: float
    session: bool = False
    #: SGLang will report the end: of a session, or of a rebalance.
    bounded: bool = False
    #: A call that writes weights is running.
    calling: bool = False
    calls: int = 0
    failed: bool = False
    effect: Effect = "unchanged"
    message: str = ""
    weight_version: str = ""

    def record(self, succeeded: bool, effect: Effect, message: str, at: float) -> None:
        self.calls += 1
        self.calling = False
        self.last_call_at = at
        if not succeeded:
            self.failed = True
            self.message = message
        effects = {self.effect, effect}
        if "undefined" in effects or (self.failed and "changed" in effects):
            self.effect = "undefined"  # Some buckets of several are in, and some are not.
        elif "changed" in effects:
            self.effect = "changed"

    def record_refusal(self, message: str) -> None:
        """All calls succeeded, and what SGLang does after them did not: the cache keeps what the
        old weights left in it. The weights are the new ones."""
        self.failed, self.message = True, message


@dataclass
class _Role:
    """What is known of one model runner."""

    name: str
    runner: weakref.ref[Any]
    device: str
    capture: WeightCapture | None = None
    table: TableRef | None = None
    #: Of the checkpoint that is served; SGLang's own is overwritten by an update that fails.
    model_path: str = ""
    #: The table as the last event had it.
    reported: WeightCapture | None = None
    kv_pools: tuple[KvPoolUsage, ...] | None = None
    lora: tuple[LoraUsage, ...] = ()
    loaded_at: float | None = None
    load_seconds: float | None = None
    updated_at: float | None = None
    updates: dict[Source, UpdateCounts] = field(
        default_factory=lambda: {source: UpdateCounts() for source in SOURCES}
    )
    moved: int = 0
    changes: dict[Change, int] = field(default_factory=lambda: dict.fromkeys(CHANGES, 0))
    open: _OpenUpdate | None = None
    last_update: Update | None = None
    #: When a load began that has left placeholders, whose values come later.
    loading_since: float | None = None
    #: A load whose event waits until the pools are allocated: the table still changes till then.
    unreported_load: Update | None = None


@dataclass
class _Request:
    """A request of the scheduler that is being served."""

    number: int
    flush_cache: bool
    weight_version: str


class Observer:
    """Turns calls of SGLang into the snapshot, the tables and the events of this rank."""

    def __init__(
        self,
        *,
        settings: Settings,
        environ: Mapping[str, str],
        installation: Installation,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._installation = installation
        self._clock = clock
        self._store: RankStore | None = None
        self._refused = False
        self._supervisor: Supervisor | None = None
        directory = settings.metadata_dir
        self._metadata = None if directory is None else MetadataFiles(directory)
        self._started_at = clock()
        self._engine = Engine(name="", instance="")
        self._ranks = Ranks()
        self._devices: dict[str, Device] = {}
        self._roles: dict[str, _Role] = {}
        self._number = 0
        self._events = 0
        self._generation = 0
        self._request: _Request | None = None
        self._moving_experts = False
        #: Inside a rebalance, which goes on between forward passes.
        self._rebalancing = False
        #: Calls since the first runner's session began.
        self._session_calls = 0
        self._dp_rank: int | None = None
        self._weight_version = ""
        self._operations: dict[str, OperationCounts] = {}
        self._groups: set[str] = set()
        self._released: set[str] = set()
        self._snapshot_seconds: float | None = None
        #: Inside ``Scheduler.__init__``, whose end reports the loads.
        self._starting = False
        self._load_began_at: float | None = None
        #: Addresses of storages that a weight-cache daemon holds.
        self._mapped: frozenset[int] = frozenset()

    # The life of a rank and of its model runners.

    def start(self, call: Call) -> Around:
        """``Scheduler.__init__``: a draft gives up its own embeddings for the target's after its
        pools are allocated, so the tables are true only when this has ended."""
        dp_rank = call.argument("dp_rank")
        if dp_rank is not None:
            self._dp_rank = int(dp_rank)
        self._starting = True
        yield
        self._starting = False
        for role in self._roles.values():
            if role.loaded_at is not None:
                self._scan(role)
            self._report_load(role)
        self._write()

    def construct(self, call: Call) -> Around:
        """``ModelRunner.__init__``: loads the model somewhere inside, and changes it after that."""
        outcome = yield
        role = self._find_role(_runner(call.owner))
        if role is not None and outcome.error is None:
            self._scan(role)
            if role.kv_pools is not None or not hasattr(call.owner, "alloc_memory_pool"):
                self._report_load(role)
            self._write()

    def load(self, call: Call) -> Around:
        """``ModelRunner.load_model``."""
        role = self._role(call.owner)
        if role is None:
            return
        started_at = self._clock()
        self._write()
        outcome = yield
        self._record_load(role, call.owner, outcome, started_at)
        if outcome.error is not None:
            self._report_load(role)
        else:
            self._scan(role)
        self._write()

    def _record_load(self, role: _Role, owner: Any, outcome: Outcome, started_at: float) -> None:
        self._number += 1
        ended_at = self._clock()
        if getattr(owner, "startup_weight_load", None) is not None:
            role.loading_since = started_at
        elif outcome.error is None:
            if role.loaded_at is None:
                role.loaded_at, role.load_seconds = ended_at, ended_at - started_at
            role.updated_at = ended_at
        if outcome.error is None:
            role.model_path = _model_path(owner)
            self._weight_version = self._weight_version or str(
                identity.server_setting(owner, "weight_version") or ""
            )
        update = Update(
            action="load",
            sequence=self._number,
            started_at=started_at,
            ended_at=ended_at,
            succeeded=outcome.error is None,
            effect="changed" if outcome.error is None else "undefined",
            message="" if outcome.error is None else repr(outcome.error),
            model_path=_model_path(owner),
            weight_version=self._weight_version,
            trace_id=self._trace_id(self._number),
        )
        role.last_update = role.unreported_load = update

    def finalize_load(self, call: Call) -> Around:
        """``finalize_startup_weight_load``: with overlapped loading, ``load_model`` returned with
        placeholders and the values have come only now."""
        outcome = yield
        role = self._find_role(_runner(call.owner))
        if role is None or role.loading_since is None or role.unreported_load is None:
            return
        started_at, role.loading_since = role.loading_since, None
        ended_at = self._clock()
        failed = outcome.error is not None
        if not failed:
            role.loaded_at = role.updated_at = ended_at
            role.load_seconds = ended_at - started_at
        role.last_update = role.unreported_load = msgspec.structs.replace(
            role.unreported_load,
            ended_at=ended_at,
            succeeded=not failed,
            effect="undefined" if failed else "changed",
            message=repr(outcome.error) if failed else "",
        )
        self._scan(role)
        self._report_load(role)
        self._write()

    def allocate_kv_pool(self, call: Call) -> Around:
        """Allocation of the KV pool, and its resize once CUDA graphs are captured."""
        outcome = yield
        role = self._role(call.owner)
        if role is not None and outcome.error is None:
            self._scan(role)
            if role.loaded_at is not None:
                self._report_load(role)
            self._write()

    # Models without a model runner.

    def begin_load(self, call: Call) -> Around:
        """``get_model_loader``, the first step of every load."""
        self._load_began_at = self._clock()
        yield

    def start_encoder(self, call: Call) -> Around:
        """``run_dp_worker`` of an encoder server; the encoder is told its rank when it is made."""
        self._dp_rank = int(call.argument("dp_rank"))
        yield

    def load_encoder(self, call: Call) -> Around:
        """``MMEncoder.__init__``, which loads the model."""
        outcome = yield
        self._loaded_without_runner(call.owner, outcome)

    def export_weights(self, call: Call) -> Around:
        """``WeightCacheDaemon._export_state``, the last step of its ``load``."""
        outcome = yield
        self._loaded_without_runner(call.owner, outcome)

    def _loaded_without_runner(self, owner: Any, outcome: Outcome) -> None:
        role = self._role_of(owner)
        if role is not None and self._load_began_at is not None:
            self._record_load(role, owner, outcome, self._load_began_at)
            self._scan(role)
            self._report_load(role)
            self._write()

    def map_weights(self, call: Call) -> Around:
        """``IpcModelLoader`` maps a weight-cache daemon's tensors: they count there."""
        outcome = yield
        if isinstance(outcome.result, torch.nn.Module):
            self._mapped |= storages_of(outcome.result)

    # Updates, at the level where tensors change.

    def update(self, call: Call) -> Around:
        """One call that writes weights: a whole update, or one bucket of it."""
        role = self._role(call.owner)
        way = call.target.source
        if role is None or way is None:
            return
        source: Source = "eplb" if self._moving_experts else way
        own = self._begin(role, source)
        outcome = yield
        succeeded, message = verdict_on(outcome)
        effect = effect_of(way, outcome, succeeded, message)
        self._record(role, source, succeeded, effect, message)
        if source in {"disk", "ipc"}:
            if self._request is not None:
                return  # It ends the update in a moment, and writes then.
            if own:
                self._end(role)
                return
        self._write()

    def receive(self, call: Call) -> Around:
        """Tensors arrive, to be loaded by further calls; seen for its failures."""
        role = self._role(call.owner)
        outcome = yield
        if role is not None and role.open is not None and outcome.error is not None:
            self._session_calls += 1
            role.open.source = call.target.source
            role.open.record(False, "unchanged", verdict_on(outcome)[1], self._clock())
            self._write()

    def begin_session(self, call: Call) -> Around:
        """An update with a beginning and an end, and any number of calls between."""
        role = self._role(call.owner)
        if role is None:
            return
        if role.open is not None and role.open.session and role.open.calls == 0:
            role.open = None  # The one before came to nothing: another runner's could not begin.
        if not any(other.open is not None and other.open.session for other in self._roles.values()):
            self._session_calls = 0
        self._begin(role, None, session=True)
        outcome = yield
        if outcome.error is not None:
            self._end(role)  # Quantized weights are unpacked in place: perhaps some of them.

    def end_session(self, call: Call) -> Around:
        """The session is over, and weights that were unpacked for it are packed again."""
        role = self._role(call.owner)
        outcome = yield
        if role is None or role.open is None:
            return
        open_ = role.open
        if outcome.error is not None:
            open_.source = open_.source or "p2p"
            open_.record(False, "undefined", verdict_on(outcome)[1], self._clock())
        elif self._session_calls == 0 and call.argument("run_post_load"):
            # Nothing came through SGLang: a peer wrote into the tensors (RDMA).
            self._record(role, "p2p", True, "changed", "")
        if open_.calls:
            open_.last_call_at = self._clock()
        self._end(role)
        if outcome.error is not None:
            self._begin(role, open_.source, session=True)  # SGLang leaves the session open.
        self._write()

    def request(self, call: Call) -> Around:
        """A request of the scheduler: where updates of several calls or runners end."""
        request = call.argument("recv_req")
        version = str(getattr(request, "weight_version", None) or "")
        for role in self._roles.values():
            open_ = role.open
            if (
                open_ is not None
                and not open_.session
                and version
                and open_.weight_version not in {"", version}
            ):
                self._end(role)
        self._number += 1
        self._request = served = _Request(
            number=self._number,
            flush_cache=bool(getattr(request, "flush_cache", False)),
            weight_version=version,
        )
        outcome = yield
        self._request = None
        succeeded, message = verdict_on(outcome)
        open_roles = [(role, role.open) for role in self._roles.values() if role.open is not None]
        only_flush_failed = not succeeded and not any(open_.failed for _, open_ in open_roles)
        for role, open_ in open_roles:
            if only_flush_failed and open_.calls:
                open_.record_refusal(message)
            if outcome.error is not None and open_.calls:
                self._end(role)  # Also a session: the exception ends the engine.
                continue
            if open_.session:
                continue
            if version and open_.effect == "changed":
                open_.weight_version = self._weight_version = version
            if not succeeded or served.flush_cache or open_.source in {"disk", "ipc"}:
                self._end(role)
        if any(role.open is not None for role, _ in open_roles):
            self._write()

    def change_version(self, call: Call) -> Around:
        """SGLang took note of a new weight version."""
        outcome = yield
        version = call.argument("new_version")
        if version is not None and outcome.error is None:
            self._weight_version = str(version)
            for role in self._roles.values():
                if role.open is not None:
                    role.open.weight_version = self._weight_version
            self._write()

    def external(self, call: Call) -> Around:
        """Code beside SGLang changes weights by its own means and says so."""
        role = self._role(call.owner)
        source = call.target.source
        if role is None or source is None:
            return
        own = self._begin(role, source)
        outcome = yield
        succeeded, message = verdict_on(outcome)
        self._record(role, source, succeeded, "changed" if succeeded else "undefined", message)
        if own:
            self._end(role)
        else:
            self._write()

    # Experts that move between ranks.

    def rebalance(self, call: Call) -> Around:
        """A rebalance moves experts layer by layer; all of it is one update."""
        self._rebalancing = True
        yield
        self._rebalancing = False
        role = self._target()
        if role is not None and role.open is not None and role.open.source == "eplb":
            self._end(role)

    def move_experts(self, call: Call) -> Around:
        """Some layers' experts move, from peers or again from disk."""
        role = self._target()
        if role is None or self._moving_experts:
            return
        self._begin(role, "eplb", bounded=self._rebalancing)
        self._moving_experts = True
        outcome = yield
        self._moving_experts = False
        succeeded, message = verdict_on(outcome)
        self._record(role, "eplb", succeeded, "changed" if succeeded else "undefined", message)
        if self._rebalancing:
            self._write()
        else:
            self._end(role)

    # Memory that is given back and taken again.

    def release(self, call: Call) -> Around:
        """Physical memory goes, addresses stay."""
        outcome = yield
        if outcome.error is None:
            self._released |= self._saved_tags(call)
            self._write()

    def resume(self, call: Call) -> Around:
        """Physical memory is back."""
        outcome = yield
        if outcome.error is None:
            self._released -= self._saved_tags(call)
            self._write()

    def _saved_tags(self, call: Call) -> set[str]:
        role = self._target()
        runner = None if role is None else role.runner()
        adapter = getattr(runner, "memory_saver_adapter", None)
        enabled = getattr(adapter, "enabled", None)
        if enabled is None:  # Until 0.4.3 only the class tells.
            enabled = adapter is not None and "Noop" not in type(adapter).__name__
        if not enabled:
            return set()  # The request was answered and did nothing.
        tags = getattr(call.argument("recv_req"), "tags", None)
        return {_WEIGHTS, _KV_CACHE} & set(tags or (_WEIGHTS, _KV_CACHE))

    # What surrounds an update.

    def open_group(self, call: Call) -> Around:
        """A process group for distributed updates."""
        outcome = yield
        if verdict_on(outcome)[0]:
            self._groups.add(str(call.argument("group_name")))
        self._count_operation(call.target.name, outcome)

    def close_group(self, call: Call) -> Around:
        """The group is gone."""
        outcome = yield
        if verdict_on(outcome)[0]:
            self._groups.discard(str(call.argument("group_name")))
        self._count_operation(call.target.name, outcome)

    def operate(self, call: Call) -> Around:
        """Weights are read, saved or sent."""
        outcome = yield
        self._count_operation(call.target.name, outcome)

    def read(self, call: Call) -> Around:
        """``get_weights_by_name``, which logs an error and answers with nothing."""
        outcome = yield
        found = outcome.result is not None
        self._count_operation(call.target.name, outcome, failed=not found)

    def check(self, call: Call) -> Around:
        """``check_weights``; its action ``reset_tensors`` overwrites the weights."""
        role = self._role(call.owner)
        if role is None or call.argument("action") != "reset_tensors":
            outcome = yield
            self._count_operation(call.target.name, outcome)
            return
        own = self._begin(role, "external")
        outcome = yield
        succeeded, message = verdict_on(outcome)
        self._record(role, "external", succeeded, "changed" if succeeded else "undefined", message)
        if own:
            self._end(role)
        self._count_operation(call.target.name, outcome)

    def lora(self, call: Call) -> Around:
        """An adapter is loaded or unloaded."""
        role = self._role(call.owner)
        outcome = yield
        if role is not None:
            self._scan(role)
        self._count_operation(call.target.name, outcome)

    def _count_operation(self, operation: str, outcome: Outcome, *, failed: bool = False) -> None:
        counts = self._operations.get(operation, OperationCounts())
        failed = failed or not verdict_on(outcome)[0]
        self._operations[operation] = OperationCounts(
            calls=counts.calls + 1, failures=counts.failures + failed
        )
        self._write()

    # Roles.

    def _find_role(self, runner: Any) -> _Role | None:
        for role in self._roles.values():
            if runner is not None and role.runner() is runner:
                return role
        return None

    def _target(self) -> _Role | None:
        return self._roles.get("target")

    def _role(self, owner: Any) -> _Role | None:
        """The role of a runner, or of the runner that a component belongs to."""
        runner = _runner(owner)
        return None if runner is None else self._role_of(runner)

    def _role_of(self, runner: Any) -> _Role | None:
        role = self._find_role(runner)
        if role is not None:
            return role
        if not self._open_store(runner):
            return None
        name = identity.role_of(runner)
        further = 1
        while name in self._roles and self._roles[name].runner() is not None:
            name = f"{identity.role_of(runner)}_{further}"
            further += 1
        role = _Role(name=name, runner=weakref.ref(runner), device=identity.device_of(runner))
        self._describe(role.device)
        self._roles[name] = role
        return role

    def _open_store(self, runner: Any) -> bool:
        if self._store is not None:
            return True
        if self._refused:
            return False
        try:
            runtime_dir = RuntimeDir.open(self._settings.runtime_dir, self._environ)
            rank_id = os.urandom(8).hex()
            self._ranks = identity.ranks_of(runner, self._dp_rank)
            self._engine = identity.engine_of(runner)
            with claim_engine_name(runtime_dir, self._engine, self._ranks) as name:
                self._engine = msgspec.structs.replace(self._engine, name=name)
                self._store = RankStore(runtime_dir, rank_id)
                self._write()
        except RuntimeDirError as error:
            self._refused = True
            logger.error("sglang_weight_exporter: %s", error)
            return False
        if self._settings.serve:
            self._supervisor = Supervisor(runtime_dir, self._environ)
            self._supervisor.start()
        return True

    def _describe(self, device: str) -> None:
        if device not in self._devices:
            try:
                self._devices[device] = devices.describe(device)
            except Exception as error:
                self._devices[device] = Device(name=device)
                self._installation.report("device", error)

    # Updates.

    def _begin(
        self, role: _Role, source: Source | None, *, session: bool = False, bounded: bool = False
    ) -> bool:
        """Open an update, or find the one that is open; whether this call opened it."""
        now = self._clock()
        open_ = role.open
        if open_ is not None and not open_.session:
            idle = not open_.bounded and now - open_.last_call_at > IDLE_SECONDS
            if idle or open_.source != source:
                self._end(role)
        if role.open is not None:
            # Readers take an update of several calls for ended when none came for a while: a call
            # may run for longer than that.
            role.open.calling = True
            self._write()
            self._lock_table()
            return False
        if self._request is None:
            self._number += 1
        role.open = _OpenUpdate(
            source=source,
            number=self._number if self._request is None else self._request.number,
            started_at=now,
            last_call_at=now,
            session=session,
            bounded=session or bounded,
            calling=not session,
            weight_version="" if self._request is None else self._request.weight_version,
        )
        self._write()
        self._lock_table()
        return True

    def _record(
        self, role: _Role, source: Source, succeeded: bool, effect: Effect, message: str
    ) -> None:
        """One call of the open update has returned."""
        counts = role.updates[source]
        role.updates[source] = msgspec.structs.replace(counts, calls=counts.calls + 1)
        self._session_calls += 1
        if role.open is not None:
            role.open.source = source
            role.open.record(succeeded, effect, message, self._clock())

    def _lock_table(self) -> None:
        """Weights are about to be written, and the snapshot says so already."""
        if self._store is not None:
            self._store.lock_table(wait_seconds=self._settings.reader_wait_seconds)

    def _end(self, role: _Role) -> None:
        """Close the open update: look at the memory again, count, report."""
        open_, role.open = role.open, None
        if open_ is None:
            return
        runner = role.runner()
        before = role.capture
        self._scan(role)
        for other in self._roles.values():
            if other is not role and other.open is None:
                self._scan(other)
        if open_.source is None:
            self._write()  # A session in which nothing was written to this runner.
            return
        changed = open_.effect != "unchanged"
        changes = compare(before, role.capture)
        trace_id = self._trace_id(open_.number)
        seconds = open_.last_call_at - open_.started_at
        counts = role.updates[open_.source]
        role.updates[open_.source] = msgspec.structs.replace(
            counts,
            updates=counts.updates + (open_.effect == "changed"),
            failures=counts.failures + open_.failed,
            duration=counts.duration.observe(seconds),
            trace_id=trace_id if open_.effect == "changed" else counts.trace_id,
            updated_at=open_.last_call_at if open_.effect == "changed" else counts.updated_at,
            seconds=seconds if open_.effect == "changed" else counts.seconds,
        )
        if changed:
            role.updated_at = open_.last_call_at
            role.model_path = _model_path(runner)
        role.moved += changes.moved
        for change in CHANGES:
            role.changes[change] += getattr(changes, change)
        role.last_update = Update(
            action="update",
            source=open_.source,
            sequence=open_.number,
            started_at=open_.started_at,
            ended_at=open_.last_call_at,
            calls=open_.calls,
            succeeded=not open_.failed,
            effect=open_.effect,
            message=open_.message,
            model_path=_model_path(runner),
            weight_version=open_.weight_version or self._weight_version,
            trace_id=trace_id,
            changes=changes,
        )
        self._report(role, role.last_update)
        self._write()

    def _report_load(self, role: _Role) -> None:
        if self._starting or role.loading_since is not None:
            return
        load, role.unreported_load = role.unreported_load, None
        if load is not None:
            self._report(role, load)

    def _report(self, role: _Role, update: Update) -> None:
        if self._store is None:
            return
        self._keep_metadata(role, self._store)
        self._events += 1
        event = Event(
            number=self._events,
            rank_id=self._store.rank_id,
            pid=os.getpid(),
            engine=self._engine,
            ranks=self._ranks,
            role=role.name,
            device=self._devices[role.device],
            update=update,
            weights=None if role.capture is None else role.capture.usage,
            table=role.table,
            previous_sha256="" if role.reported is None else role.reported.table.sha256,
        )
        role.reported = role.capture
        self._store.append_event(event)

    def _keep_metadata(self, role: _Role, store: RankStore) -> None:
        """Bring the ``weights_metadata`` files up to date, where somebody wants them."""
        if self._metadata is None:
            return
        try:
            if role.capture is None:
                self._metadata.remove(role.name)
                return
            self._metadata.update(
                Table(
                    rank_id=store.rank_id,
                    pid=os.getpid(),
                    started_at=self._started_at,
                    engine=self._engine,
                    ranks=self._ranks,
                    role=self._role_record(role),
                    weight_version=self._weight_version,
                    columns=role.capture.table,
                )
            )
        except OSError as error:
            self._installation.report("metadata_dir", error)

    def _trace_id(self, number: int) -> str:
        """The same on every rank of the engine, without a word between them."""
        facts = f"{self._engine.instance}|{number}"
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    # Looking and writing.

    def _scan(self, role: _Role) -> None:
        """Read pointers and bytes of a role again. What cannot be read becomes absent."""
        started = time.perf_counter()
        runner = role.runner()
        try:
            self._scan_weights(role, getattr(runner, "model", None))
        except Exception as error:
            role.capture = role.table = None
            self._installation.report("capture", error)
        try:
            counted: set[int] = set()
            for earlier in self._roles.values():
                if earlier is role:
                    break
                pools.kv_pools(earlier.runner(), counted)
            role.kv_pools = pools.kv_pools(runner, counted)
            role.lora = pools.lora_usage(runner)
        except Exception as error:
            role.kv_pools, role.lora = None, ()
            self._installation.report("kv_pool", error)
        self._snapshot_seconds = time.perf_counter() - started

    def _scan_weights(self, role: _Role, model: Any) -> None:
        if not isinstance(model, torch.nn.Module):
            role.capture = role.table = None
            return
        counted = self._mapped
        for earlier in self._roles.values():
            if earlier is role:
                break
            if earlier.capture is not None:
                counted |= earlier.capture.storages
        capture = capture_weights(
            model,
            role=role.name,
            captured_at=self._clock(),
            counted_elsewhere=counted,
            allocations=AllocationMap.of_cuda
            if role.device.startswith("cuda")
            else AllocationMap.of_storages,
            previous=role.capture,
        )
        for usage in capture.usage:
            self._describe(usage.device)
        table = capture.table
        if self._store is not None:
            self._store.write_table(table)
        role.capture = capture
        role.table = TableRef(
            file=table_file(role.name, table.sha256),
            sha256=table.sha256,
            rows=table.rows,
            regions=capture.regions,
            captured_at=table.captured_at,
        )

    def _write(self) -> None:
        """Publish the state, then let readers of tables in again unless a session goes on.

        Between the calls of an update without a session they may come in and find in the snapshot
        that it is not over: an update that nobody ends keeps nobody out.
        """
        if self._store is None:
            return
        try:
            self._store.write_snapshot(self._snapshot(self._store))
        finally:
            if not any(role.open and role.open.session for role in self._roles.values()):
                self._store.unlock_table()

    def _snapshot(self, store: RankStore) -> Snapshot:
        self._generation += 1
        return Snapshot(
            rank_id=store.rank_id,
            pid=os.getpid(),
            generation=self._generation,
            written_at=self._clock(),
            started_at=self._started_at,
            engine=self._engine,
            ranks=self._ranks,
            devices=tuple(self._devices.values()),
            roles=tuple(self._role_record(role) for role in self._roles.values()),
            weight_version=self._weight_version,
            hooks=self._installation.states(self._engine.sglang_version),
            hook_errors=dict(self._installation.errors),
            operations=self._operations,
            update_groups=len(self._groups),
            snapshot_seconds=self._snapshot_seconds,
            events_dropped=store.events_dropped,
        )

    def _role_record(self, role: _Role) -> Role:
        runner = role.runner()
        config = getattr(runner, "model_config", None)
        weights = None if role.capture is None else role.capture.usage
        return Role(
            name=role.name,
            device=role.device,
            architecture=", ".join(
                getattr(getattr(config, "hf_config", None), "architectures", None) or ()
            ),
            quantization=str(getattr(config, "quantization", None) or ""),
            model_path=role.model_path,
            weights=weights,
            resident=_resident(weights, released=_WEIGHTS in self._released),
            table=role.table,
            kv_pools=role.kv_pools,
            kv_resident=_resident(role.kv_pools, released=_KV_CACHE in self._released),
            lora=role.lora,
            loaded_at=role.loaded_at,
            load_seconds=role.load_seconds,
            updated_at=role.updated_at,
            updates=role.updates,
            moved=role.moved,
            changes=role.changes,
            in_progress=None
            if role.open is None
            else UpdateInProgress(
                source=role.open.source,
                started_at=role.open.started_at,
                last_call_at=role.open.last_call_at,
                calls=role.open.calls,
                failed=role.open.failed,
                idle_seconds=None if role.open.bounded or role.open.calling else IDLE_SECONDS,
            ),
            last_update=role.last_update,
        )


def _runner(owner: Any) -> Any:
    """The runner itself, or the one that a ``WeightUpdater`` or ``WeightExporter`` belongs to."""
    get_runner = getattr(owner, "get_model_runner", None)
    if get_runner is not None:
        return get_runner()
    return owner if hasattr(owner, "server_args") else None


def _model_path(runner: Any) -> str:
    """Of the model's configuration; a weight-cache daemon has the path itself."""
    return str(getattr(getattr(runner, "model_config", runner), "model_path", "") or "")


def _resident(usage: tuple[Any, ...] | None, *, released: bool) -> dict[str, int] | None:
    if usage is None:
        return None
    totals: dict[str, int] = {}
    for part in usage:
        totals[part.device] = totals.get(part.device, 0) + (0 if released else part.nbytes)
    return totals
