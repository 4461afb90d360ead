# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates whose bytes come after SGLang has answered: NCCL is asynchronous, and a device that waits
for its peer is waited for by nobody. The events of the stream are made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from hooks.test_black_box import crash  # noqa: E402
from hooks.test_memory import memory  # noqa: E402
from made_up_gpu import Gpu  # noqa: E402
from standins import Rank, Request, session  # noqa: E402
from waiting import eventually  # noqa: E402

from sglang_weight_exporter.fingerprint.tensors import (  # noqa: E402
    Fingerprinter,
)
from sglang_weight_exporter.store.reader import SnapshotReader  # noqa: E402
from sglang_weight_exporter.store.runtime_dir import RuntimeDir  # noqa: E402

BATCH: dict[str, Any] = {"names": ["w"], "dtypes": ["float32"], "shapes": [[250]]}


class Peer:
    """Sends when a test says so; stands for the events around every call."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.sent = threading.Event()
        self.sent_at: float | None = None

    def send(self) -> None:
        self.sent_at = self.rank.clock()
        self.sent.set()

    def end(self) -> None:
        pass

    def at(self) -> float | None:
        return self.sent_at

    def wait(self) -> None:
        self.sent.wait()


@pytest.fixture(params=[False, True], ids=["", "with fingerprints"])
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime", fingerprinter=Fingerprinter() if request.param else None)


@pytest.fixture
def peer(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> Peer:
    made = Peer(rank)
    monkeypatch.setattr("sglang_weight_exporter.runners.inspector.arrival", lambda clock: made)
    return made


def phases(rank: Rank) -> dict[str, float]:
    return {phase: round(seconds) for phase, seconds in rank.last_update().phases.items()}


def updates(rank: Rank) -> int:
    return rank.role().updates["distributed"].updates


def receive(runner: Any) -> None:
    """As 0.5.17: the call returns when the broadcast and the copies after it are queued."""
    runner.weight_updater.update_weights_from_distributed(*BATCH.values(), "group")


class Scheduler:
    """Ends an update that has no session."""

    def __init__(self, rank: Rank, runner: Any) -> None:
        self.components = rank.scheduler(runner)
        self.runner = runner

    def update(self) -> None:
        self.components._fan_out = lambda recv_req, call: self._receive()
        self.components.update_weights_from_tensor(Request())

    def _receive(self) -> Any:
        receive(self.runner)
        return type("Answer", (), {"success": True, "message": ""})()


def test_an_update_ends_when_its_bytes_are_there(rank: Rank, peer: Peer) -> None:
    runner = rank.runner()
    before = rank.events()
    Scheduler(rank, runner).update()
    assert rank.role().in_progress is not None  # SGLang has answered.
    assert (updates(rank), rank.events()) == (0, before)
    rank.clock.now += 100
    peer.send()
    assert eventually(lambda: updates(rank) == 1)
    update = rank.last_update()
    assert round(update.ended_at - update.started_at) == 100
    assert phases(rank)["receive"] == 100
    assert sum(phases(rank).values()) == 100
    assert len(rank.events()) == len(before) + 1


def test_what_is_there_in_time_ends_at_once(rank: Rank, peer: Peer) -> None:
    peer.send()
    Scheduler(rank, rank.runner()).update()
    assert updates(rank) == 1
    assert phases(rank).get("receive", 0) == 0


def test_time_until_a_bucket_is_there_is_receiving_and_no_waiting(rank: Rank, peer: Peer) -> None:
    runner = rank.runner()
    updater = runner.weight_updater
    updater.begin_weight_update()
    updater.receive_weights_from_distributed(**BATCH, group_name="group")
    updater.load_weights_from_distributed([])
    rank.clock.now += 20
    peer.send()
    rank.clock.now += 5  # The trainer makes the next one.
    updater.end_weight_update(run_post_load=False)
    assert updates(rank) == 1
    assert {phase: phases(rank).get(phase) for phase in ("receive", "wait")} == {
        "receive": 20,
        "wait": 5,
    }


def test_updates_whose_senders_are_late_end_one_after_the_other(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody calls anything of SGLang's meanwhile."""
    peers: list[Peer] = []

    def arrival(clock: Callable[[], float]) -> Peer:
        peers.append(Peer(rank))
        return peers[-1]

    monkeypatch.setattr("sglang_weight_exporter.runners.inspector.arrival", arrival)
    scheduler = Scheduler(rank, rank.runner())
    before = rank.events()
    for _ in range(2):
        scheduler.update()
        rank.clock.now += 100
    for peer in peers:
        peer.send()
        rank.clock.now += 1000
    assert eventually(lambda: updates(rank) == 2)
    ended = [event.update.ended_at for event in rank.events()[len(before) :]]
    sent = [peer.sent_at for peer in peers]
    assert ended == pytest.approx(sent, abs=1)


def test_the_next_update_does_not_wait_for_the_one_before(rank: Rank, peer: Peer) -> None:
    runner = rank.runner()
    Scheduler(rank, runner).update()
    session(runner, loads=1)
    peer.send()
    assert eventually(lambda: updates(rank) == 1)
    assert rank.role().updates["tensor"].updates == 1
    assert rank.role().in_progress is None


def test_a_device_that_died_costs_no_update_that_it_still_had(
    rank: Rank, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of it once the scheduler ends."""
    runner = rank.runner()
    Scheduler(rank, runner).update()

    def illegal_access() -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(peer, "at", illegal_access)
    crash(rank, RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert updates(rank) == 1
    assert rank.role().in_progress is None


def test_a_process_that_gets_no_thread_completes_with_sglangs_next_call(
    rank: Rank, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = rank.runner()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        Scheduler(rank, runner).update()
    peer.send()
    session(runner, loads=1)
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    assert snapshot.roles[0].updates["distributed"].updates == 1
    assert snapshot.hook_errors == {"arrival": 1}


def test_what_an_update_needs_is_seen_while_another_one_arrives(
    rank: Rank, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    runner = rank.runner(answers={})
    Scheduler(rank, runner).update()
    before = gpu.reserved
    gpu.cached += 300  # By a pass.

    def load() -> tuple[bool, str]:
        gpu.cached += 500
        return True, "Success"

    runner.answers["tensor"] = load
    runner.weight_updater.begin_weight_update()
    runner.weight_updater.update_weights_from_tensor([])
    peer.send()
    assert eventually(lambda: updates(rank) == 1)
    runner.weight_updater.update_weights_from_tensor([])
    runner.weight_updater.end_weight_update(run_post_load=False)
    found = memory(rank)
    assert (found.before_update, found.after_update) == (before + 300, before + 1300)
