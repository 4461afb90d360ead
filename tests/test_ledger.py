# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The ledger against a model of SGLang: its scheduler with a target and a draft, as requests of any
order and outcome would have it, and experts that move on another thread.

:class:`LedgerMachine` does what ``SchedulerWeightUpdaterManager`` does (SGLang 0.5.23, and without
sessions, as before 0.5.21), notifies the ledger as the hooks do, and writes down for itself what
became of each role's weights. What is counted of that is said here again, from the documents.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

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

from sglang_weight_exporter.ledger import IDLE_SECONDS, CallToken, Ledger, Verdict
from sglang_weight_exporter.records.snapshot import Role
from sglang_weight_exporter.records.updates import Source, Update
from sglang_weight_exporter.records.weights import TableChanges

ROLES = ("target", "draft")
#: `_parse_runner_selector`: a session and a request each choose runners.
SELECTORS = {"target": ("target",), "draft": ("draft",), "all": ROLES}
SCHEDULER, WORKER = 1, 2

CHANGED = Verdict(True, "changed")
REFUSED = Verdict(False, "unchanged", "refused")
BROKEN = Verdict(False, "undefined", "broken")
verdicts = st.sampled_from([CHANGED, CHANGED, CHANGED, REFUSED, BROKEN])

#: What one call brings, where it says so; of others nobody knows.
BYTES = 100
SIZED = {"disk", "tensor", "distributed"}


@dataclass
class Writes:
    """What is to be counted as one update of a role: calls that belong together."""

    began: float
    session: bool = False
    source: Source | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    #: A request wrote the weights and could not flush the cache, which makes it fail.
    unflushed: bool = False
    #: A bucket that was to come has not, because another runner failed before.
    missed: bool = False
    last_call: float = 0.0
    version: str = ""
    nbytes: int | None = 0

    @property
    def failed(self) -> bool:
        return self.unflushed or self.broken

    @property
    def broken(self) -> bool:
        return self.missed or not all(verdict.succeeded for verdict in self.verdicts)

    @property
    def changed(self) -> bool:
        """The weights are the new ones: some were written, and no call failed."""
        effects = {verdict.effect for verdict in self.verdicts}
        return "changed" in effects and not self.broken


@dataclass
class Request:
    """One that the scheduler serves."""

    source: Source
    flush_cache: bool
    version: str
    selector: str = "all"
    unflushed: bool = False
    wrote: set[str] = field(default_factory=set)
    called: bool = False


