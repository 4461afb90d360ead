# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A file system that fails at any point of a load or an update changes no count, and the rank is
back by itself once the fault is over.

The faults are real ones, made with mounts, limits and removed directories; the runner and the
scheduler are stand-ins, because a real engine meets each point of an update within milliseconds.
One fault is also done to a real engine (``tests/e2e``).
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import disks
import pytest
from standins import (
    Rank,
    Request,
    rebalanced,
    session,
    update_expert_location_with_recovery,
)
from waiting import eventually

from sglang_weight_exporter.hooks.targets import EPLB_MANAGER
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

Fault = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of 256 KiB; for what only some can, the one of all tests."""
    path = tmp_path / "disk"
    if "read-only" in request.node.name:
        path.mkdir()
        tried = subprocess.run(["chattr", "+i", path], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            pytest.skip(f"needs a file system with immutable directories: {tried.stderr.strip()}")
        subprocess.run(["chattr", "-i", path], check=True)
        yield path
        return
    with disks.disk(path, "256k") as mounted:
        yield mounted


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be made or removed, as after an error of the disk. A file system that somebody
    writes to cannot be remounted, so its directories are made immutable."""
    directories = [disk, *(path for path in disk.rglob("*") if path.is_dir())]
    subprocess.run(["chattr", "+i", *directories], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *directories], check=True)


@contextlib.contextmanager
def directory_gone(disk: Path) -> Iterator[None]:
    """Gone, and nobody can make it again."""
    shutil.rmtree(disk / "runtime")
    (disk / "runtime").write_text("")
    try:
        yield
    finally:
        (disk / "runtime").unlink()


@contextlib.contextmanager
def no_descriptors(disk: Path) -> Iterator[None]:
    """None is left, and none comes back: ranks of tests before this one hold some until they are
    collected."""
    gc.collect()
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        used = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(used - 1, soft), hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.enable()


FAULTS: dict[str, Fault] = {
    "full": full,
    "read-only": read_only,
    "directory gone": directory_gone,
    "no descriptors": no_descriptors,
}


def reload(rank: Rank, runner: Any) -> None:
    rank.scheduler(runner).update_weights_from_disk(Request())


def buckets(rank: Rank, runner: Any) -> None:
    scheduler = rank.scheduler(runner)
    for flush_cache in (False, False, True):
        scheduler.update_weights_from_tensor(Request(flush_cache=flush_cache))


def rebalance(rank: Rank, runner: Any) -> None:
    rebalanced(rank, lambda: None)


WAYS: dict[str, tuple[Callable[[Rank, Any], None], Source, int]] = {
    "one call": (reload, "disk", 1),
    "several calls": (buckets, "tensor", 3),
    "session": (lambda rank, runner: session(runner, loads=2), "tensor", 2),
    "rebalance": (rebalance, "eplb", 3),
}


def published(rank: Rank) -> list[Snapshot]:
    try:
        runtime_dir = RuntimeDir(rank.directory)
        return [snapshot for _, snapshot in SnapshotReader(runtime_dir).read()]
    except OSError:
        return []


def back(rank: Rank, holds: Callable[[Role], bool]) -> Role:
    """The role as published, once it is; without any further event."""

    def found() -> Role:
        snapshots = published(rank)
        for snapshot in snapshots:
            for role in snapshot.roles:
                if holds(role):
                    return role
        raise AssertionError(f"not published again: {snapshots}")

    return eventually(found)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(("way", "source", "calls"), WAYS.values(), ids=WAYS)
def test_an_update_during_a_fault_is_counted(
    disk: Path, fault: Fault, way: Callable[[Rank, Any], None], source: Source, calls: int
) -> None:
    rank = Rank(disk / "runtime")
    runner = rank.runner()
    way(rank, runner)
    before = rank.role().updates[source]
    assert (before.updates, before.calls) == (1, calls)
    with fault(disk):
        way(rank, runner)
        # The truth or nothing: what holds no more is not said.
        assert not any(role.updates[source] == before for role in roles_of(rank))
    role = back(rank, lambda role: role.updates[source].updates == 2)
    assert role.updates[source].calls == 2 * calls
    assert role.in_progress is None
    assert role.last_update is not None
    assert role.last_update.started_at < (role.updated_at or 0) <= role.last_update.ended_at
    assert role.table is not None
    way(rank, runner)
    assert back(rank, lambda role: role.updates[source].updates == 3).in_progress is None


