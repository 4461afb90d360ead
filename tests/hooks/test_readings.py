# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that a device reads on its own time, before an update over a process group and after it:
what it has read is of the moment in which that was asked of it, and nothing writes or releases what
it still reads. The device is made up: it reads this process's memory."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from hooks.test_arrival import Peer, Scheduler, updates  # noqa: E402
from standins import Rank, Request, model, rebalanced, session  # noqa: E402
from standins import Scheduler as SglangScheduler  # noqa: E402
from waiting import eventually  # noqa: E402

from sglang_weight_exporter import updating  # noqa: E402
from sglang_weight_exporter.fingerprint.tensors import (  # noqa: E402
    Fingerprinter,
    FingerprintError,
)
from sglang_weight_exporter.hooks.targets import SCHEDULER  # noqa: E402


class End:
    """Of a reading: comes in its turn, or when SGLang's thread waits for it."""

    def __init__(self) -> None:
        self.come, self.awaited = threading.Event(), threading.Event()
        self.engine_waited = False

    def query(self) -> bool:
        return self.come.is_set()

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self.query():
            self.engine_waited = True
            self.come.set()
        self.awaited.set()
        self.come.wait()


class Device(Fingerprinter):
    """Reads by addresses, as kernels do; there is no GPU here. What it has begun holds what was
    there before anything that it is asked for later."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[End] = []
        self.read: dict[bytes, Any] = {}
        #: Readings that SGLang's thread has waited for from their beginning.
        self.at_once = 0
        self.error: FingerprintError | None = None

    def has_kernels(self, device: Any) -> bool:
        return True

    def catch_up(self) -> None:
        for end in self.begun:
            end.come.set()

    def begin(self, device: Any, data_ptr: Any, nbytes: Any, **more: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.read[data_ptr.tobytes()] = self._read(data_ptr, nbytes)
        self.begun.append(End())
        return self.begun[-1]

    def of_addresses(
        self, device: Any, data_ptr: Any, nbytes: Any, *, begun: bool = False, **more: Any
    ) -> Any:
        if begun:
            return self.read[data_ptr.tobytes()]
        self.at_once += 1
        return self._read(data_ptr, nbytes)

    def _read(self, data_ptr: Any, nbytes: Any) -> Any:
        places = zip(data_ptr.tolist(), nbytes.tolist(), strict=True)
        return self(
            [torch.frombuffer(bytearray(ctypes.string_at(*at)), dtype=torch.uint8) for at in places]
        )


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def rank(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """A rank whose tensors have arrived as soon as the call returns."""

    class Prompt(Peer):
        def end(self) -> None:
            device.catch_up()
            self.send()

    made = Rank(tmp_path / "runtime", fingerprinter=device)
    monkeypatch.setattr(
        "sglang_weight_exporter.runners.inspector.arrival", lambda clock: Prompt(made)
    )
    return made


def fingerprint(rank: Rank) -> str:
    table = rank.role().table
    return "" if table is None else table.fingerprint


def modified(rank: Rank, role: str = "target") -> dict[Any, Any]:
    """While it served: kind of the tensor → how many."""
    found = rank.role(role).fingerprints
    assert found is not None
    return found.modified.get("serving", {})


def add_one(runner: Any) -> None:
    with torch.no_grad():
        runner.model.proj.weight += 1


def sends(runner: Any, device: Device) -> None:
    """What comes is written before the device has said that it has read what was there."""

    def write() -> tuple[bool, str]:
        assert not device.begun[-1].query()
        add_one(runner)
        return True, "Success"

    runner.answers["distributed"] = write


def wait_for(rank: Rank, number: int) -> None:
    assert eventually(lambda: updates(rank) == number)


def test_sglang_answers_before_the_weights_are_read(rank: Rank, device: Device) -> None:
    runner = rank.runner(answers={})
    before, loaded = fingerprint(rank), device.at_once
    sends(runner, device)
    Scheduler(rank, runner).update()
    there, left = device.begun
    assert not left.query()
    assert rank.role().in_progress is not None
    answered_at = rank.clock()
    rank.clock.now += 100
    left.come.set()
    wait_for(rank, 1)
    assert fingerprint(rank) not in {"", before}
    assert modified(rank) == {}
    update = rank.last_update()
    assert 0 < update.phases["capture"] < 1
    assert sum(update.phases.values()) == pytest.approx(update.ended_at - update.started_at)
    assert update.ended_at <= answered_at  # It was there, and SGLang went on.
    assert device.at_once == loaded
    assert not there.engine_waited


def test_what_wrote_before_an_update_is_known_after_it(rank: Rank, device: Device) -> None:
    runner = rank.runner(answers={})
    add_one(runner)
    sends(runner, device)
    for number in range(1, 3):
        Scheduler(rank, runner).update()
        device.catch_up()
        wait_for(rank, number)
        assert modified(rank) == {"parameter": 1}
    table = rank.role().table
    assert table is not None
    assert table.modified == 0  # The update has written it.


def test_what_passes_write_is_scratch_after_an_update_that_moves_weights(
    rank: Rank, device: Device
) -> None:
    made = model()
    made.history = torch.zeros(6)
    runner = rank.runner(model=made, answers={})
    rows = rank.role().table
    made.history += 1

    def write() -> tuple[bool, str]:
        made.proj.weight.data = made.proj.weight.data + 1
        return True, "Success"

    runner.answers["distributed"] = write
    Scheduler(rank, runner).update()
    device.catch_up()
    wait_for(rank, 1)
    table = rank.role().table
    assert rows is not None
    assert table is not None
    assert table.rows == rows.rows - 1
    changes = rank.last_update().changes
    assert (changes.moved, changes.added, changes.removed) == (1, 0, 0)


def test_what_passes_write_is_no_change_of_an_update(rank: Rank, device: Device) -> None:
    made = model()
    made.register_buffer("seen", torch.zeros(4))
    made.history = torch.zeros(6)
    runner = rank.runner(model=made, answers={})
    made.seen += 1
    made.history += 1
    Scheduler(rank, runner).update()
    device.catch_up()
    wait_for(rank, 1)
    assert rank.role().updates["distributed"].without_change == 1


def fails(device: Device, runner: Any) -> None:
    device.error = FingerprintError("A CUDA graph is being captured.")


def has_gaps(device: Device, runner: Any) -> None:
    """No kernel reads it, so it would be read when it is written."""
    runner.model.proj.weight.data = torch.ones(25, 20)[:, ::2]
    session(runner, loads=1)


@pytest.mark.parametrize("hinders", [fails, has_gaps])
def test_what_cannot_be_read_meanwhile_is_read_at_once(
    hinders: Callable[[Device, Any], None], rank: Rank, device: Device
) -> None:
    runner = rank.runner(answers={})
    hinders(device, runner)
    begun, at_once = len(device.begun), device.at_once
    known = modified(rank).get("parameter", 0)
    add_one(runner)

    def write() -> tuple[bool, str]:
        assert len(device.begun) == begun
        assert device.at_once == at_once + 1
        add_one(runner)
        return True, "Success"

    runner.answers["distributed"] = write
    Scheduler(rank, runner).update()
    device.catch_up()
    wait_for(rank, 1)
    assert modified(rank) == {"parameter": known + 1}


def test_a_capture_in_the_middle_of_an_update_comes_after_the_reading(
    rank: Rank, device: Device
) -> None:
    """As when an adapter is loaded: it would be taken for what was there before."""
    runner = rank.runner(answers={})
    add_one(runner)

    def write() -> tuple[bool, str]:
        runner.alloc_memory_pool()
        assert device.begun[-1].engine_waited
        add_one(runner)
        return True, "Success"

    runner.answers["distributed"] = write
    Scheduler(rank, runner).update()
    device.catch_up()
    wait_for(rank, 1)
    assert modified(rank) == {"parameter": 1}


# Whatever writes or releases weights waits.


def of_a_group(rank: Rank, runner: Any, then: Callable[[], Any]) -> None:
    runner.answers["distributed"] = then
    Scheduler(rank, runner).update()


def of_a_session(rank: Rank, runner: Any, then: Callable[[], Any]) -> None:
    runner.answers["begin"] = then
    session(runner, loads=1)


def released(rank: Rank, runner: Any, then: Callable[[], Any]) -> None:
    components = rank.scheduler(runner)
    components.barrier = then
    components.release_memory_occupation(Request(tags=None))


def moved(rank: Rank, runner: Any, then: Callable[[], Any]) -> None:
    rebalanced(rank, then, chunks=1)


Then = Callable[[Rank, Any, Callable[[], Any]], None]


def is_over_when(writes: Then, rank: Rank, runner: Any, end: End) -> bool:
    """Whether the device has read once SGLang's own code runs."""
    over: list[bool] = []

    def then() -> tuple[bool, str]:
        over.append(end.query())
        return True, "Success"

    writes(rank, runner, then)
    return over == [True]