class LedgerMachine(RuleBasedStateMachine):
    """SGLang's scheduler, and its worker's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.on = SCHEDULER
        self.ledger = Ledger(
            clock=lambda: self.now,
            thread=lambda: self.on,
            cached_tokens=lambda: len(self.cached),
        )
        # The scheduler's own state.
        self.has_sessions = True
        #: `_WeightUpdateSession`: its selector, and whether weights were loaded.
        self.session: tuple[str, bool] | None = None
        #: Tokens in the cache, each as how often weights had been written when it was computed.
        self.cached: list[int] = []
        self.written = 0
        self.paused = False
        self.rebalancing = False
        self.moving: CallToken | None = None
        self.released: set[str] = set()
        # What is to be counted.
        self.open: dict[str, Writes | None] = dict.fromkeys(ROLES)
        self.moves: Writes | None = None
        self.calls_of_session = 0
        self.updates: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.nbytes: dict[tuple[str, str], int | None] = defaultdict(int)
        self.flushes: Counter[bool] = Counter()
        self.pauses: Counter[str] = Counter()
        #: Seconds of each update that has ended.
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        #: When the last one began that counts, the load included.
        self.last_began = dict.fromkeys(ROLES, self.now)
        self.ended = self.reported = 0

    @initialize(has_sessions=st.booleans())
    def start(self, has_sessions: bool = True) -> None:
        self.has_sessions = has_sessions
        self.ledger.begin_start()
        for role in ROLES:
            self.ledger.add_role(role)
            began = self.ledger.loads.begin()
            self.ledger.loads.end(role, began, model_path="a", weight_version="default")
        assert self.ledger.take_finished() == []  # Drafts may still share what they have.
        self.ledger.loads.end_start()
        assert [ended.role for ended in self.ledger.take_finished()] == list(ROLES)

    # What is counted.

    def count(self, role: str, writes: Writes | None) -> None:
        """The writes have ended; in a session without any there was no update."""
        if writes is None or writes.source is None:
            return
        key = (role, writes.source)
        self.ended += 1
        self.updates[key] += writes.changed
        self.failures[key] += writes.failed
        known, more = self.nbytes[key], writes.nbytes
        self.nbytes[key] = None if known is None or more is None else known + more
        if writes.changed:
            self.last_began[role] = writes.began

    def end(self, role: str) -> None:
        writes, self.open[role] = self.open[role], None
        self.count(role, writes)

    def note(self, writes: Writes, source: Source, verdict: Verdict, nbytes: int | None) -> None:
        writes.source, writes.last_call = source, self.now
        writes.verdicts.append(verdict)
        if verdict.succeeded:
            known = writes.nbytes
            writes.nbytes = None if known is None or nbytes is None else known + nbytes
        if verdict.effect != "unchanged":
            self.written += 1

    # Runners: `update_weights_from_…`, and `load_weights_from_distributed` from 0.5.21 on.

    def write(self, role: str, source: Source, verdict: Verdict, request: Request) -> None:
        writes = self.open[role]
        if writes is not None and not writes.session:
            idle = self.now - writes.last_call > IDLE_SECONDS
            if idle or writes.source != source:
                self.end(role)
        if self.open[role] is None:
            self.open[role] = Writes(self.now, source=source, version=request.version)
        whole = source in {"disk", "ipc"}
        token = self.ledger.updates.begin(role, source, ends_with="request" if whole else "later")
        nbytes = BYTES if source in SIZED else None
        if nbytes is not None:
            self.ledger.updates.add_bytes(nbytes)
        self.now += 0.5
        self.ledger.updates.finish(token, verdict)
        writes = self.open[role]
        assert writes is not None
        self.note(writes, source, verdict, nbytes)
        self.calls[role, source] += 1
        self.calls_of_session += 1
        request.called = True
        request.wrote.add(role)

    # Requests of the scheduler.

    def begin_request(self, request: Request) -> None:
        for role, writes in self.open.items():
            other = writes is not None and writes.version not in {"", request.version}
            if writes is not None and request.version and other and not writes.session:
                self.end(role)  # A version is one update.
        self.ledger.updates.begin_request(
            source=request.source,
            flush_cache=request.flush_cache,
            weight_version=request.version,
            selector=request.selector,
        )

    def answer(self, request: Request, succeeded: bool, message: str = "") -> None:
        # Which weights are new and which old can still be told, and only the cache is not.
        only_flush = not succeeded and not any(
            writes is not None and writes.failed for writes in self.open.values()
        )
        self.ledger.updates.end_request(succeeded=succeeded, message=message, raised=False)
        if not succeeded and not request.called:
            self.ended += 1
            self.failures["target", request.source] += 1
        for role, writes in self.open.items():
            if writes is None:
                continue
            if (only_flush or request.unflushed) and role in request.wrote and not writes.broken:
                writes.unflushed = not succeeded or writes.unflushed
            asked = role in SELECTORS[request.selector] and role not in request.wrote
            if not succeeded and request.called and asked and writes.session:
                writes.missed = True
            if writes.session:
                continue
            undefined = any(verdict.effect == "undefined" for verdict in writes.verdicts)
            if request.version and writes.changed and not undefined:
                writes.version = request.version
            if not succeeded or request.flush_cache or writes.source in {"disk", "ipc"}:
                self.end(role)

    def fan_out(
        self, request: Request, roles: tuple[str, ...], outcomes: list[Verdict]
    ) -> tuple[bool, str]:
        """Stops at the first runner that fails."""
        for role, verdict in zip(roles, outcomes, strict=False):
            self.write(role, request.source, verdict, request)
            if not verdict.succeeded:
                return False, verdict.message
        return True, ""

    def flush_after(self, request: Request, works: bool) -> tuple[bool, str]:
        if request.flush_cache:
            self.flush(works=works)
            if not works:
                request.unflushed = True
                return False, "the cache was not flushed"
        return True, ""

    outcomes = st.lists(verdicts, min_size=2, max_size=2)
    versions = st.sampled_from(["", "1", "2"])

    @rule(
        source=st.sampled_from(["disk", "ipc"]),
        outcomes=outcomes,
        flush_cache=st.booleans(),
        flushes=st.booleans(),
        version=versions,
    )
    def update_from_disk_or_ipc(
        self, source: Any, outcomes: list[Verdict], flush_cache: bool, flushes: bool, version: str
    ) -> None:
        request = Request(source, flush_cache, version)
        self.begin_request(request)
        succeeded, message = self.fan_out(request, ROLES, outcomes)
        # "The served weights changed even if a draft runner failed afterwards."
        if outcomes[0].succeeded:
            flushed, why = self.flush_after(request, flushes)
            succeeded, message = succeeded and flushed, message or why
        self.answer(request, succeeded, message)

    @rule(
        source=st.sampled_from(["tensor", "distributed"]),
        selector=st.sampled_from(list(SELECTORS)),
        arrives=st.sampled_from([True, True, True, False]),
        outcomes=outcomes,
        flush_cache=st.booleans(),
        flushes=st.booleans(),
        version=versions,
    )
    def update_from_tensor_or_distributed(
        self,
        source: Any,
        selector: str,
        arrives: bool,
        outcomes: list[Verdict],
        flush_cache: bool,
        flushes: bool,
        version: str,
    ) -> None:
        request = Request(source, flush_cache, version, selector)
        self.begin_request(request)
        if self.has_sessions and self.session is None:
            self.answer(request, False, "it must run between begin and end")
            return
        if self.has_sessions and source == "distributed" and not self.receive(request, arrives):
            self.answer(request, False, "Failed to receive weights")
            return
        succeeded, message = self.fan_out(request, SELECTORS[selector], outcomes)
        if succeeded:
            if self.session is not None:
                self.session = (self.session[0], True)
            succeeded, message = self.flush_after(request, flushes)
        self.answer(request, succeeded, message)

    def receive(self, request: Request, arrives: bool) -> bool:
        """`receive_weights_from_distributed`, of the target whichever runners load."""
        writes = self.open["target"]
        if writes is not None and not writes.session:
            idle = self.now - writes.last_call > IDLE_SECONDS
            if idle or writes.source != "distributed":
                self.end("target")
        self.ledger.updates.begin_receiving("target", "distributed")
        self.now += 0.25
        if arrives:
            self.ledger.updates.set_phase("wait", "target")
            return True
        self.ledger.updates.fail_receiving("target", "distributed", "no such group")
        writes = self.open["target"]
        self.calls_of_session += 1
        if writes is not None:
            self.note(writes, "distributed", Verdict(False, "unchanged"), None)
            request.called = True
            request.wrote.add("target")
        return False

    @precondition(lambda self: self.has_sessions)
    @rule(selector=st.sampled_from(list(SELECTORS)))
    def begin_weight_update(self, selector: str) -> None:
        if self.session is not None:
            return  # "A weight-update session is already open"; no runner is called.
        self.calls_of_session = 0
        for role in (*SELECTORS[selector][:1], *ROLES):
            self.end(role)  # What went on without a session, of whichever role.
        for role in SELECTORS[selector]:
            self.open[role] = Writes(self.now, session=True)
            self.ledger.updates.begin_session(role)
            self.ledger.updates.set_phase("wait", role)
        self.session = (selector, False)

    @rule()
    def end_weight_update(self) -> None:
        if self.session is None:
            return  # "No weight-update session is open"; no runner is called.
        (selector, loaded), self.session = self.session, None
        nothing_came = self.calls_of_session == 0
        for role in SELECTORS[selector]:
            writes = self.open[role]
            self.ledger.updates.set_phase("post_process", role)
            self.now += 0.125
            self.ledger.updates.end_session(role, run_post_load=not loaded)
            if writes is not None and not loaded and nothing_came:
                # The runners' tensors are what a peer wrote into: each of them.
                self.note(writes, "p2p", CHANGED, None)
                self.calls[role, "p2p"] += 1
            self.end(role)

    # The cache.

    @rule(tokens=st.integers(1, 3))
    def serve(self, tokens: int) -> None:
        self.cached += [self.written] * tokens

    @rule(works=st.booleans())
    def flush(self, works: bool) -> None:
        if works:
            self.cached.clear()
        self.ledger.begin_flush()
        self.now += 0.125
        self.ledger.end_flush(succeeded=works)
        self.flushes[works] += 1

    @rule()
    def evict_all(self) -> None:
        self.cached.clear()

    @rule(mode=st.sampled_from(["in_place", "retract", "abort"]))
    def pause(self, mode: Any) -> None:
        self.ledger.prefix_cache.pause(mode)
        self.pauses[mode] += 1
        self.paused |= mode != "abort"

    @rule()
    def continue_generation(self) -> None:
        self.ledger.prefix_cache.continue_generation()
        self.paused = False

    # Experts, on the worker's thread, whatever the scheduler's does.

    @rule()
    def begin_rebalance(self) -> None:
        if not self.rebalancing:
            self.rebalancing = True
            self.ledger.updates.begin_rebalance()

    @precondition(lambda self: self.moving is None)
    @rule()
    def begin_move(self) -> None:
        self.on = WORKER
        if self.moves is None:
            self.moves = Writes(self.now, source="eplb")
        self.moving = self.ledger.updates.begin_move("target")
        assert self.ledger.updates.begin_move("target") is None  # Inside another.
        self.on = SCHEDULER

    @precondition(lambda self: self.moving is not None)
    @rule(verdict=st.sampled_from([CHANGED, BROKEN]), reads=st.integers(0, 2))
    def finish_move(self, verdict: Verdict, reads: int) -> None:
        assert self.moving is not None
        assert self.moves is not None
        self.on = WORKER
        for _ in range(reads):  # Missing experts, again from disk.
            token = self.ledger.updates.begin("target", "disk", ends_with="request")
            self.ledger.updates.finish(token, verdict)
            self.note_move(verdict)
        whole = self.moving.ends_with == "call" and self.moving.opened
        self.ledger.updates.finish(self.moving, verdict)
        self.note_move(verdict)
        self.on, self.moving = SCHEDULER, None
        if whole:
            self.end_moves()

    def note_move(self, verdict: Verdict) -> None:
        assert self.moves is not None
        before = self.written
        self.note(self.moves, "eplb", verdict, None)
        self.written = before  # They are the same experts.
        self.calls["target", "eplb"] += 1

    def end_moves(self) -> None:
        moves, self.moves = self.moves, None
        self.count("target", moves)

    @precondition(lambda self: self.rebalancing and self.moving is None)
    @rule()
    def end_rebalance(self) -> None:
        self.rebalancing = False
        self.ledger.updates.end_rebalance()
        self.end_moves()

    @rule(tag=st.sampled_from(["weights", "kv_cache"]), gives=st.booleans())
    def release_or_resume(self, tag: str, gives: bool) -> None:
        if gives:
            self.ledger.counters.release({tag})
            self.released.add(tag)
        else:
            self.ledger.counters.resume({tag})
            self.released.discard(tag)

    @rule(seconds=st.sampled_from([0.01, 1.0, IDLE_SECONDS + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # What must always hold.

    def complete(self) -> None:
        """What follows the end of an update, as a rank does it."""
        for ended in self.ledger.take_finished():
            self.now += 0.25
            update = self.ledger.complete(ended, model_path="b", changes=TableChanges())
            if update is None or update.source is None:
                continue
            self.reported += 1
            seconds = update.ended_at - update.started_at
            assert sum(update.phases.values()) == pytest.approx(seconds)
            self.seconds[ended.role, update.source].append(seconds)

    @invariant()
    def counts_are_the_models(self) -> None:
        self.complete()
        for name in self.ledger.roles:
            role = self.ledger.describe(name, Role(name=name, device="cpu"))
            for source, counts in role.updates.items():
                key = (name, source)
                assert counts.updates == self.updates[key], key
                assert counts.failures == self.failures[key], key
                assert counts.calls == self.calls[key], key
                seconds = self.seconds[key]
                assert sum(counts.duration.counts) == len(seconds)
                assert counts.duration.sum == pytest.approx(sum(seconds))
                assert sum(counts.phases.values()) == pytest.approx(sum(seconds))
                assert counts.nbytes == self.nbytes[key], key
            expected = self.open[name] is not None or (name == "target" and bool(self.moves))
            assert (role.in_progress is not None) == expected, name
            assert role.last_update is not None
            assert role.update_started_at == self.last_began[name]
        assert self.ledger.counters.released == self.released

    @invariant()
    def the_cache_is_the_models(self) -> None:
        cache = self.ledger.prefix_cache.counts
        if cache is not None:
            assert cache.stale == any(token != self.written for token in self.cached)
            assert (cache.flushes, cache.failures) == (self.flushes[True], self.flushes[False])
            assert (cache.flushed_at is not None) == bool(cache.flushes)
            assert Counter(cache.pauses) == self.pauses
            assert cache.paused == self.paused

    @invariant()
    def what_has_ended_is_reported_once(self) -> None:
        self.complete()
        assert self.reported == self.ended


def test_a_refused_flush_in_a_session_does_not_make_later_buckets_a_mixture() -> None:
    """Found by the machine: the refusal counted as a write that failed."""
    machine = LedgerMachine()
    machine.start()
    machine.begin_weight_update(selector="target")
    for flush_cache in (True, False):
        machine.update_from_tensor_or_distributed(
            source="tensor",
            selector="target",
            arrives=True,
            outcomes=[CHANGED],
            flush_cache=flush_cache,
            flushes=False,
            version="",
        )
    machine.end_weight_update()
    machine.counts_are_the_models()
    assert machine.updates["target", "tensor"] == machine.failures["target", "tensor"] == 1


def test_a_session_that_could_not_begin_leaves_nothing_open() -> None:
    """Weights are unpacked for it, of one role after the other; the second raises."""
    ledger = Ledger()
    for role in ROLES:
        ledger.add_role(role)
        ledger.updates.begin_session(role)
    ledger.updates.abandon_session("draft")
    assert not ledger.updates.is_in_progress("draft")
    for role in ROLES:  # The next one can.
        ledger.updates.begin_session(role)
        ledger.updates.end_session(role, run_post_load=True)
    for role in ROLES:
        updates = ledger.describe(role, Role(name=role, device="cpu")).updates
        assert {source: each.updates for source, each in updates.items() if each.updates} == {
            "p2p": 1
        }


def test_tensors_that_arrive_for_another_role_are_no_part_of_what_went_on() -> None:
    """Found by the machine: time went to a phase of an update that had ended before."""
    machine = LedgerMachine()
    machine.start()
    machine.begin_weight_update(selector="draft")
    for source in ("tensor", "distributed"):
        machine.update_from_tensor_or_distributed(
            source=source,
            selector="target",
            arrives=True,
            outcomes=[CHANGED],
            flush_cache=False,
            flushes=False,
            version="",
        )
    machine.counts_are_the_models()


def test_tensors_that_arrive_for_another_role_end_no_later_than_the_last_call() -> None:
    """Found by the machine: a bucket for the target beside a session of the draft, and the next one
    for the draft, whose tensors the target receives."""
    machine = LedgerMachine()
    machine.start(has_sessions=True)
    machine.begin_weight_update(selector="draft")
    for selector, flush_cache in (("target", False), ("draft", True)):
        machine.update_from_tensor_or_distributed(
            source="distributed",
            selector=selector,
            arrives=True,
            outcomes=[CHANGED],
            flush_cache=flush_cache,
            flushes=False,
            version="",
        )
    machine.counts_are_the_models()


def test_what_a_request_wrote_is_not_told_by_the_time() -> None:
    """Found by the machine: two requests in one tick of the clock, of which the second fails before
    it writes anything."""
    machine = LedgerMachine()
    machine.start()
    machine.begin_weight_update(selector="draft")
    for source, arrives in (("tensor", True), ("distributed", False)):
        machine.update_from_tensor_or_distributed(
            source=source,
            selector="draft",
            arrives=arrives,
            outcomes=[CHANGED],
            flush_cache=False,
            flushes=False,
            version="",
        )
    machine.update_from_disk_or_ipc(
        source="disk", outcomes=[CHANGED, CHANGED], flush_cache=True, flushes=False, version=""
    )
    machine.counts_are_the_models()
    assert machine.failures["target", "disk"] == 1


class Clock:
    """Time that passes when a test says so, in seconds that sum exactly."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ledger = Ledger(clock=lambda: self.now)
        self.ledger.add_role("target")

    def pass_(self, seconds: float) -> None:
        self.now += seconds

    def last(self) -> Update:
        (ended,) = self.ledger.take_finished()
        self.pass_(32.0)  # The capture of what has changed.
        update = self.ledger.complete(ended, model_path="b", changes=TableChanges())
        assert update is not None
        return update