@pytest.mark.parametrize(("way", "source", "calls"), WAYS.values(), ids=WAYS)
def test_where_hard_links_are_refused_an_update_is_published_at_once(
    disk: Path, way: Callable[[Rank, Any], None], source: Source, calls: int
) -> None:
    """As on shared folders without them; here the queue of events is on another file system."""
    rank = Rank(disk / "runtime")
    runner = rank.runner()
    way(rank, runner)
    (queue,) = (disk / "runtime").rglob("events")
    with disks.disk(queue, "256k", in_place=True):
        os.utime(queue.parent)  # A mount leaves no trace in the directory that it is in.
        way(rank, runner)
        assert rank.role().updates[source].updates == 2
        assert rank.role().updates[source].calls == 2 * calls
        assert [event.update.source for event in rank.events()] == [source]


def roles_of(rank: Rank) -> list[Role]:
    return [role for snapshot in published(rank) for role in snapshot.roles]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_rank_that_loads_during_a_fault_appears_when_it_is_over(disk: Path, fault: Fault) -> None:
    rank = Rank(disk / "runtime")
    with contextlib.ExitStack() as stack:
        if fault is directory_gone:
            (disk / "runtime").mkdir(mode=0o700)
        stack.enter_context(fault(disk))
        runner = rank.runner()
        runner.alloc_memory_pool()
        assert published(rank) == []
    role = back(rank, lambda role: role.loaded_at is not None)
    assert role.table is not None
    assert role.weights is not None


def steps_of_buckets(rank: Rank, runner: Any) -> Iterator[None]:
    scheduler = rank.scheduler(runner)
    for flush_cache in (False, False, True):
        scheduler.update_weights_from_tensor(Request(flush_cache=flush_cache))
        yield


def steps_of_a_session(rank: Rank, runner: Any) -> Iterator[None]:
    updater = runner.weight_updater
    updater.begin_weight_update()
    yield
    for _ in range(2):
        updater.update_weights_from_tensor([])
        yield
    updater.end_weight_update(run_post_load=False)


def steps_of_a_rebalance(rank: Rank, runner: Any) -> Iterator[None]:
    move = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    for _ in rank.balancers(lambda: move(move=lambda: None), 3).rebalance():
        yield


#: How many steps each has, and how many of them write weights.
STEPS: dict[str, tuple[Callable[[Rank, Any], Iterator[None]], int, Source, int]] = {
    "several calls": (steps_of_buckets, 3, "tensor", 3),
    "session": (steps_of_a_session, 4, "tensor", 2),
    "rebalance": (steps_of_a_rebalance, 4, "eplb", 3),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    ("way", "step", "source", "calls"),
    [
        pytest.param(way, step, source, calls, id=f"{name}-{step}")
        for name, (way, steps, source, calls) in STEPS.items()
        for step in range(steps)
    ],
)
def test_an_update_one_of_whose_steps_meets_a_fault(
    disk: Path,
    fault: Fault,
    way: Callable[[Rank, Any], Iterator[None]],
    step: int,
    source: Source,
    calls: int,
) -> None:
    rank = Rank(disk / "runtime")
    steps = way(rank, rank.runner())
    for _ in range(step):
        next(steps, None)
    with fault(disk):
        next(steps, None)
    for _ in steps:
        pass
    role = back(rank, lambda role: role.updates[source].updates == 1)
    assert (role.updates[source].calls, role.updates[source].failures) == (calls, 0)
    assert role.in_progress is None
    assert role.last_update is not None
    assert role.updated_at is not None
    assert role.last_update.started_at < role.updated_at <= role.last_update.ended_at
    assert role.table is not None


def test_the_event_of_an_update_during_a_fault_is_delivered_after_it(disk: Path) -> None:
    rank = Rank(disk / "runtime")
    runner = rank.runner()
    reload(rank, runner)
    with full(disk):
        reload(rank, runner)
    back(rank, lambda role: role.updates["disk"].updates == 2)
    assert [event.update.source for event in rank.events()][-2:] == ["disk", "disk"]


def test_a_thread_that_cannot_be_had_is_started_with_the_next_fault(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(disk / "runtime")
    runner = rank.runner()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with full(disk):
        with monkeypatch.context() as exhausted:
            exhausted.setattr(threading.Thread, "start", refuse)
            reload(rank, runner)
        reload(rank, runner)
    back(rank, lambda role: role.updates["disk"].updates == 2)


def test_while_all_is_well_no_thread_of_ours_waits_to_try_again(tmp_path: Path) -> None:
    # The thread of an earlier fault may still be on its way out.
    before = set(threading.enumerate())
    rank = Rank(tmp_path / "runtime")
    reload(rank, rank.runner())
    assert [thread for thread in threading.enumerate() if thread not in before] == []


def test_a_forked_child_says_nothing_in_its_parents_name(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime")
    runner = rank.runner()
    child = os.fork()
    if child == 0:
        reload(rank, runner)
        os._exit(0)
    os.waitpid(child, 0)
    assert rank.totals() == {}
    assert rank.snapshot().pid == os.getpid()