@pytest.mark.parametrize("writes", [of_a_group, of_a_session, released, moved])
def test_what_an_update_left_is_read_before_anything_else_may_write_it(
    writes: Then, rank: Rank, device: Device
) -> None:
    runner = rank.runner(answers={})
    Scheduler(rank, runner).update()
    left = device.begun[-1]
    assert not left.query()
    assert is_over_when(writes, rank, runner, left)
    assert left.engine_waited
    assert updates(rank) >= 1


def of_tensors(rank: Rank, runner: Any, then: Callable[[], Any]) -> None:
    runner.answers["tensor"] = then
    runner.weight_updater.update_weights_from_tensor([])
    runner.weight_updater.end_weight_update(run_post_load=False)


def join(runner: Any) -> None:
    runner.weight_updater.init_weights_update_group("127.0.0.1", 1, group_name="group")


@pytest.mark.parametrize("writes", [of_tensors, released, moved])
def test_what_was_there_before_a_session_is_read_before_anything_else_may_write_it(
    writes: Then, rank: Rank, device: Device
) -> None:
    """Nobody knows yet how its weights will come."""
    runner = rank.runner(answers={})
    join(runner)
    add_one(runner)
    runner.weight_updater.begin_weight_update()
    (there,) = device.begun
    assert not there.query()
    assert is_over_when(writes, rank, runner, there)
    assert modified(rank) == {"parameter": 1}