def test_a_session_spends_its_time_on_what_its_calls_are_about() -> None:
    """Distributed, as SGLang 0.5.21 and later have it."""
    clock = Clock()
    ledger = clock.ledger
    before = clock.now
    clock.pass_(64.0)  # The capture of what is there.
    ledger.updates.begin_session("target", since=before)
    clock.pass_(1.0)  # Unpacks.
    ledger.updates.set_phase("wait", "target")
    clock.pass_(2.0)
    ledger.updates.begin_request(flush_cache=True, weight_version="2")
    ledger.updates.begin_receiving("target", "distributed")
    clock.pass_(4.0)
    token = ledger.updates.begin("target", "distributed", ends_with="later")
    assert ledger.updates.writing
    ledger.updates.add_bytes(4096)
    clock.pass_(8.0)
    ledger.updates.finish(token, CHANGED)
    assert not ledger.updates.writing
    ledger.begin_flush()
    clock.pass_(16.0)
    ledger.end_flush(succeeded=True)
    ledger.updates.end_request(succeeded=True, message="", raised=False)
    ledger.updates.set_phase("post_process", "target")
    clock.pass_(128.0)
    progress = ledger.describe("target", Role(name="target", device="cpu")).in_progress
    assert progress is not None
    assert progress.phase == "post_process"
    ledger.updates.end_session("target")
    update = clock.last()
    assert update.phases == {
        "capture": 64.0 + 32.0,
        "post_process": 1.0 + 128.0,
        "wait": 2.0,
        "receive": 4.0,
        "load": 8.0,
        "flush": 16.0,
    }
    assert update.nbytes == 4096
    assert update.ended_at - update.started_at == 255.0


