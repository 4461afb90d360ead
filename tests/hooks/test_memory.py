# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank says of its GPU's memory as SGLang's calls come; the allocator is made up."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from made_up_gpu import Gpu
from standins import ModelRunner, Rank, Request
from waiting import eventually

from sglang_weight_exporter.hooks.targets import RUNNER, SCHEDULER
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryDump, MemoryOwner
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.memory_owners import memory_owners
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture
def rank(tmp_path: Path, gpu: Gpu) -> Rank:
    return Rank(tmp_path)


def memory(rank: Rank) -> DeviceMemory:
    (found,) = rank.snapshot().memory
    return found


def directory(rank: Rank) -> RankDirectory:
    ((found, _),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    return found


def test_a_load_has_an_account_and_an_update_its_growth(rank: Rank, gpu: Gpu) -> None:
    def load() -> tuple[bool, str]:
        gpu.cached += 300
        return True, "Success"

    runner = rank.runner(answers={"disk": load})
    loaded = memory(rank)
    assert loaded.parts is not None
    assert (loaded.parts["cached"], loaded.parts["cuda_graphs"]) == (1000, 500)
    assert loaded.before_update is None
    gpu.cached = 1200  # By generation, since the load.
    rank.scheduler(runner).update_weights_from_disk(Request())
    found = memory(rank)
    assert (found.before_update, found.after_update) == (1700, 2000)
    assert found.physical == 2000 == sum((found.parts or {}).values())


def test_what_a_flush_gives_back_in_an_update_was_needed(rank: Rank, gpu: Gpu) -> None:
    class Scheduler:
        def __init__(self, make: Callable[[], object]) -> None:
            self.tree_cache = SimpleNamespace(evictable_size=int, protected_size=int)
            self.running_batch, self.waiting_queue = SimpleNamespace(reqs=[]), list[Any]()
            make()

        def flush_cache(self, empty_cache: bool = True) -> bool:
            gpu.cached -= 300
            return True

    def load() -> tuple[bool, str]:
        gpu.cached += 300
        scheduler.flush_cache()
        return True, "Success"

    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: rank.runner(answers={"disk": load}))
    assert memory(rank).update_peak is None
    rank.scheduler(rank.workers[0]).update_weights_from_disk(Request())
    found = memory(rank)
    assert (found.before_update, found.after_update, found.update_peak) == (1500, 1500, 300)
    scheduler.flush_cache()  # Outside of an update.
    assert memory(rank).update_peak == 300


@pytest.mark.parametrize(
    ("variable", "tags", "released"),
    [
        ("true", None, 500),
        ("1", ["cuda_graph"], 500),
        ("true", ["weights"], 0),
        ("false", None, 0),
        (None, ["cuda_graph"], 0),  # SGLang answers, and the saver has no graphs.
    ],
)
def test_graphs_are_released_where_the_saver_has_them(
    rank: Rank,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    tags: list[str] | None,
    released: int,
) -> None:
    monkeypatch.delenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", raising=False)
    if variable is not None:
        monkeypatch.setenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", variable)
    runner = rank.runner(memory_saver_adapter=SimpleNamespace(enabled=True))
    scheduler = rank.scheduler(runner)
    scheduler.release_memory_occupation(Request(tags=tags))
    gone = memory(rank)
    assert (gone.released, gone.after_release) == (released, 1500 - released)
    assert sum((gone.parts or {}).values()) == 1500 - released
    scheduler.resume_memory_occupation(Request(tags=tags))
    back = memory(rank)
    assert (back.released, back.after_release, back.physical) == (0, 1500 - released, 1500)


def test_a_driver_that_fails_costs_the_account_and_no_update(rank: Rank, gpu: Gpu) -> None:
    runner = rank.runner()
    gpu.fails = True
    assert rank.scheduler(runner).update_weights_from_disk(Request()).success
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    assert snapshot.hook_errors["memory"] >= 1
    (role,) = snapshot.roles
    assert role.updates["disk"].updates == 1


def left_by(rank: Rank) -> MemoryDump:
    """What was asked for, as soon as it is there."""
    eventually(lambda: not directory(rank).memory_is_wanted, what="the rank has left its memory")
    return directory(rank).memory()


