# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is published against a model of SGLang, for requests in any order and with any outcome.

SGLang's scheduler is itself: :class:`Engine` runs its ``SchedulerWeightUpdaterManager`` (before
0.5.13 ``SchedulerUpdateWeightsMixin``) and its ``EPLBManager`` from the source that is installed,
below them model runners that do as they are told, and around both the hooks. :class:`Model` was
written from SGLang's sources and from what the documents say is counted, and not from the ledger.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang_sources import Source
from standins import Rank

from sglang_weight_exporter.hooks.targets import (
    EPLB_MANAGER,
    SCHEDULER,
    SCHEDULER_COMPONENT,
    UPDATER,
)
from sglang_weight_exporter.ledger import IDLE_SECONDS

# ------------------------------------------------------------------------------------ SGLang

#: What a runner's call does to the weights: all that it was to write, nothing, or some of it.
Written = Literal["all", "none", "some"]


@dataclass(frozen=True)
class Outcome:
    """How a runner's call ends, in the words of SGLang 0.5.23's ``WeightUpdater``."""

    written: Written
    message: str = ""
    #: It raises, and the scheduler's process ends with that.
    fatal: bool = False


DONE = Outcome("all")
DERIVED = Outcome("none", "Online weight updates are not supported while compensated mHC weight")
SHARED = Outcome("none", "[weight_cache] update is not supported while the weight cache is", True)
REFUSALS = {
    "disk": (DERIVED, Outcome("none", "Failed to get model loader: x."), SHARED),
    "tensor": (DERIVED, SHARED),
    "distributed": (DERIVED, SHARED),
    "ipc": (DERIVED, Outcome("none", "IPC weight update failed: ImportError x"), SHARED),
}
FAILURES = {
    "disk": (
        Outcome("some", "Failed to update weights: x.\nRolling back to original weights."),
        Outcome("some", "No such file", True),  # The rollback's.
    ),
    "tensor": (Outcome("some", "shapes differ", True),),
    "distributed": (
        Outcome("some", "Failed to update parameter online: x. The full weights of the ModelRunner"
                        " are partially updated. Please discard the whole weights."),
    ),
    "ipc": (Outcome("some", "zmq"),),
}  # fmt: skip


@dataclass
class Facts:
    """What runners and the scheduler did in one request."""

    #: Role, and what its call wrote.
    calls: list[tuple[str, Written]] = field(default_factory=list)
    not_received: bool = False
    flush_refused: bool = False


class WeightUpdater:
    """A runner's; what it does is the engine's to say."""

    def __init__(self, engine: Engine, name: str, runner: Any) -> None:
        self.engine, self.name, self._runner = engine, name, runner

    def get_model_runner(self) -> Any:
        return self._runner

    def update_weights_from_disk(
        self, model_path: str, load_format: str, weight_name_filter: Any = None, **more: Any
    ) -> Any:
        return self.engine.write(self.name, "disk")

    def update_weights_from_tensor(self, named_tensors: Any, load_format: Any = None) -> Any:
        return self.engine.write(self.name, "tensor")

    def update_weights_from_ipc(self, recv_req: Any) -> Any:
        return self.engine.write(self.name, "ipc")

    def update_weights_from_distributed(self, names: Any, *more: Any) -> Any:  # Until 0.5.20.
        return self.engine.write(self.name, "distributed")

    def receive_weights_from_distributed(self, *, names: Any, **more: Any) -> Any:
        return self.engine.receive()

    def load_weights_from_distributed(self, named_tensors: Any) -> Any:
        return self.engine.write(self.name, "distributed")

    def begin_weight_update(self) -> None:
        """Unpacks what was packed."""

    def end_weight_update(self, *, run_post_load: bool) -> None:
        """Packs it again."""


class Scheduler:
    """What the weights' manager asks of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tree_cache = SimpleNamespace(evictable_size=int, protected_size=int)
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(reqs=[])

    def flush_cache(self, empty_cache: bool = True) -> bool:
        self.engine.facts.flush_refused = not self.engine.flushes
        return self.engine.flushes

    def record_weight_version_change(self, new_version: str | None) -> None:
        pass


class Request(SimpleNamespace):
    """Of any kind, with SGLang's defaults."""

    def __init__(self, **fields: Any) -> None:
        defaults = {"flush_cache": True, "weight_version": None, "selector": "all"}
        more = {"model_path": "other", "load_format": None, "recapture_cuda_graph": False}
        lists = {"names": [], "dtypes": [], "shapes": [], "group_name": "g"}
        tensors = {"serialized_named_tensors": [b""], "torch_empty_cache": False}
        super().__init__(**{**defaults, **more, **lists, **tensors, **fields})


