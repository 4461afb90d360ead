# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank leaves when torch runs out of memory, and when an exception ends its scheduler.

torch calls its observers with the GPU's index, what it asked for, what the process may have and
what is free (``c10::cuda::CUDACachingAllocator::OutOfMemoryObserver``); here a test does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import torch
from made_up_gpu import Gpu
from standins import Rank, Request, fail, session

from sglang_weight_exporter.hooks.targets import SCHEDULER
from sglang_weight_exporter.records.black_box import BlackBox
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.memory_owners import largest_owners
from sglang_weight_exporter.store.ended import read_black_box
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

GIB = 2**30

#: As torch has them: GPU 0, asked for, allowed, free.
ERROR = (0, 6 * GIB, 80 * GIB, 4 * GIB)

Observer = Callable[[int, int, int, int], None]


class Torch:
    """What torch is asked to call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.observers: list[Observer] = []
        self.refuses = False
        monkeypatch.setattr(
            torch._C, "_cuda_attach_out_of_memory_observer", self.attach, raising=False
        )
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(total_memory=80 * GIB),
        )

    def attach(self, observer: Observer) -> None:
        if self.refuses:
            raise RuntimeError("cudaMallocAsync does not yet support attachOutOfMemoryObserver.")
        self.observers.append(observer)

    def run_out(self, times: int = 1) -> None:
        (observer,) = self.observers
        for _ in range(times):
            assert observer(*ERROR) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> Torch:
    return Torch(monkeypatch)


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


def directory(rank: Rank) -> RankDirectory:
    ((found, _),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    return found


def black_box(rank: Rank) -> BlackBox:
    found = read_black_box(directory(rank))
    assert found is not None, "there is no black box"
    return found


def queued(rank: Rank) -> list[BlackBox]:
    events = directory(rank).events
    boxes = [events.black_box(path) for path in events.waiting()]
    return [box for box in boxes if box is not None]


def test_an_error_is_counted_and_leaves_the_account_of_its_moment(rank: Rank, cuda: Torch) -> None:
    rank.runner()
    assert rank.snapshot().out_of_memory == 0
    cuda.run_out()
    assert rank.snapshot().out_of_memory == 1
    box = black_box(rank)
    (error,) = box.errors
    assert (error.device, error.requested, error.limit, error.free) == (
        *("cuda:0", 6 * GIB, 80 * GIB, 4 * GIB),
    )
    assert error.memory is not None
    assert error.memory.parts is not None
    assert (error.memory.parts["cached"], error.memory.parts["cuda_graphs"]) == (1000, 500)
    assert error.largest_free == 1000  # A graph's free block is no tensor's.
    assert error.elsewhere == 76 * GIB - 1500
    assert [(each.nbytes, each.of_graphs) for each in box.segments] == [(1000, False), (500, True)]
    assert [(owner.name, owner.nbytes) for owner in error.owners] == [("CUDA graphs", 500)]
    assert error.doing.updates == {}
    (event,) = queued(rank)
    assert (event.count, event.errors, event.segments) == (1, (error,), ())
    assert event.rank_id == box.rank_id == rank.snapshot().rank_id
    assert (directory(rank).path / "black_box").stat().st_mode & 0o777 == 0o600


def test_what_has_the_most_is_named(rank: Rank, cuda: Torch) -> None:
    """On the device that has run out: here the weights are on the CPU."""
    runner = rank.runner()
    inspector = rank.installation.translator._rank.inspector
    found = largest_owners(inspector._captures, "cpu", 10)
    assert [(owner.name, owner.part, owner.nbytes) for owner in found] == [
        ("embed_tokens.weight (target)", "weights", 8 * 4 * 4),
        ("proj.weight (target)", "weights", 4 * 4 * 4),
    ]
    assert found[0].address == runner.model.embed_tokens.weight.data_ptr()
    assert largest_owners(inspector._captures, "cpu", 1) == found[:1]
    assert largest_owners(inspector._captures, "cuda:0", 10) == []


def test_more_blocks_than_can_be_read_in_time_leave_the_counters(
    rank: Rank, cuda: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.runner()
    monkeypatch.setattr("sglang_weight_exporter.runners.memory.MOST_BLOCKS", -1)
    cuda.run_out()
    (error,) = black_box(rank).errors
    assert error.memory is not None
    assert (error.memory.parts, error.memory.reserved) == (None, 1500)
    assert "blocks" in error.memory.reason
    assert (error.largest_free, black_box(rank).segments) == (None, ())


def test_an_error_inside_an_update_says_so(rank: Rank, cuda: Torch) -> None:
    def run_out() -> tuple[bool, str]:
        cuda.run_out()
        return False, "Failed to update weights: CUDA out of memory."

    runner = rank.runner(answers={"disk": run_out})
    rank.scheduler(runner).update_weights_from_disk(Request())
    (error,) = black_box(rank).errors
    update = error.doing.updates["target"]
    assert (update.source, update.phase) == ("disk", "load")
    assert str(error.doing) == "an update of the target model from disk (load)"
    assert rank.last_update().failed_in == "load"
    assert rank.snapshot().out_of_memory == 1


def test_a_storm_is_counted_and_looked_into_once_a_second(rank: Rank, cuda: Torch) -> None:
    rank.runner()
    cuda.run_out(times=1000)
    assert len(black_box(rank).errors) == 1
    assert len(queued(rank)) == 1
    recorder = rank.installation.translator._rank._black_box
    for _ in range(9):
        recorder._written_at = float("-inf")  # A second later.
        cuda.run_out()
    box = black_box(rank)
    assert box.count == rank.snapshot().out_of_memory == 1009
    assert len(box.errors) == 4
    assert box.errors[0] == queued(rank)[0].errors[0]  # The first is kept.
    assert len(queued(rank)) == 1  # And within a minute there is one span.


def test_an_error_of_ours_is_not_raised_in_the_place_of_torch_s(
    rank: Rank, cuda: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.runner()
    monkeypatch.setattr(ModelRunnerInspector, "describe_out_of_memory", fail(KeyError("ours")))
    cuda.run_out()
    assert rank.installation.errors == {"out_of_memory": 1}
    assert rank.installation.translator._rank.ledger.counters.out_of_memory == 1


def test_an_error_inside_of_the_observer_is_counted_and_goes_no_deeper(
    rank: Rank, cuda: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.runner()
    describe = ModelRunnerInspector.describe_out_of_memory

    def again(inspector: Any, **error: Any) -> Any:
        cuda.run_out()
        return describe(inspector, **error)

    monkeypatch.setattr(ModelRunnerInspector, "describe_out_of_memory", again)
    cuda.run_out()
    assert (black_box(rank).count, len(black_box(rank).errors)) == (2, 1)


def test_torch_waits_for_no_thread_that_writes(rank: Rank, cuda: Torch) -> None:
    rank.runner()
    publisher = rank.installation.translator._rank._publisher
    taken, done = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with publisher._lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=write_slowly)
    thread.start()
    taken.wait()
    cuda.run_out()  # Comes back, or the test hangs.
    done.set()
    thread.join()
    assert read_black_box(directory(rank)) is None
    assert rank.installation.errors == {}


def test_it_is_attached_once_and_only_where_cuda_was_started(
    rank: Rank, cuda: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(torch.cuda, "is_initialized", lambda: False)
        rank.runner()
    assert cuda.observers == []
    assert rank.snapshot().out_of_memory is None
    rank.runner(is_draft_worker=True)
    rank.runner(is_draft_worker=True)
    assert len(cuda.observers) == 1
    assert rank.snapshot().out_of_memory == 0


def test_where_torch_has_no_such_observer_nothing_is_said_of_errors(
    rank: Rank, cuda: Torch
) -> None:
    cuda.refuses = True  # cudaMallocAsync.
    rank.runner()
    assert rank.snapshot().out_of_memory is None


# An exception that ends the scheduler.


def get_exception_traceback() -> str:
    return "as SGLang logs it"


class Scheduler:
    def run_event_loop(self, error: BaseException) -> None:
        raise error


def crash(rank: Rank, error: BaseException) -> None:
    """As ``run_scheduler_process`` ends: it asks for the text of what it has caught."""
    ask = rank.hook(SCHEDULER, get_exception_traceback)
    try:
        raise error
    except BaseException:
        assert ask() == "as SGLang logs it"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [(ValueError("shape"), True), (SystemExit(0), False), (KeyboardInterrupt(), False)],
)
def test_what_leaves_the_event_loop_is_an_end_if_it_is_an_error(
    rank: Rank, error: BaseException, is_one: bool
) -> None:
    """Of Ray's actor; SGLang's own process then asks for its text as well."""
    rank.runner()
    scheduler = rank.hook(SCHEDULER, Scheduler)()
    with pytest.raises(type(error)) as raised:
        scheduler.run_event_loop(error)
    assert raised.value is error
    if is_one:
        crash(rank, error)
    assert len(queued(rank)) == is_one
    assert (read_black_box(directory(rank)) is not None) == is_one


def test_an_exception_between_the_calls_of_an_update_ends_it_as_failed(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.begin_weight_update()
    runner.weight_updater.update_weights_from_tensor([])
    crash(rank, ValueError("illegal memory access"))
    assert rank.totals() == {"tensor": (0, 1, 1)}
    update = rank.last_update()
    assert (update.succeeded, update.effect, update.failed_in) == (False, "undefined", "wait")
    assert update.message == "ValueError: illegal memory access"
    assert rank.role().in_progress is None
    assert rank.events()[-1].update == update
    found = black_box(rank).crash
    assert found is not None
    assert (found.error, found.message) == ("ValueError", "illegal memory access")
    assert found.doing.updates["target"].source == "tensor"
    assert found.where[-1].endswith(" in crash")
    (event,) = queued(rank)
    assert event.crash == found


def test_an_exception_of_a_request_that_comes_to_no_call_ends_the_session_as_failed(
    rank: Rank,
) -> None:
    """As tensors that cannot be unpickled, in 0.5.21 and later: one bucket is in, and no more."""
    runner = rank.runner()
    scheduler = rank.scheduler(runner)
    runner.weight_updater.begin_weight_update()
    assert scheduler.update_weights_from_tensor(Request()).success
    error = ValueError("no pickle")
    scheduler._fan_out = fail(error)
    with pytest.raises(ValueError, match="no pickle"):
        scheduler.update_weights_from_tensor(Request())
    crash(rank, error)
    assert rank.totals() == {"tensor": (0, 1, 1)}
    update = rank.last_update()
    assert (update.effect, update.message, update.failed_in) == ("undefined", "no pickle", "wait")
    assert rank.events()[-1].update == update


def test_an_exception_at_another_time_is_no_update_s(rank: Rank) -> None:
    session(rank.runner(), loads=1)
    before = rank.last_update()
    crash(rank, RuntimeError("a kernel failed"))
    assert rank.last_update() == before
    assert rank.totals() == {"tensor": (1, 0, 1)}
    found = black_box(rank).crash
    assert found is not None
    assert str(found.doing) == ""


def test_an_exception_inside_a_call_keeps_what_the_call_says(rank: Rank) -> None:
    runner = rank.runner(answers={"disk": fail(ValueError("shape"))})
    with pytest.raises(ValueError, match="shape") as raised:
        rank.scheduler(runner).update_weights_from_disk(Request())
    crash(rank, raised.value)
    assert (rank.last_update().message, rank.last_update().failed_in) == ("shape", "load")
    assert rank.totals() == {"disk": (0, 1, 1)}


def test_an_exception_before_the_first_model_is_nobody_s(rank: Rank) -> None:
    crash(rank, RuntimeError("the port is taken"))
    assert list(rank.directory.glob("ranks/*")) == []
    assert rank.installation.errors == {}


def test_what_asks_without_an_exception_is_no_end(rank: Rank) -> None:
    rank.runner()
    rank.hook(SCHEDULER, get_exception_traceback)()
    assert read_black_box(directory(rank)) is None


def test_an_exception_whose_text_raises_ends_the_scheduler_as_without_us(rank: Rank) -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    rank.runner()
    crash(rank, OddError())
    found = black_box(rank).crash
    assert found is not None
    assert (found.error, found.message) == ("OddError", "")