def test_post_processing_and_readers_are_told_apart_from_the_load_around_them() -> None:
    clock = Clock()
    ledger = clock.ledger
    ledger.updates.begin_request(flush_cache=True, weight_version="")
    token = ledger.updates.begin("target", "disk", ends_with="request")
    before = clock.now
    clock.pass_(1.0)
    ledger.updates.add_time("wait", before)  # Readers of the table were let go on.
    clock.pass_(2.0)
    ledger.updates.set_phase("post_process")
    clock.pass_(4.0)
    ledger.updates.set_phase("load")
    ledger.updates.finish(token, CHANGED)
    ledger.updates.end_request(succeeded=True, message="", raised=False)
    update = clock.last()
    assert update.phases == {"load": 2.0, "wait": 1.0, "post_process": 4.0, "capture": 32.0}
    assert update.nbytes is None  # Nobody has said what came.


def test_an_update_that_nobody_ends_has_ended_with_its_last_call() -> None:
    clock = Clock()
    ledger = clock.ledger
    for _ in range(2):
        clock.pass_(1.0)
        token = ledger.updates.begin("target", "tensor", ends_with="later")
        ledger.updates.add_bytes(10)
        clock.pass_(2.0)
        ledger.updates.finish(token, CHANGED)
    clock.pass_(IDLE_SECONDS + 1)
    role = ledger.describe("target", Role(name="target", device="cpu")).settled(clock.now)
    assert role.updates["tensor"].phases == {"load": 4.0, "wait": 1.0}
    assert role.updates["tensor"].duration.sum == 5.0
    assert role.updates["tensor"].seconds == 5.0
    assert role.updates["tensor"].updated_at == role.updated_at == clock.now - IDLE_SECONDS - 1
    assert role.update_started_at == clock.now - IDLE_SECONDS - 1 - 5.0
    ledger.updates.begin("target", "tensor", ends_with="later")
    update = clock.last()
    assert update.phases == {"load": 4.0, "wait": 1.0}
    assert update.nbytes == 20
    assert ledger.describe("target", role).updates["tensor"].duration.sum == 5.0