class SchedulerWeightUpdaterManager:
    """As until 0.5.20, without sessions: ``SchedulerUpdateWeightsMixin`` of 0.5.9 and
    ``EAGLEWorker.update_weights_from_tensor``, and from 0.5.11 on drafts from disk and IPC."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.target, *self.drafts = engine.runners

    def update_weights_from_disk(self, recv_req: Any) -> Any:
        return self._answer(recv_req, "disk", [self.target, *self.drafts])

    def update_weights_from_ipc(self, recv_req: Any) -> Any:
        return self._answer(recv_req, "ipc", [self.target, *self.drafts])

    def update_weights_from_distributed(self, recv_req: Any) -> Any:
        return self._answer(recv_req, "distributed", [self.target])

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        return self._answer(recv_req, "tensor", [*self.drafts, self.target])

    def _answer(self, recv_req: Any, source: str, runners: list[Any]) -> Any:
        arguments: dict[str, list[Any]] = {
            "disk": ["other", "auto"],
            "tensor": [[]],
            "ipc": [recv_req],
        }
        success, message = True, ""
        for runner in runners:
            call = getattr(runner.weight_updater, f"update_weights_from_{source}")
            success, message = call(*arguments.get(source, [[], [], [], "g"]))
            if not success:
                break
        if success and recv_req.flush_cache:
            flush_cache_success = self.engine.scheduler.flush_cache()
            assert flush_cache_success, "Cache flush failed after updating weights"
        return SimpleNamespace(success=success, message=message)


class Engine:
    """One scheduler with its target and its drafts; from 0.5.21 on it has sessions."""

    updates: Source
    balancer: Source

    def __init__(self, directory: Path, *, drafts: int, has_sessions: bool) -> None:
        self.rank = Rank(directory)
        updaters = self.rank.hook(UPDATER, WeightUpdater)
        self.outcomes: Iterator[Outcome] = iter(())
        self.arrives = self.flushes = True
        self.missing, self.moved = False, 0
        self.facts = Facts()
        several = drafts > 1
        names = [f"draft_{index}" for index in range(drafts)] if several else ["draft"][:drafts]
        self.roles = ("target", *names)
        self.runners = []
        for index, role in enumerate(self.roles):
            step = {"draft_model_idx": index - 1} if several and index else {}
            runner = self.rank.runner(is_draft_worker=index > 0, **step)
            runner.weight_updater = updaters(self, role, runner)
            self.runners.append(runner)
        self.scheduler = self.rank.hook(SCHEDULER, Scheduler)(self)
        self.manager = self._manager() if has_sessions else self._old_manager()
        self.balancers = self.balancer.run(
            get_parallel=lambda: SimpleNamespace(nnodes=1, tp_rank=0),
            ElasticEPStateManager=SimpleNamespace(instance=lambda: None),
        )
        self.rank.installation.on_import(self.balancers)

    def _old_manager(self) -> Any:
        return self.rank.hook(SCHEDULER_COMPONENT, SchedulerWeightUpdaterManager)(self)

    def _manager(self) -> Any:
        """SGLang's own, as its scheduler makes it."""
        module = self.updates.run()
        barrier = SimpleNamespace(barrier=lambda group: None)
        vars(module)["torch"] = SimpleNamespace(distributed=barrier)
        self.rank.installation.on_import(module)
        target, *drafts = zip(self.roles, self.runners, strict=True)
        manager = object.__new__(module.SchedulerWeightUpdaterManager)
        for name, value in {
            "tp_worker": SimpleNamespace(
                model_runner=target[1],
                weight_update_runners=lambda: [target],
                deserialize_own_rank=lambda serialized: [],
            ),
            "draft_worker": SimpleNamespace(weight_update_runners=lambda: drafts),
            "flush_cache": self.scheduler.flush_cache,
            "scheduler": self.scheduler,
            "metrics_collector": None,
            "_session": None,
            "tp_cpu_group": None,
        }.items():
            setattr(manager, name, value)
        return manager

    def write(self, role: str, source: str) -> tuple[bool, str]:
        outcome = next(self.outcomes, DONE)
        self.facts.calls.append((role, outcome.written))
        self.rank.clock.now += 0.01
        if outcome.fatal:
            raise RuntimeError(outcome.message)
        return outcome.written == "all", outcome.message

    def receive(self) -> list[Any]:
        self.rank.clock.now += 0.01
        if not self.arrives:
            self.facts.not_received = True
            raise RuntimeError("connection closed")
        return []

    def rebalance(self, layers: int) -> Iterator[None]:
        """SGLang's own generator, of a layer a chunk."""
        manager = object.__new__(self.balancers.EPLBManager)
        updater = SimpleNamespace(update=self.move)
        vars(manager).update(
            _rebalance_disabled_reason=None,
            _rebalance_layers_per_chunk=1,
            _model_config=None,
            _check_rebalance_needed=lambda rate: True,
            _compute_expert_location_metadata=lambda *arguments, **more: None,
            _should_log_expert_location_metadata=lambda: False,
            _get_model=lambda: SimpleNamespace(
                routed_experts_weights_of_layer=dict.fromkeys(range(layers))
            ),
            _get_expert_location_updater=lambda: updater,
            _get_expert_backup_client=lambda: None,
            _get_weight_updater=lambda: self.runners[0].weight_updater,
        )
        generator: Iterator[None] = manager.rebalance()
        return generator

    def move(self, *arguments: Any, **more: Any) -> list[int]:
        """``ExpertLocationUpdater.update``: which experts no peer had."""
        self.moved += 1
        return [1] if self.missing else []


