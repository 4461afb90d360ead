# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The ledger against a plain model of SGLang's semantics: any order of loads, updates, buckets,
sessions, failures, flushes, releases and rebalances, on two roles and two threads.

The model says what SGLang's calls mean and not how the ledger keeps it: it counts each update when
the rule that ends it applies, from a list of what has happened.
"""

from __future__ import annotations

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
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableChanges

ROLES = ("target", "draft")
BUCKETS = ("tensor", "distributed")
WHOLE = ("disk", "ipc")
SCHEDULER, WORKER = 1, 2

CHANGED = Verdict(True, "changed")
REFUSED = Verdict(False, "unchanged", "refused")
BROKEN = Verdict(False, "undefined", "broken")
verdicts = st.sampled_from([CHANGED, CHANGED, REFUSED, BROKEN])


#: What one call brings, where it tells.
BYTES = 100
TELLS = {"disk", *BUCKETS}


def sum_of_known(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


@dataclass
class Modelled:
    """An update that has begun: what its calls said, and by whose end it ends."""

    source: str | None
    began: float
    session: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    refused_later: bool = False
    last_call: float = 0.0
    version: str = ""
    #: Bytes of each call that wrote something; ``None``: it does not tell.
    brought: list[int | None] = field(default_factory=list)

    @property
    def nbytes(self) -> int | None:
        return sum_of_known(self.brought)

    @property
    def failed(self) -> bool:
        return self.refused_later or any(not verdict.succeeded for verdict in self.verdicts)

    @property
    def changed(self) -> bool:
        """The weights are the new ones: something was written, and nothing failed in writing."""
        return any(verdict.effect == "changed" for verdict in self.verdicts) and all(
            verdict.succeeded for verdict in self.verdicts
        )


class LedgerMachine(RuleBasedStateMachine):
    """Drives the ledger as SGLang's scheduler and its worker's thread would."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.on = SCHEDULER
        #: Tokens in the cache, each as how often weights had been written when it was computed.
        self.cached: list[int] = []
        self.written = 0
        self.flushes: Counter[bool] = Counter()
        self.pauses: Counter[str] = Counter()
        self.paused = False
        self.ledger = Ledger(
            clock=lambda: self.now,
            thread=lambda: self.on,
            cached_tokens=lambda: len(self.cached),
        )
        self.open: dict[str, Modelled | None] = dict.fromkeys(ROLES)
        self.moves: Modelled | None = None
        self.rebalancing = False
        self.moving: CallToken | None = None
        self.session_calls = 0
        self.updates: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.brought: dict[tuple[str, str], list[int | None]] = defaultdict(list)
        #: Seconds of each update that was told of.
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        #: When the last one began that counts, the load included.
        self.last_began = dict.fromkeys(ROLES, self.now)
        self.ended = self.told = 0
        self.released: set[str] = set()

    # The model.

    def end(self, role: str) -> None:
        update, self.open[role] = self.open[role], None
        self.count(role, update)

    def count(self, role: str, update: Modelled | None) -> None:
        if update is None or update.source is None:
            return
        self.ended += 1
        self.updates[role, update.source] += update.changed
        if update.changed:
            self.last_began[role] = update.began
        self.failures[role, update.source] += update.failed
        self.brought[role, update.source].append(update.nbytes)

    def began(self, role: str, source: str) -> Modelled:
        update = self.open[role]
        if update is not None and not update.session:
            idle = self.now - update.last_call > IDLE_SECONDS
            if idle or update.source != source:
                self.end(role)
        if self.open[role] is None:
            self.open[role] = Modelled(source, self.now, last_call=self.now)
        update = self.open[role]
        assert update is not None
        return update

    # What SGLang does.

    @initialize()
    def start(self) -> None:
        self.ledger.begin_start()
        for role in ROLES:
            self.ledger.add_role(role)
            began = self.ledger.loads.begin()
            self.ledger.loads.end(role, began, model_path="a", weight_version="default")
        assert self.ledger.take_finished() == []  # Drafts may still share what they have.
        self.ledger.loads.end_start()
        assert [ended.role for ended in self.ledger.take_finished()] == list(ROLES)

    @rule(seconds=st.sampled_from([0.01, 1.0, IDLE_SECONDS + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(role=st.sampled_from(ROLES), source=st.sampled_from(WHOLE), verdict=verdicts)
    def whole_update(self, role: str, source: Any, verdict: Verdict) -> None:
        self.write(role, source, verdict, "request")
        if self.open[role] is not None and not self.open_of(role).session:
            self.end(role)

    def open_of(self, role: str) -> Modelled:
        update = self.open[role]
        assert update is not None
        return update

    def write(self, role: str, source: Any, verdict: Verdict, ends_with: Any) -> None:
        update = self.began(role, source)
        token = self.ledger.updates.begin(role, source, ends_with=ends_with)
        if source in TELLS:
            self.ledger.updates.add_bytes(BYTES)
        self.now += 0.5
        self.ledger.updates.finish(token, verdict)
        if verdict.effect != "unchanged":
            update.brought.append(BYTES if source in TELLS else None)
        update.source, update.last_call = source, self.now
        update.verdicts.append(verdict)
        self.written += verdict.effect != "unchanged"
        self.calls[role, source] += 1
        self.session_calls += 1

    @rule(role=st.sampled_from(ROLES), source=st.sampled_from(BUCKETS), verdict=verdicts)
    def bucket_without_a_request(self, role: str, source: Any, verdict: Verdict) -> None:
        self.write(role, source, verdict, "later")

    @rule(
        roles=st.sampled_from([("target",), ("target", "draft"), ("draft", "target")]),
        source=st.sampled_from(BUCKETS + WHOLE),
        verdict=verdicts,
        flush_cache=st.booleans(),
        flushes=st.booleans(),
        version=st.sampled_from(["", "1", "2"]),
    )
    def request(
        self,
        roles: tuple[str, ...],
        source: Any,
        verdict: Verdict,
        flush_cache: bool,
        flushes: bool,
        version: str,
    ) -> None:
        for role, update in self.open.items():
            if (
                update is not None
                and not update.session
                and version
                and update.version not in ("", version)
            ):
                self.end(role)
        self.ledger.updates.begin_request(flush_cache=flush_cache, weight_version=version)
        for role in roles:
            fresh = self.began(role, source)
            fresh.version = fresh.version or ("" if fresh.session or fresh.verdicts else version)
            self.write(role, source, verdict, "request" if source in WHOLE else "later")
            if not verdict.succeeded:
                break
        if verdict.succeeded and flush_cache:
            self.flush(works=flushes)
        succeeded = verdict.succeeded and (flushes or not flush_cache)
        message = "" if succeeded else "the cache was not flushed"
        self.ledger.updates.end_request(succeeded=succeeded, message=message, raised=False)
        written = {role: update for role, update in self.open.items() if update is not None}
        only_flush = not succeeded and not any(update.failed for update in written.values())
        for role, update in written.items():
            if only_flush and update.verdicts:
                update.refused_later = True
            if update.session:
                continue
            if version and update.changed and not self.undefined(update):
                update.version = version
            if not succeeded or flush_cache or update.source in WHOLE:
                self.end(role)

    def undefined(self, update: Modelled) -> bool:
        return any(verdict.effect == "undefined" for verdict in update.verdicts)

    # Sessions.

    @rule(role=st.sampled_from(ROLES))
    def begin_session(self, role: str) -> None:
        update = self.open[role]
        if update is not None and update.session and update.verdicts:
            self.ledger.updates.begin_session(role)
            return
        if update is not None and not update.session:
            self.end(role)
        self.open[role] = None
        if not any(other is not None and other.session for other in self.open.values()):
            self.session_calls = 0
        self.open[role] = Modelled(None, self.now, session=True, last_call=self.now)
        self.ledger.updates.begin_session(role)

    @rule(role=st.sampled_from(ROLES), works=st.booleans())
    def end_session(self, role: str, works: bool) -> None:
        update = self.open[role]
        if update is None or not update.session:
            return
        run_post_load = self.session_calls == 0
        error = "" if works else "repacking failed"
        self.ledger.updates.end_session(role, error=error, run_post_load=run_post_load)
        if not works:
            update.source = update.source or "p2p"
            update.verdicts.append(BROKEN)
            self.written += 1
        elif run_post_load:
            update.source = "p2p"
            update.verdicts.append(CHANGED)
            update.brought.append(None)
            self.written += 1
            self.calls[role, "p2p"] += 1
            self.session_calls += 1
        self.end(role)
        if not works:
            self.open[role] = Modelled(update.source, self.now, session=True, last_call=self.now)

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
            self.moves = Modelled("eplb", self.now)
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
            self.moves.verdicts.append(verdict)
            self.moves.brought.append(None)
            self.calls["target", "eplb"] += 1
        whole = self.moving.ends_with == "call" and self.moving.opened
        self.ledger.updates.finish(self.moving, verdict)
        self.moves.verdicts.append(verdict)
        self.moves.brought.append(None)
        self.calls["target", "eplb"] += 1
        self.on, self.moving = SCHEDULER, None
        if whole:
            self.count("target", self.moves)
            self.moves = None

    @precondition(lambda self: self.rebalancing and self.moving is None)
    @rule()
    def end_rebalance(self) -> None:
        self.rebalancing = False
        self.ledger.updates.end_rebalance()
        if self.moves is not None:
            self.count("target", self.moves)
            self.moves = None

    @rule(tag=st.sampled_from(["weights", "kv_cache"]), gives=st.booleans())
    def release_or_resume(self, tag: str, gives: bool) -> None:
        if gives:
            self.ledger.counters.release({tag})
            self.released.add(tag)
        else:
            self.ledger.counters.resume({tag})
            self.released.discard(tag)

    # What must always hold.

    def look(self) -> None:
        """What follows the end of an update, as a rank does it."""
        for ended in self.ledger.take_finished():
            self.now += 0.25
            update = self.ledger.complete(ended, model_path="b", changes=TableChanges())
            if update is None or update.source is None:
                continue
            self.told += 1
            seconds = update.ended_at - update.started_at
            assert sum(update.phases.values()) == pytest.approx(seconds)
            self.seconds[ended.role, update.source].append(seconds)

    @invariant()
    def counts_are_the_models(self) -> None:
        self.look()
        for name in ROLES:
            if name not in self.ledger.roles:
                return
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
                assert counts.nbytes == sum_of_known(self.brought[key]), key
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
    def what_has_ended_is_told_once(self) -> None:
        self.look()
        assert self.told == self.ended


def test_a_refused_flush_in_a_session_does_not_make_later_buckets_a_mixture() -> None:
    """Found by the machine: the refusal counted as a write that failed."""
    machine = LedgerMachine()
    machine.start()
    machine.begin_session(role="target")
    for flush_cache in (True, False):
        machine.request(
            roles=("target",),
            source="tensor",
            verdict=CHANGED,
            flush_cache=flush_cache,
            flushes=False,
            version="",
        )
    machine.end_session(role="target", works=True)
    machine.counts_are_the_models()
    assert machine.updates["target", "tensor"] == machine.failures["target", "tensor"] == 1


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
        self.pass_(32.0)  # The look at what has changed.
        update = self.ledger.complete(ended, model_path="b", changes=TableChanges())
        assert update is not None
        return update


def test_a_session_spends_its_time_on_what_its_calls_are_about() -> None:
    """Distributed, as SGLang 0.5.21 and later have it."""
    clock = Clock()
    ledger = clock.ledger
    before = clock.now
    clock.pass_(64.0)  # The look at what is there.
    ledger.updates.begin_session("target", since=before)
    clock.pass_(1.0)  # Unpacks.
    ledger.updates.set_phase("wait", "target")
    clock.pass_(2.0)
    ledger.updates.begin_request(flush_cache=True, weight_version="2")
    ledger.updates.set_phase("receive", "target")
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
    assert role.update_started_at == clock.now - IDLE_SECONDS - 1 - 5.0
    ledger.updates.begin("target", "tensor", ends_with="later")
    update = clock.last()
    assert update.phases == {"load": 4.0, "wait": 1.0}
    assert update.nbytes == 20
    assert ledger.describe("target", role).updates["tensor"].duration.sum == 5.0


def test_the_ledger_counts_what_a_plain_model_counts() -> None:
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=150,
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