@pytest.mark.slow
def test_the_ledger_counts_what_a_plain_model_counts() -> None:
    """``STATE_MACHINE_EXAMPLES``: how many sequences, others each time. Without it some that are
    always the same, so that a change is not refused by chance."""
    examples = os.environ.get("STATE_MACHINE_EXAMPLES")
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=int(examples or 150),
            derandomize=examples is None,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_clock_that_was_set_back_makes_no_negative_duration() -> None:
    now = 1000.0
    ledger = Ledger(clock=lambda: now)
    ledger.begin_start()
    ledger.add_role("target")
    began = ledger.loads.begin()
    now -= 500.0
    ledger.loads.end("target", began, model_path="a", weight_version="default")
    ledger.loads.end_start()
    token = ledger.updates.begin("target", "disk", ends_with="request")
    now -= 500.0  # As NTP does it to a host that booted with a wrong clock.
    ledger.updates.finish(token, CHANGED)
    ledger.updates.begin_session("target")
    token = ledger.updates.begin("target", "tensor", ends_with="later")
    now -= 500.0
    ledger.updates.finish(token, CHANGED)
    ledger.updates.end_session("target")
    role = ledger.describe("target", Role(name="target", device="cpu"))
    assert role.load_seconds == 0.0
    counted = [counts.duration for counts in role.updates.values() if counts.updates]
    assert [duration.sum for duration in counted] == [0.0, 0.0]