# ------------------------------------------------------------------------------- what counts


@dataclass
class Part:
    """What an update or a session has done to one role until now."""

    source: str = ""
    written: list[Written] = field(default_factory=list)
    #: Of a request that failed, this role did not get what it was to get.
    missed: bool = False
    #: SGLang has said so to who asked: all is written, and the cache is the old one.
    unflushed: bool = False
    version: str = ""


class Model:
    """What has to be published, by role and source."""

    def __init__(self, roles: tuple[str, ...], *, has_sessions: bool) -> None:
        self.roles, self.has_sessions = roles, has_sessions
        self.updates: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        #: What the last update that has ended did to a role's weights.
        self.effects: dict[str, str] = {}
        #: The roles that a session was begun for, and whether any request was to write in it.
        self.session: set[str] | None = None
        self.tried = False
        self.open: dict[str, Part] = {}
        self.moves: Part | None = None

    def selected(self, selector: str) -> set[str]:
        """``_select_runners``; before 0.5.21 nobody can choose."""
        drafts = set(self.roles) - {"target"}
        return {"target": {"target"}, "draft": drafts, "all": set(self.roles)}[selector]

    def end(self, role: str, part: Part) -> None:
        """One logical update of a role is over."""
        key = role, part.source
        whole = set(part.written) == {"all"} and not part.missed
        self.updates[key] += whole
        self.failures[key] += part.unflushed or not whole
        nothing = set(part.written) <= {"none"}
        self.effects[role] = "changed" if whole else "unchanged" if nothing else "undefined"

    def close(self, *roles: str) -> None:
        for role in roles:
            if (part := self.open.pop(role, None)) is not None and part.source:
                self.end(role, part)

    def refuse(self, source: str) -> None:
        """SGLang answered with an error before any runner of the update was called."""
        self.failures["target", source] += 1
        self.effects["target"] = "unchanged"

    def before(self, version: str) -> None:
        """A request comes; one of another version is of another update."""
        for role, part in list(self.open.items()):
            if role not in (self.session or ()) and version and part.version not in {"", version}:
                self.close(role)

    def serve(self, source: str, request: Request, facts: Facts, succeeded: bool) -> None:
        """A request was served, and answered so."""
        session = self.session if self.session is not None else set()
        self._write(source, facts, session)
        # The target receives for all: a bucket that does not come is missed by its update, also by
        # one that is in no session.
        target, lost = self.open.get("target"), False
        if not facts.calls and facts.not_received and target is not None:
            lost = "target" in session or target.source == source
        if target is not None and lost:
            target.source, target.missed = source, True
        elif not facts.calls:
            self.refuse(source)
        self.tried |= bool(facts.calls or facts.not_received)
        reached = {role for role, _ in facts.calls}
        whole = source in {"disk", "ipc"}
        came = facts.calls or lost
        if not succeeded and not facts.flush_refused and came:
            for role in (self.selected("all" if whole else request.selector) & session) - reached:
                self.open[role].missed = True
        ends = request.flush_cache or not succeeded
        for role in set(self.open) - session:
            part = self.open[role]
            if request.weight_version and set(part.written) == {"all"}:
                part.version = request.weight_version
            if ends or (whole and role in reached):
                self.close(role)

    def _write(self, source: str, facts: Facts, session: set[str]) -> None:
        for role, written in facts.calls:
            if role not in session and role in self.open and self.open[role].source != source:
                self.close(role)  # Another way is another update.
            part = self.open.setdefault(role, Part())
            part.source = source
            part.written.append(written)
            part.unflushed |= facts.flush_refused and written == "all"
            self.calls[role, source] += 1

    def begin_session(self, selector: str) -> None:
        self.close(*self.open)
        self.session, self.tried = self.selected(selector), False
        self.open = {role: Part() for role in self.session}

    def end_session(self) -> None:
        """Where nobody sent anything a peer has written, into every runner of the session."""
        assert self.session is not None
        for role in self.session if not self.tried else ():
            self.open[role] = Part("p2p", ["all"])
            self.calls[role, "p2p"] += 1
        self.close(*self.session)  # SGLang ends it for no other runner.
        self.session = None

    def move(self, facts: Facts) -> None:
        """A chunk of experts moved, and those that no peer had were read again."""
        if self.moves is None:
            self.moves = Part("eplb")
        self.moves.written += ["all", *(written for _, written in facts.calls)]
        self.calls["target", "eplb"] += 1 + len(facts.calls)

    def end_moves(self) -> None:
        if self.moves is not None:
            self.end("target", self.moves)
        self.moves = None


