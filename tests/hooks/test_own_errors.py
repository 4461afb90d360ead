# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in this package changes no count, and takes away what is true no more."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from standins import ModelRunner, Rank, Request, model, session
from waiting import LIMIT

from sglang_weight_exporter.hooks.install import Installation
from sglang_weight_exporter.hooks.targets import RUNNER, SCHEDULER, TARGETS
from sglang_weight_exporter.hooks.translator import Translator
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

PARTIAL = "Failed to update parameter online: x. The full weights are partially updated."


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


def published(rank: Rank) -> list[Snapshot]:
    reader = SnapshotReader(RuntimeDir.open(rank.directory, os.environ))
    return [snapshot for _, snapshot in reader.read()]


class OldRunner(ModelRunner):
    """Of 0.5.9 to 0.5.15, which answers and lives on whatever a trainer sends."""

    def update_weights_from_distributed(
        self, names: Any, dtypes: Any, shapes: Any, group_name: str, load_format: Any = None
    ) -> tuple[bool, str]:
        try:
            for dtype, shape in zip(dtypes, shapes, strict=True):
                torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        except Exception:
            return False, PARTIAL
        return True, "Success"


@pytest.fixture
def old_runner(tmp_path: Path) -> tuple[Rank, Any]:
    rank = Rank(tmp_path / "runtime", known=False)
    OldRunner.__name__ = "ModelRunner"
    runner = rank.hook(RUNNER, OldRunner)()
    rank.workers.append(runner)
    return rank, runner


@pytest.mark.parametrize("shape", [[-1, 128], [2**40, 2**40], [2**63], [1.5, 2], ["x"]])
def test_a_size_that_a_trainer_claimed_and_sglang_refused_is_no_size(
    old_runner: tuple[Rank, Any], shape: list[Any]
) -> None:
    rank, runner = old_runner
    arguments = (["w"], ["bfloat16"])
    assert not runner.update_weights_from_distributed(*arguments, [shape], "g")[0]
    assert rank.totals() == {"distributed": (0, 0, 1)}
    assert runner.update_weights_from_distributed(*arguments, [[2, 4]], "g")[0]
    runner.check_weights("reset_tensors")  # Ends what goes on.
    counts = rank.role().updates["distributed"]
    assert (counts.failures, counts.calls) == (1, 2)
    assert counts.nbytes == 2 * 4 * 2  # Of the batch that came.


class Huge:
    """Tensors of 1.34 TB, as DeepSeek-V3's in bfloat16, that need no memory."""

    made = torch.empty(1, dtype=torch.bfloat16).expand(671_000_000_000)


def test_bytes_are_counted_past_what_a_float_counts_exactly(rank: Rank) -> None:
    updater = rank.runner().weight_updater
    assert Huge.made.nbytes == 1_342_000_000_000
    for _ in range(3):
        updater.begin_weight_update()
        updater.update_weights_from_tensor([("w", Huge.made)] * 5_000)
        updater.end_weight_update(run_post_load=False)
    assert rank.installation.errors == {}
    assert rank.role().updates["tensor"].nbytes == 15_000 * 1_342_000_000_000 > 2**53


def break_snapshots(runner: Any) -> None:
    """Any exception while the snapshot is made: names that cannot be joined."""
    runner.model_config.hf_config = SimpleNamespace(architectures=[None])


def mend_snapshots(runner: Any) -> None:
    runner.model_config.hf_config = SimpleNamespace(architectures=["X"])


@pytest.mark.parametrize("calls", [1, 3])
def test_an_exception_while_the_snapshot_is_made_loses_no_count(rank: Rank, calls: int) -> None:
    runner = rank.runner()
    session(runner, loads=1)
    break_snapshots(runner)
    for _ in range(calls):
        runner.weight_updater.update_weights_from_tensor([])
        rank.clock.now += 60
    session(runner, loads=1)
    # The old snapshot is true no more.
    assert published(rank) == []
    mend_snapshots(runner)
    session(runner, loads=1)
    (snapshot,) = published(rank)
    assert sum(snapshot.hook_errors.values()) >= 1
    (role,) = snapshot.roles
    counts = role.updates["tensor"]
    assert (counts.updates, counts.failures, counts.calls) == (3 + calls, 0, 3 + calls)
    assert role.in_progress is None