def test_memory_is_left_once_for_each_time_that_it_was_asked_for(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = MemoryDump(
        at=1.0,
        segments=b"[]",
        owners=(MemoryOwner(address=1, nbytes=2, part="weights", name="w (target)"),),
    )
    threads: list[str] = []

    def write_down() -> MemoryDump:
        threads.append(threading.current_thread().name)
        return left

    monkeypatch.setattr(ModelRunnerInspector, "dump_memory", lambda inspector: write_down)
    runner = rank.runner()
    scheduler = rank.scheduler(runner)
    scheduler.update_weights_from_disk(Request())
    with pytest.raises(FileNotFoundError):
        directory(rank).memory()
    directory(rank).ask_for_memory()
    scheduler.update_weights_from_disk(Request())
    assert left_by(rank) == left
    assert threads == ["sglang-weight-exporter-memory"]  # And the engine goes on meanwhile.


def test_a_flush_leaves_the_memory_that_was_asked_for(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = MemoryDump(at=1.0, segments=b"[]", owners=())
    monkeypatch.setattr(ModelRunnerInspector, "dump_memory", lambda inspector: lambda: left)

    class Scheduler:
        def __init__(self, make: Callable[[], object]) -> None:
            make()

        def flush_cache(self, empty_cache: bool = True) -> bool:
            return True

    scheduler = rank.hook(SCHEDULER, Scheduler)(rank.runner)
    directory(rank).ask_for_memory()
    scheduler.flush_cache()
    assert left_by(rank) == left


def test_memory_that_cannot_be_written_down_costs_nothing_else(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_down() -> MemoryDump:
        raise ValueError("a name that is no text")

    monkeypatch.setattr(ModelRunnerInspector, "dump_memory", lambda inspector: write_down)
    scheduler = rank.scheduler(rank.runner())
    directory(rank).ask_for_memory()
    assert scheduler.update_weights_from_disk(Request()).success
    eventually(lambda: rank.installation.errors.get("memory"), what="the error is counted")
    monkeypatch.setattr(ModelRunnerInspector, "dump_memory", lambda inspector: None)
    assert scheduler.update_weights_from_disk(Request()).success
    assert not directory(rank).memory_is_wanted


def test_memory_is_written_down_as_it_was_read(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = rank.runner()
    inspector = rank.installation.translator._rank.inspector
    collecting = []
    blocks = [{"size": 512, "state": "inactive", "frames": []}]
    segments = [{"address": address, "blocks": blocks} for address in range(3)]

    def read(*, traces: bool) -> list[dict[str, Any]]:
        collecting.append(gc.isenabled())
        return segments

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("sglang_weight_exporter.runners.memory_owners.memory_segments", read)
    write_down = inspector.dump_memory()
    assert write_down is not None
    assert collecting == [False]  # A history is thousands of objects.
    assert gc.isenabled()
    runner.model = None
    rank.scheduler(runner).update_weights_from_disk(Request())  # And the engine goes on.
    dump = write_down()
    assert json.loads(dump.segments) == segments
    assert len(dump.owners) == 2


def test_names_of_weights_are_those_of_the_table(rank: Rank) -> None:
    rank.runner()
    rank.runner(is_draft_worker=True)
    inspector = rank.installation.translator._rank.inspector
    assert {
        (owner.name, owner.part, owner.nbytes) for owner in memory_owners(inspector._captures)
    } == {
        ("embed_tokens.weight (target)", "weights", 8 * 4 * 4),
        ("proj.weight (target)", "weights", 4 * 4 * 4),
        ("embed_tokens.weight (draft)", "weights", 8 * 4 * 4),
        ("proj.weight (draft)", "weights", 4 * 4 * 4),
    }


def init_memory_pool(runner: Any, total_gpu_memory: float) -> None:
    """Is told what was free before the load, and does not keep it."""
    runner.token_to_kv_pool = SimpleNamespace()


@pytest.mark.parametrize("release", ["0.5.10 and later", "until 0.5.9"])
def test_what_the_pool_was_sized_from(rank: Rank, release: str) -> None:
    attributes: dict[str, Any] = {"mem_fraction_static": 0.75}
    if release == "until 0.5.9":
        methods = {name: each for name, each in vars(ModelRunner).items() if callable(each)}
        methods["init_memory_pool"] = init_memory_pool
        old: Any = type("ModelRunner", (ModelRunner,), methods)
        runner = rank.hook(RUNNER, old)(**attributes)
        runner.init_memory_pool(79.5)
        rank.workers.append(runner)
    else:
        rank.runner(pre_model_load_memory=79.5, **attributes).alloc_memory_pool()
    budget = rank.snapshot().budget
    assert (budget.fraction, budget.before_load) == (0.75, int(79.5 * 2**30))
    assert budget.token_limit is None