# ------------------------------------------------------------------------------- the machine


def scripts(source: str, *, fatal: bool = False) -> st.SearchStrategy[list[Outcome]]:
    """What the calls of one request do, of the target and two drafts."""
    ends = [*REFUSALS[source], *FAILURES[source]]
    each = st.sampled_from([DONE] * 5 + [end for end in ends if end.fatal == fatal])
    return st.lists(each, min_size=3, max_size=3)


versions = st.sampled_from([None, None, "1", "2"])
selectors = st.sampled_from(["all", "all", "target", "draft"])


class SGLangMachine(RuleBasedStateMachine):
    """Requests to SGLang's scheduler, one after the other, until its process ends."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self.rebalancing: Iterator[None] | None = None
        self.died = False
        self.started = 0

    @initialize(drafts=st.integers(0, 2), has_sessions=st.sampled_from([True, True, False]))
    def start(self, drafts: int, has_sessions: bool) -> None:
        self.started += 1
        directory = Path(self.directory.name, str(self.started))
        self.engine = Engine(directory, drafts=drafts, has_sessions=has_sessions)
        self.model = Model(self.engine.roles, has_sessions=has_sessions)

    def serve(
        self,
        source: str,
        script: list[Outcome],
        flushes: bool,
        *,
        arrives: bool = True,
        **asks: Any,
    ) -> None:
        engine, request = self.engine, Request(**asks)
        engine.facts, engine.outcomes = Facts(), iter(script)
        engine.flushes, engine.arrives = flushes, arrives
        self.model.before(request.weight_version or "")
        try:
            answer = getattr(engine.manager, f"update_weights_from_{source}")(request)
        except (RuntimeError, AssertionError):
            self.died = True
            if engine.facts.flush_refused:  # Until 0.5.21.
                self.model.serve(source, request, engine.facts, False)
            else:
                self.end_with(source, engine.facts)
        else:
            self.model.serve(source, request, engine.facts, answer.success)

    def end_with(self, source: str, facts: Facts) -> None:
        """The last call raised, which is the end of the scheduler's process: what is left of it
        has to say that this role's update failed."""
        role, _ = facts.calls[-1]
        before = sum(self.model.failures[role, each] for each in SOURCES)
        failures = sum(numbers[1] for numbers in self.engine.rank.totals(role).values())
        assert failures == before + 1
        last = [event.update for event in self.engine.rank.events() if event.role == role][-1]
        assert (last.source, last.succeeded) == (source, False)

    lives = precondition(lambda self: not self.died)

    @precondition(lambda self: self.died)
    @rule(drafts=st.integers(0, 2), has_sessions=st.booleans())
    def start_again(self, drafts: int, has_sessions: bool) -> None:
        assert self.engine.rank.installation.errors == {}
        self.died, self.rebalancing = False, None
        self.start(drafts=drafts, has_sessions=has_sessions)

    @lives
    @rule(data=st.data(), source=st.sampled_from(["disk", "ipc"]), flush=st.booleans(),
          flushes=st.booleans(), version=versions)  # fmt: skip
    def write_a_checkpoint(
        self, data: st.DataObject, source: str, flush: bool, flushes: bool, version: str | None
    ) -> None:
        script = data.draw(scripts(source))
        self.serve(source, script, flushes, flush_cache=flush, weight_version=version)

    @lives
    @rule(data=st.data(), source=st.sampled_from(["tensor", "distributed"]), selector=selectors,
          flush=st.booleans(), flushes=st.booleans(), version=versions,
          arrives=st.sampled_from([True, True, True, False]))  # fmt: skip
    def write_a_bucket(
        self,
        data: st.DataObject,
        source: str,
        selector: str,
        flush: bool,
        flushes: bool,
        version: str | None,
        arrives: bool,
    ) -> None:
        if not self.model.selected(selector):
            return  # Nobody sends what no runner takes.
        asks = {"selector": selector, "flush_cache": flush, "weight_version": version}
        self.serve(source, data.draw(scripts(source)), flushes, arrives=arrives, **asks)

    @lives
    @rule(data=st.data(), source=st.sampled_from(["disk", "ipc", "tensor", "distributed"]))
    def raise_(self, data: st.DataObject, source: str) -> None:
        self.serve(source, data.draw(scripts(source, fatal=True)), True)

    @lives
    @precondition(lambda self: self.model.has_sessions)
    @rule(selector=selectors)
    def begin_weight_update(self, selector: str) -> None:
        if not self.model.selected(selector):
            return
        answer = self.engine.manager.begin_weight_update(SimpleNamespace(selector=selector))
        assert answer.success == (self.model.session is None)
        if answer.success:
            self.model.begin_session(selector)

    @lives
    @precondition(lambda self: self.model.has_sessions)
    @rule()
    def end_weight_update(self) -> None:
        answer = self.engine.manager.end_weight_update(SimpleNamespace())
        assert answer.success == (self.model.session is not None)
        if answer.success:
            self.model.end_session()

    @lives
    @rule(layers=st.integers(1, 3))
    def begin_rebalance(self, layers: int) -> None:
        if self.rebalancing is None:
            self.rebalancing = self.engine.rebalance(layers)

    @lives
    @precondition(lambda self: self.rebalancing is not None)
    @rule(data=st.data(), missing=st.sampled_from([False, False, True]))
    def forward_pass(self, data: st.DataObject, missing: bool) -> None:
        """A chunk moves after it, but for the first of several."""
        assert self.rebalancing is not None
        engine = self.engine
        engine.facts, engine.outcomes = Facts(), iter(data.draw(scripts("disk")))
        engine.missing = missing
        before = engine.moved
        for _ in self.rebalancing:
            break
        else:
            self.rebalancing = None
        if engine.moved > before:
            self.model.move(engine.facts)
        if self.rebalancing is None:
            self.model.end_moves()

    @lives
    @precondition(lambda self: self.rebalancing is not None)
    @rule()
    def give_up_rebalance(self) -> None:
        """``EPLBManager.reset_generator``, when ranks are found to be gone."""
        self.rebalancing = None
        gc.collect()
        self.model.end_moves()

    @lives
    @rule()
    def idle(self) -> None:
        """Before 0.5.21 nothing but time tells that an update of several buckets is over."""
        self.engine.rank.clock.now += 3 * IDLE_SECONDS
        self.model.close(*(set(self.model.open) - (self.model.session or set())))

    @lives
    @invariant()
    def what_is_published_is_the_models(self) -> None:
        if not hasattr(self, "engine"):
            return
        rank, model = self.engine.rank, self.model
        roles = {role.name: role.settled(rank.clock.now) for role in rank.snapshot().roles}
        assert tuple(roles) == model.roles
        for name, role in roles.items():
            expected = {
                source: (model.updates[name, source], model.failures[name, source],
                         model.calls[name, source])
                for source in SOURCES
            }  # fmt: skip
            published = {
                source: (counts.updates, counts.failures, counts.calls)
                for source, counts in role.updates.items()
            }
            none = dict.fromkeys(SOURCES, (0, 0, 0))
            differ = {
                source: (numbers, expected[source])
                for source, numbers in (none | published).items()
                if numbers != expected[source]
            }
            assert differ == {}, f"{name} {differ}"
            going_on = name in model.open or (name == "target" and model.moves is not None)
            assert (role.in_progress is not None) == going_on, name

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.rank.installation.errors == {}
        self.directory.cleanup()


SOURCES = ("disk", "tensor", "distributed", "ipc", "p2p", "eplb", "external")


@pytest.fixture(scope="module", autouse=True)
def sources() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    site_packages = Path(spec.origin).parent.parent
    Engine.updates = Source(site_packages, SCHEDULER_COMPONENT)
    Engine.balancer = Source(site_packages, EPLB_MANAGER)


def test_what_is_published_is_what_sglang_did() -> None:
    """``STATE_MACHINE_EXAMPLES``: how many sequences of requests, others each time. Without it some
    that are always the same, so that a change is not refused by chance."""
    examples = os.environ.get("STATE_MACHINE_EXAMPLES")
    run_state_machine_as_test(
        SGLangMachine,
        settings=settings(
            max_examples=int(examples or 15),
            derandomize=examples is None,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