def test_torch_gives_no_memory_back_that_is_read(
    rank: Rank, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush may empty torch's cache, also in the middle of an update."""
    asked: list[None] = []
    when_flushed: list[bool] = []

    def is_slow() -> bool:
        asked.append(None)
        return len(asked) > 3

    class Scheduler(SglangScheduler):
        def flush_cache(self, empty_cache: bool = True) -> bool:
            when_flushed.append(is_slow())
            return True

    runner = rank.runner()
    join(runner)
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    scheduler.forward_ct += 1  # A pass, which could have written.
    runner.weight_updater.begin_weight_update()
    (there,) = device.begun
    monkeypatch.setattr(there, "query", is_slow)
    scheduler.flush_cache()
    assert when_flushed == [True]


@pytest.mark.parametrize(("group", "known"), [(False, {"parameter": 1}), (True, {})])
def test_what_comes_by_rdma_is_written_in_no_stream(
    group: bool, known: dict[str, int], rank: Rank, device: Device
) -> None:
    """In a session without a call. With a group it was to come from there, and what was read of the
    time before may be torn."""
    runner = rank.runner(answers={})
    if group:
        join(runner)
    add_one(runner)
    runner.weight_updater.begin_weight_update()
    assert len(device.begun) == group
    add_one(runner)
    runner.weight_updater.end_weight_update(run_post_load=True)
    assert rank.role().updates["p2p"].updates == 1
    assert modified(rank) == known


def test_code_beside_sglang_may_write_from_anywhere(
    rank: Rank, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = SimpleNamespace(installation=rank.installation, find_spec=lambda *about: None)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    runner = rank.runner()
    add_one(runner)
    with updating(runner, source="distributed"):
        assert device.begun == []
        add_one(runner)
    device.catch_up()
    wait_for(rank, 1)
    assert modified(rank) == {"parameter": 1}


def test_a_request_that_is_refused_begins_nothing(rank: Rank, device: Device) -> None:
    runner = rank.runner(answers={})
    refusing = rank.scheduler(runner, refuses="no session")
    refusing.update_weights_from_distributed(Request())
    assert device.begun == []
    assert rank.role().updates["distributed"].failures == 1
    assert rank.role().in_progress is None


def test_a_draft_that_is_packed_after_the_target_was_read_is_read_after_that(
    rank: Rank, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread of ours, whose stream is not behind SGLang's."""
    packed = End()
    monkeypatch.setattr(
        "sglang_weight_exporter.runners.inspector.asked_so_far",
        lambda: packed if len(device.begun) > 2 else None,
    )
    target, draft = rank.runner(), rank.runner(is_draft_worker=True, answers={}, model=model())
    join(target)
    for runner in (target, draft):
        runner.weight_updater.begin_weight_update()
    for runner in (target, draft):
        runner.weight_updater.load_weights_from_distributed([])
    device.catch_up()
    before = len(device.begun)
    target.weight_updater.end_weight_update(run_post_load=False)
    assert len(device.begun) == before + 1

    def pack() -> None:
        add_one(draft)

    draft.answers["end"] = pack
    draft.weight_updater.end_weight_update(run_post_load=False)
    at_once = device.at_once
    device.begun[-1].come.set()
    assert eventually(packed.awaited.is_set)
    assert rank.role("draft").in_progress is not None
    assert device.at_once == at_once
    packed.come.set()
    assert eventually(lambda: rank.role("draft").updates["distributed"].updates == 1)
    assert rank.role("target").updates["distributed"].updates == 1
    assert modified(rank, "draft") == {}
