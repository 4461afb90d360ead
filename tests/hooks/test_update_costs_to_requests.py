# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates cost those who wait, whatever the scheduler's calls are.

The scheduler is a stand-in with requests, pauses and batches as 0.5.23 has them; a clock that only
the test moves says how long each thing takes. A real engine under load is in `tests/e2e`.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from standins import Rank, Request

from sglang_weight_exporter.hooks.targets import SCHEDULER
from sglang_weight_exporter.records.costs import UpdateCost
from sglang_weight_exporter.records.updates import Source


class Generation:
    """One request, of so many generated tokens."""

    def __init__(self, rid: str, generated: int = 0) -> None:
        self.rid = rid
        self.output_ids = [7] * generated
        self.to_finish: object = None
        self.weight_version_events: list[str] = []
        self.done = False

    def finished(self) -> bool:
        return self.done


class Scheduler:
    """Of 0.5.23: what is hooked, and what it reads of itself."""

    def __init__(self) -> None:
        self.forward_ct = 0
        self.cached = 0
        self.tree_cache = SimpleNamespace(evictable_size=lambda: self.cached, protected_size=int)
        self.waiting_queue: list[Generation] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch = None
        self.chunked_req = None
        self.version = "1"
        self.batches = 0

    def run_batch(self, batch: Any) -> str:
        self.batches += 1
        return "result"

    def flush_cache(self, empty_cache: bool = True) -> bool:
        self.cached = 0
        return True

    def pause_generation(self, recv_req: Any) -> None:
        if recv_req.mode == "retract":
            self.waiting_queue += self.running_batch.reqs
            self.running_batch.reqs = []

    def continue_generation(self, recv_req: Any) -> None:
        pass

    def abort_request(self, recv_req: Any) -> None:
        if recv_req.abort_all:
            self.waiting_queue = []
            for request in self.running_batch.reqs:
                request.to_finish = "abort"

    def record_weight_version_change(self, new_version: str | None) -> None:
        for request in [*self.running_batch.reqs, *self.waiting_queue]:
            if request.output_ids:
                request.weight_version_events.append(self.version)

    def finish_aborted(self) -> None:
        """The pass that ends them."""
        self.run_batch(SimpleNamespace(reqs=list(self.running_batch.reqs)))
        self.running_batch.reqs = []

    def run(self) -> Any:
        """A batch of what is there."""
        self.running_batch.reqs += self.waiting_queue
        self.waiting_queue = []
        return self.run_batch(SimpleNamespace(reqs=list(self.running_batch.reqs)))


class Engine:
    """A rank with a scheduler, and its updates."""

    def __init__(self, directory: Path) -> None:
        self.rank = Rank(directory)
        self.scheduler = self.rank.hook(SCHEDULER, Scheduler)()
        self.component = self.rank.scheduler(self.rank.runner())

    def wait(self, seconds: float) -> None:
        self.rank.clock.now += seconds

    def pause(self, mode: str) -> None:
        self.scheduler.pause_generation(SimpleNamespace(mode=mode))

    def abort_all(self) -> None:
        self.scheduler.abort_request(SimpleNamespace(abort_all=True, rid=""))

    def go_on(self) -> None:
        self.scheduler.continue_generation(SimpleNamespace())

    def update(self, seconds: float = 0.0) -> None:
        """From disk, which takes so long."""

        def take(*arguments: Any) -> tuple[bool, str]:
            self.wait(seconds)
            return True, ""

        for runner in self.component.runners:
            runner.answers = {"disk": take}
        assert self.component.update_weights_from_disk(Request()).success

    @property
    def costs(self) -> dict[Source, UpdateCost]:
        return self.rank.snapshot().costs

    @property
    def last(self) -> UpdateCost:
        last = self.rank.snapshot().last_cost
        assert last is not None
        return last


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "runtime")


def seconds(expected: float) -> Any:
    """The clock of the tests moves a millisecond each time that it is read."""
    return pytest.approx(expected, abs=0.5)


def test_a_pause_costs_from_its_order_to_the_first_batch(engine: Engine) -> None:
    engine.scheduler.running_batch.reqs = [Generation("a", 5), Generation("b", 3)]
    engine.scheduler.waiting_queue = [Generation("c")]
    engine.pause("in_place")
    engine.wait(10)
    engine.update(seconds=20)
    assert engine.last.paused_seconds == seconds(30)
    assert engine.rank.last_update().cost == engine.last
    engine.wait(40)
    engine.go_on()
    engine.wait(2)
    assert engine.scheduler.run() == "result"
    assert engine.last.paused_seconds == seconds(72)
    assert engine.costs == {"disk": engine.last}
    assert engine.last.requests == {"kept": 3}
    engine.wait(100)
    engine.scheduler.run()
    assert engine.last.paused_seconds == seconds(72)
    assert engine.rank.installation.errors == {}


def test_batches_after_the_first_are_sglangs_own(engine: Engine) -> None:
    """Nothing of ours is in them: the method is the class's again."""
    own = type(engine.scheduler).run_batch
    engine.scheduler.waiting_queue = [Generation("a")]
    engine.pause("in_place")
    engine.update()
    engine.go_on()
    engine.scheduler.run()
    assert engine.scheduler.run_batch == MethodType(own, engine.scheduler)
    assert engine.scheduler.batches == 1


