# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates whose bytes come after SGLang has answered: NCCL is asynchronous, and a device that waits
for its peer is waited for by nobody. The events of the stream are made up."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from standins import Rank, Request, model, rebalanced, session  # noqa: E402
from waiting import eventually  # noqa: E402

from sglang_weight_exporter.fingerprint.tensors import (  # noqa: E402
    Fingerprinter,
    FingerprintError,
)

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


def test_the_next_update_does_not_wait_for_the_one_before(rank: Rank, peer: Peer) -> None:
    runner = rank.runner()
    Scheduler(rank, runner).update()
    session(runner, loads=1)
    peer.send()
    assert eventually(lambda: updates(rank) == 1)
    assert rank.role().updates["tensor"].updates == 1
    assert rank.role().in_progress is None


# --- weights that the device reads on its own time ------------------------------------------------


class End:
    """Of a reading: comes in its turn, or when SGLang's thread waits for it."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.engine_waited = False

    def query(self) -> bool:
        return self.come.is_set()

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self.query():
            self.engine_waited = True
            self.come.set()
        self.come.wait()


class Device(Fingerprinter):
    """Reads this process's memory by its addresses, as kernels do; there is no GPU here. What it
    has begun holds what was there before anything that it is asked for later."""

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

    def of_addresses(self, device: Any, data_ptr: Any, nbytes: Any, **more: Any) -> Any:
        begun = self.read.pop(data_ptr.tobytes(), None)
        if begun is not None:
            assert self.begun[-1].query()
            return begun
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
def reading(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
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


def modified(rank: Rank) -> dict[Any, Any]:
    """While it served: kind of the tensor → how many."""
    found = rank.role().fingerprints
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


def test_sglang_answers_before_the_weights_are_read(reading: Rank, device: Device) -> None:
    runner = reading.runner(answers={})
    before, loaded = fingerprint(reading), device.at_once
    sends(runner, device)
    Scheduler(reading, runner).update()
    there, left = device.begun
    assert not left.query()
    assert reading.role().in_progress is not None
    answered_at = reading.clock()
    reading.clock.now += 100
    left.come.set()
    assert eventually(lambda: updates(reading) == 1)
    assert fingerprint(reading) not in {"", before}
    assert modified(reading) == {}
    update = reading.last_update()
    assert 0 < update.phases["capture"] < 1
    assert sum(update.phases.values()) == pytest.approx(update.ended_at - update.started_at)
    assert update.ended_at <= answered_at  # It was there, and SGLang went on.
    assert device.at_once == loaded
    assert not there.engine_waited


def test_what_wrote_before_an_update_is_known_after_it(reading: Rank, device: Device) -> None:
    runner = reading.runner(answers={})
    add_one(runner)
    sends(runner, device)
    for number in range(1, 3):
        Scheduler(reading, runner).update()
        device.catch_up()
        assert eventually(lambda n=number: updates(reading) == n)  # type: ignore[misc]
        assert modified(reading) == {"parameter": 1}
    table = reading.role().table
    assert table is not None
    assert table.modified == 0  # The update has written it.


def test_what_passes_write_is_scratch_after_an_update(reading: Rank, device: Device) -> None:
    made = model()
    made.history = torch.zeros(6)
    runner = reading.runner(model=made, answers={})
    rows = reading.role().table
    made.history += 1
    sends(runner, device)
    Scheduler(reading, runner).update()
    device.catch_up()
    assert eventually(lambda: updates(reading) == 1)
    table = reading.role().table
    assert rows is not None
    assert table is not None
    assert table.rows == rows.rows - 1
    assert reading.snapshot().hook_errors == {}


def fails(device: Device, runner: Any) -> None:
    device.error = FingerprintError("A CUDA graph is being captured.")


def has_gaps(device: Device, runner: Any) -> None:
    """No kernel reads it, so it would be read when it is written."""
    runner.model.proj.weight.data = torch.ones(25, 20)[:, ::2]
    session(runner, loads=1)


@pytest.mark.parametrize("hinders", [fails, has_gaps])
def test_what_cannot_be_read_meanwhile_is_read_at_once(
    hinders: Callable[[Device, Any], None], reading: Rank, device: Device
) -> None:
    runner = reading.runner(answers={})
    hinders(device, runner)
    begun, at_once = len(device.begun), device.at_once
    known = modified(reading).get("parameter", 0)
    add_one(runner)

    def write() -> tuple[bool, str]:
        assert len(device.begun) == begun
        assert device.at_once == at_once + 1
        add_one(runner)
        return True, "Success"

    runner.answers["distributed"] = write
    Scheduler(reading, runner).update()
    device.catch_up()
    assert eventually(lambda: updates(reading) == 1)
    assert modified(reading) == {"parameter": known + 1}


def test_a_capture_in_the_middle_of_an_update_comes_after_the_reading(
    reading: Rank, device: Device
) -> None:
    """As when an adapter is loaded: it would be taken for what was there before."""
    runner = reading.runner(answers={})
    add_one(runner)

    def write() -> tuple[bool, str]:
        runner.alloc_memory_pool()
        assert device.begun[-1].engine_waited
        add_one(runner)
        return True, "Success"

    runner.answers["distributed"] = write
    Scheduler(reading, runner).update()
    device.catch_up()
    assert eventually(lambda: updates(reading) == 1)
    assert modified(reading) == {"parameter": 1}
    assert reading.snapshot().hook_errors == {}


def at_rest(reading: Rank, runner: Any) -> None:
    session(runner, loads=1)


def released(reading: Rank, runner: Any) -> None:
    reading.scheduler(runner).release_memory_occupation(Request(tags=None))


def moved(reading: Rank, runner: Any) -> None:
    rebalanced(reading, lambda: None, chunks=1)


@pytest.mark.parametrize("then", [at_rest, released, moved])
def test_what_writes_or_releases_weights_comes_after_their_reading(
    then: Callable[[Rank, Any], None], reading: Rank, device: Device
) -> None:
    runner = reading.runner()
    Scheduler(reading, runner).update()
    assert not device.begun[-1].query()
    left = device.begun[-1]
    then(reading, runner)
    assert left.engine_waited
    assert updates(reading) == 1


def of_tensors(reading: Rank, runner: Any) -> None:
    runner.weight_updater.update_weights_from_tensor([])
    runner.weight_updater.end_weight_update(run_post_load=False)


@pytest.mark.parametrize("then", [of_tensors, released, moved])
def test_what_writes_or_releases_weights_comes_after_the_reading_of_what_was_there(
    then: Callable[[Rank, Any], None], reading: Rank, device: Device
) -> None:
    """In a session of which nobody knows yet how its weights will come."""
    runner = reading.runner()
    add_one(runner)
    runner.weight_updater.begin_weight_update()
    (there,) = device.begun
    assert not there.query()
    then(reading, runner)
    assert there.engine_waited
    assert modified(reading) == {"parameter": 1}