def test_an_exception_before_the_original_runs_is_counted_and_the_call_seen(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = rank.runner()
    session(runner, loads=1)
    step = rank.installation.translator._rank

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("a fault of ours")

    for owner, name in ((step.inspector, "begin_update"), (step._publisher, "lock_tables")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, fail)
            session(runner, loads=1)
    updater = runner.weight_updater
    updater.begin_weight_update()
    with monkeypatch.context() as broken:
        broken.setattr(step.inspector, "begin_arrival", fail)
        updater.receive_weights_from_distributed(names=[])
        updater.load_weights_from_distributed([])
    updater.end_weight_update(run_post_load=False)
    (snapshot,) = published(rank)
    assert sum(snapshot.hook_errors.values()) >= 2
    (role,) = snapshot.roles
    assert (role.updates["tensor"].updates, role.updates["tensor"].calls) == (3, 3)
    assert (role.updates["distributed"].updates, role.in_progress) == (1, None)


def test_a_capture_that_fails_is_counted_and_the_update_too(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = rank.runner()
    inspector = rank.installation.translator._rank.inspector

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as broken:
        broken.setattr(inspector, "capture", fail)
        session(runner, loads=1)
    session(runner, loads=1)
    (snapshot,) = published(rank)
    (role,) = snapshot.roles
    assert (role.updates["tensor"].updates, role.in_progress) == (2, None)
    assert sum(snapshot.hook_errors.values()) >= 1


# What is wrapped is what was read in SGLang's sources.


class Property:
    def __init__(self) -> None:
        self.flushed = 0

    @property
    def flush_cache(self) -> Any:
        return lambda empty_cache=True: True


class ClassMethod:
    @classmethod
    def flush_cache(cls, empty_cache: bool = True) -> bool:
        return True


class CallableObject:
    def __call__(self, empty_cache: bool = True) -> bool:
        return True


class Attribute:
    flush_cache = CallableObject()


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [(ClassMethod, "classmethod"), (Property, "property"), (Attribute, "CallableObject")],
)
def test_what_is_no_function_is_refused_in_words_and_left_alone(
    tmp_path: Path, scheduler: Any, kind: str
) -> None:
    rank = Rank(tmp_path / "runtime", known=False)
    module = ModuleType(SCHEDULER)
    before = vars(scheduler)["flush_cache"]
    vars(module)["Scheduler"] = scheduler
    rank.installation.on_import(module)
    assert vars(scheduler)["flush_cache"] is before
    assert scheduler().flush_cache(empty_cache=False)
    (state,) = [
        each for each in rank.installation.states.all("0.5.23") if each.target.endswith("h_cache")
    ]
    assert state.status == "failed"
    assert kind in state.reason


# What cannot be had is not tried for at every call.


def test_parts_that_cannot_be_imported_are_tried_for_once(tmp_path: Path) -> None:
    tried = []

    def make(installation: Installation) -> Translator:
        tried.append(installation)
        raise ImportError("a half-removed package")

    installation = Installation(TARGETS, make)
    module = ModuleType(SCHEDULER)

    class Scheduler:
        def flush_cache(self, empty_cache: bool = True) -> bool:
            return True

    vars(module)["Scheduler"] = Scheduler
    installation.on_import(module)
    for _ in range(3):
        assert Scheduler().flush_cache()
    assert len(tried) == 1
    assert sum(installation.errors.values()) == 1


def test_states_that_were_asked_for_while_a_module_was_wrapped_are_not_kept(rank: Rank) -> None:
    """Another thread's snapshot may ask between the import and the wrapping."""
    states = rank.installation.states
    install = rank.installation._install

    def late(target: Any, module: ModuleType) -> None:
        states.all("0.5.23")
        install(target, module)

    class Scheduler:
        def flush_cache(self, empty_cache: bool = True) -> bool:
            return True

    rank.installation._install = late  # type: ignore[method-assign]
    rank.hook(SCHEDULER, Scheduler)
    (state,) = [each for each in states.all("0.5.23") if each.target == "scheduler.flush_cache"]
    assert state.status == "installed"


# A forked child is nobody's rank.


def test_a_forked_child_waits_for_no_lock_of_ours(rank: Rank) -> None:
    """Locks that another thread held when the process forked are held for ever in the child."""
    runner = rank.runner()
    installation = rank.installation
    step = installation.translator._rank
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with step._lock, installation._lock, step.ledger._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        runner.weight_updater.update_weights_from_tensor([])
        rank.scheduler(runner).update_weights_from_disk(Request())
        rank.runners(is_draft_worker=True)
        runner.check_weights("snapshot")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert rank.totals() == {}
    session(runner, loads=1)
    assert rank.totals() == {"tensor": (1, 0, 1)}


# One runner after another.


def test_a_runner_that_is_made_anew_is_the_target_although_the_old_one_is_not_collected(
    rank: Rank,
) -> None:
    gc.disable()
    try:
        old = rank.runner()
        old.itself = old
        rank.workers.clear()
        del old
        new = rank.runner(memory_saver_adapter=SimpleNamespace(enabled=True))
        assert [role.name for role in rank.snapshot().roles] == ["target"]
        everything = sum(part.nbytes for part in rank.weights())
        assert everything == sum(each.nbytes for each in model().parameters())
        rank.scheduler(new).release_memory_occupation(Request(tags=["weights"]))
        assert rank.installation.translator._rank.ledger.counters.released == {"weights"}
    finally:
        gc.enable()


# The interpreter ends.

ENDS_INSIDE_A_REBALANCE = """
import sys, threading
from pathlib import Path
from standins import Rank

rank = Rank(Path(sys.argv[1]))
rank.runner()
chunks = rank.balancers(lambda: None, 3).rebalance()
next(chunks)
next(chunks)
threading.held = chunks  # Of a module that is cleared later than ours.
"""


def test_a_process_that_ends_inside_a_rebalance_says_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS_INSIDE_A_REBALANCE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "went wrong" not in done.stderr