def test_a_pause_without_an_update_costs_updates_nothing(engine: Engine) -> None:
    engine.scheduler.waiting_queue = [Generation("a")]
    engine.pause("retract")
    engine.wait(50)
    engine.go_on()
    engine.scheduler.run()
    assert engine.rank.snapshot().last_cost is None
    engine.scheduler.running_batch.reqs = []
    engine.update(seconds=3)
    assert engine.last == UpdateCost(paused_seconds=engine.last.paused_seconds)
    assert engine.last.paused_seconds == seconds(3)


def test_where_nobody_waits_the_time_ends_with_the_update(engine: Engine) -> None:
    engine.update(seconds=3)
    engine.wait(1000)
    engine.scheduler.waiting_queue = [Generation("a")]
    engine.scheduler.run()
    assert engine.last.paused_seconds == seconds(3)


def test_requests_that_wait_for_an_update_wait_until_their_batch(engine: Engine) -> None:
    engine.scheduler.waiting_queue = [Generation("a")]
    engine.update(seconds=3)
    engine.wait(4)
    engine.scheduler.run()
    assert engine.last.paused_seconds == seconds(7)


def test_retracted_requests_and_a_flush(engine: Engine) -> None:
    engine.scheduler.running_batch.reqs = [Generation("a", 5), Generation("b", 3)]
    engine.scheduler.waiting_queue = [Generation("c")]
    engine.scheduler.cached = 640
    engine.pause("retract")
    engine.scheduler.flush_cache()
    engine.scheduler.record_weight_version_change(new_version="2")
    engine.update()
    assert engine.last.requests == {"kept": 1, "retracted": 2}
    assert engine.last.discarded == {"cached": 640}
    assert engine.last.straddling == 2  # The third has no tokens yet.


def test_aborted_requests_and_their_tokens(engine: Engine) -> None:
    """The pass that ends them makes no token for anybody, and generation goes on much later."""
    engine.scheduler.running_batch.reqs = [Generation("a", 5), Generation("b", 3)]
    engine.scheduler.waiting_queue = [Generation("c")]
    engine.abort_all()
    engine.scheduler.finish_aborted()
    engine.wait(1)
    engine.abort_all()  # Until none is left: once a second.
    engine.wait(2)
    engine.update(seconds=3)
    engine.wait(30)
    engine.go_on()
    engine.wait(500)
    engine.scheduler.waiting_queue = [Generation("d")]
    engine.scheduler.run()
    assert engine.last.requests == {"aborted": 3}
    assert engine.last.discarded == {"generated": 8}
    assert engine.last.paused_seconds == seconds(36)


def test_an_update_that_aborts_by_itself_ends_with_its_call(engine: Engine) -> None:
    """``abort_all_requests`` of an update: nobody orders generation to go on."""
    engine.scheduler.running_batch.reqs = [Generation("a", 5)]
    engine.abort_all()
    engine.scheduler.finish_aborted()
    engine.wait(1)
    engine.update(seconds=3)
    engine.wait(500)
    engine.scheduler.waiting_queue = [Generation("d")]
    engine.scheduler.run()
    assert engine.last.paused_seconds == seconds(4)
    engine.abort_all()
    engine.update(seconds=2)
    assert engine.costs["disk"].requests == {"aborted": 2}


def test_rollouts_that_were_cut_off_long_before_are_not_the_updates(engine: Engine) -> None:
    engine.scheduler.running_batch.reqs = [Generation("a", 5)]
    engine.abort_all()
    engine.scheduler.finish_aborted()
    engine.wait(300)
    engine.update(seconds=3)
    assert engine.last.requests == {}
    assert engine.last.discarded == {}
    assert engine.last.paused_seconds == seconds(3)


def test_a_session_is_one_cost(engine: Engine) -> None:
    engine.scheduler.running_batch.reqs = [Generation("a", 5)]
    engine.component.begin_weight_update(Request())
    engine.wait(5)
    engine.component.update_weights_from_tensor(Request(flush_cache=False))
    engine.wait(6)
    engine.scheduler.run()  # Between its calls.
    engine.wait(70)
    engine.component.end_weight_update(Request())
    engine.scheduler.run()
    assert engine.costs == {"tensor": engine.last}
    assert engine.last.paused_seconds == seconds(11)
    assert engine.last.requests == {"kept": 1}


def test_target_and_draft_are_one_update_to_those_who_wait(engine: Engine) -> None:
    engine.component = engine.rank.scheduler(
        engine.rank.runner(), engine.rank.runner(is_draft_worker=True)
    )
    engine.scheduler.waiting_queue = [Generation("a")]
    engine.pause("in_place")
    for version in (1, 2):
        engine.wait(5)
        engine.component.begin_weight_update(Request())
        engine.component.update_weights_from_tensor(Request(flush_cache=False))
        engine.wait(10)
        engine.component.end_weight_update(Request())
        assert engine.last.paused_seconds == seconds(15)
        assert engine.costs["tensor"].paused_seconds == seconds(15 * version)
    assert engine.costs["tensor"].requests == {"kept": 1}


def test_requests_of_another_form_cost_only_their_count(engine: Engine) -> None:
    engine.scheduler.waiting_queue = [object()]
    engine.update(seconds=3)
    assert engine.rank.installation.errors == {"requests": 1}
    assert engine.scheduler.run_batch(SimpleNamespace(reqs=[object()])) == "result"
