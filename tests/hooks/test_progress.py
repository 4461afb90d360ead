# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank says while an update or an operation goes on, and what saying it costs."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from standins import ModelRunner, Rank, Request, WeightUpdater

from sglang_weight_exporter.export.instruments import operations, phases
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.hooks.targets import RUNNER, SCHEDULER, UPDATER
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.tables import UpdateInProgressError, open_tables

#: What asks or changes something of the file system.
FILE_CALLS = (
    *("open", "close", "read", "write", "pread", "pwrite", "ftruncate", "fsync", "fstat"),
    *("stat", "lstat", "access", "listdir", "scandir", "mkdir", "rmdir", "rename", "replace"),
    *("link", "symlink", "readlink", "unlink", "remove", "utime", "chmod"),
)


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


class Counted:
    """Calls of `os` that reach the file system, while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        gc.collect()  # Ranks of earlier tests close their files when they go.
        for name in FILE_CALLS:
            self._count(name, getattr(os, name))
        return self.calls

    def _count(self, name: str, original: Any) -> None:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.calls[name] += 1
            return original(*arguments, **keywords)

        self._monkeypatch.setattr(os, name, counted)

    def __exit__(self, *error: object) -> None:
        self._monkeypatch.undo()


def settle() -> None:
    """Until a change of a directory is told from the one before: a tick of the kernel's clock."""
    threading.Event().wait(0.1)


def test_a_bucket_in_the_middle_writes_no_snapshot_and_captures_nothing(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = rank.runner()
    updater = runner.weight_updater
    updater.begin_weight_update()
    updater.update_weights_from_tensor([])
    inspector = rank.installation.translator._rank.inspector
    captured = []
    monkeypatch.setattr(inspector, "capture", lambda *roles, **how: captured.append(roles))
    scheduler = rank.scheduler(runner)
    with Counted(monkeypatch) as calls:
        for _ in range(10):
            scheduler.update_weights_from_tensor(Request(flush_cache=False))
    assert captured == []
    assert set(calls) == {"pwrite"}  # Of 200 bytes, into a file that is open.
    assert calls["pwrite"] <= 2 * 10
    progress = rank.in_progress()
    assert (progress.calls, rank.totals()) == (11, {"tensor": (0, 0, 11)})


@pytest.mark.parametrize(("draft", "most"), [(False, 14), (True, 20)])
def test_a_reload_asks_the_file_system_little(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, draft: bool, most: int
) -> None:
    """86 calls once, 194 with a draft, most of them asking whether the directory is still there."""
    runners = [rank.runner()] + ([rank.runner(is_draft_worker=True)] if draft else [])
    scheduler = rank.scheduler(*runners)
    for _ in range(2):
        scheduler.update_weights_from_disk(Request())
    settle()
    with Counted(monkeypatch) as calls:
        scheduler.update_weights_from_disk(Request())
    assert sum(calls.values()) <= most, calls
    assert rank.totals() == {"disk": (3, 0, 3)}
    assert len(rank.events()) == len(runners) * 3


# Readers.


def test_a_reader_sees_each_call_of_an_update(rank: Rank) -> None:
    runner = rank.runner()
    updater = runner.weight_updater
    seen: list[Any] = []

    def look(*arguments: Any) -> tuple[bool, str]:
        progress = rank.in_progress()
        seen.append((progress.phase, progress.calls, rank.totals()))
        return True, "Success"

    runner.answers = {"tensor": look, "receive": look}
    updater.begin_weight_update()
    seen.append((rank.in_progress().phase, rank.in_progress().calls, rank.totals()))
    updater.receive_weights_from_distributed(names=[])
    updater.update_weights_from_tensor([])
    updater.update_weights_from_tensor([])
    assert seen == [
        ("wait", 0, {}),
        ("receive", 0, {}),
        ("load", 0, {}),
        ("load", 1, {"tensor": (0, 0, 1)}),
    ]
    began = rank.in_progress().phase_since
    assert began is not None
    assert 0 <= rank.clock.now - began < 1
    updater.end_weight_update(run_post_load=False)
    assert rank.role().in_progress is None


def test_a_reader_of_tables_is_notified_by_the_first_call(rank: Rank) -> None:
    """Also one that is in there already, which an update does not wait for."""
    runner = rank.runner()
    (reader,) = open_tables(rank.directory)
    current = []

    def look(*arguments: Any) -> tuple[bool, str]:
        current.append(reader.is_current(table))
        return True, "Success"

    runner.answers = {"tensor": look}
    with reader.hold() as table:
        assert reader.is_current(table)
        rank.scheduler(runner).update_weights_from_tensor(Request(flush_cache=False))
        current.append(reader.is_current(table))
    assert current == [False, False]
    with pytest.raises(UpdateInProgressError):
        reader.read()
    rank.scheduler(runner).update_weights_from_tensor(Request())
    assert reader.read().update > table.update


def directory_of(rank: Rank) -> Path:
    ((directory, _),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    return directory.path


def test_where_the_file_of_progress_was_removed_a_snapshot_says_it(rank: Rank) -> None:
    runner = rank.runner()
    (directory_of(rank) / "progress").unlink()
    runner.weight_updater.update_weights_from_tensor([])
    assert rank.in_progress().calls == 1
    runner.weight_updater.update_weights_from_tensor([])
    assert rank.in_progress().calls == 2
    assert (directory_of(rank) / "progress").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 5, b"\xff" * 4096, bytes(4096)])
def test_a_damaged_file_of_progress_is_none(rank: Rank, content: bytes) -> None:
    runner = rank.runner()
    rank.scheduler(runner).update_weights_from_disk(Request())
    (directory_of(rank) / "progress").write_bytes(content)
    assert rank.totals() == {"disk": (1, 0, 1)}
    assert rank.role().in_progress is None


def test_what_is_as_it_was_is_the_same_object(rank: Rank) -> None:
    """By which the exporter process tells whose text it has to make anew."""
    runner = rank.runner()
    reader = SnapshotReader(RuntimeDir.open(rank.directory, os.environ))
    found = []
    for step in (
        lambda: None,
        runner.weight_updater.begin_weight_update,
        lambda: None,
        lambda: runner.weight_updater.update_weights_from_tensor([]),
        lambda: None,
    ):
        step()
        ((_, snapshot),) = reader.read()
        found.append(snapshot)
    assert found[1] is found[2]
    assert found[3] is found[4]
    assert len({id(each) for each in found}) == 3


def test_progress_of_an_update_that_has_ended_is_none(rank: Rank) -> None:
    runner = rank.runner()
    path = directory_of(rank) / "progress"
    runner.weight_updater.update_weights_from_tensor([])
    during = path.read_bytes()
    rank.scheduler(runner).update_weights_from_tensor(Request())
    assert rank.role().in_progress is None
    path.write_bytes(during)
    assert rank.role().in_progress is None
    assert rank.totals() == {"tensor": (1, 0, 2)}


# Everything that can hang has begun before it hangs.


class GroupUpdater(WeightUpdater):
    """Of 0.5.16 and later; ``meanwhile`` is called while others are awaited."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.meanwhile: Any = None

    def init_weights_update_group(
        self, master_address: str, master_port: int, group_name: str
    ) -> tuple[bool, str]:
        self.meanwhile()
        return True, "Success"


def test_a_group_whose_member_never_comes_is_seen(rank: Rank) -> None:
    GroupUpdater.__name__ = "WeightUpdater"
    updater = rank.hook(UPDATER, GroupUpdater)(rank.runner())
    seen: list[Snapshot] = []
    updater.meanwhile = lambda: seen.append(rank.snapshot())
    before = rank.clock.now
    updater.init_weights_update_group("127.0.0.1", 1, group_name="trainer")
    (during,) = seen
    assert list(during.running) == ["init_weights_update_group"]
    assert before <= during.running["init_weights_update_group"] <= rank.clock.now
    assert during.operations == {}
    after = rank.snapshot()
    assert after.running == {}
    assert after.operations["init_weights_update_group"].calls == 1
    assert after.update_groups == 1


@pytest.mark.parametrize(
    "operation",
    [
        "begin_weight_update",
        "end_weight_update",
        "release_memory_occupation",
        "resume_memory_occupation",
    ],
)
def test_a_rank_whose_peer_never_comes_to_the_barrier_is_seen(rank: Rank, operation: str) -> None:
    scheduler = rank.scheduler(rank.runner())
    seen = []
    scheduler.barrier = lambda: seen.append(list(rank.snapshot().running))
    getattr(scheduler, operation)(Request(tags=None))
    assert seen == [[operation]]
    snapshot = rank.snapshot()
    assert (snapshot.running, snapshot.operations[operation].calls) == ({}, 1)


class SlowRunner(ModelRunner):
    meanwhile: Any = None

    def check_weights(self, action: str, *, role: str = "target") -> None:
        self.meanwhile()
        raise ValueError("tensors differ")


def test_an_operation_that_fails_runs_no_more(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime", known=False)
    SlowRunner.__name__ = "ModelRunner"
    runner = rank.hook(RUNNER, SlowRunner)()
    seen = []
    runner.meanwhile = lambda: seen.append(list(rank.snapshot().running))
    with pytest.raises(ValueError, match="differ"):
        runner.check_weights("compare")
    assert seen == [["check_weights"]]
    assert rank.snapshot().running == {}
    assert rank.snapshot().operations["check_weights"].failures == 1


def test_what_is_paused_and_flushed_is_noted(rank: Rank) -> None:
    class Scheduler:
        def __init__(self, make: Any) -> None:
            make()

        def flush_cache(self, empty_cache: bool = True) -> bool:
            return True

        def pause_generation(self, recv_req: Any) -> None:
            pass

        def continue_generation(self, recv_req: Any) -> None:
            pass

    scheduler = rank.hook(SCHEDULER, Scheduler)(rank.runner)
    cache = rank.snapshot().cache
    assert cache is not None
    assert (cache.paused, cache.flushes) == (False, 0)
    scheduler.pause_generation(Request(mode="retract"))
    scheduler.flush_cache()
    cache = rank.snapshot().cache
    assert cache is not None
    assert (cache.paused, cache.flushes, cache.pauses["retract"]) == (True, 1, 1)
    scheduler.continue_generation(Request())
    cache = rank.snapshot().cache
    assert cache is not None
    assert not cache.paused


def test_a_rank_that_waits_is_a_series_with_its_beginning(rank: Rank) -> None:
    GroupUpdater.__name__ = "WeightUpdater"
    updater = rank.hook(UPDATER, GroupUpdater)(rank.runner())
    seen: dict[str, list[tuple[tuple[str, ...], Any]]] = {}

    def look() -> None:
        views = [RoleView(rank.snapshot(), role) for role in rank.snapshot().roles]
        for instrument in (*operations.INSTRUMENTS, *phases.INSTRUMENTS):
            read = instrument.read_role
            if read is not None and "timestamp" in instrument.name:
                for view in views:
                    seen[instrument.name] = [(each.labels, each.value) for each in read(view)]

    updater.meanwhile = look
    before = rank.clock.now
    updater.begin_weight_update()
    updater.init_weights_update_group("127.0.0.1", 1, group_name="trainer")
    ((labels, since),) = seen["sglang_weight_operation_start_timestamp_seconds"]
    assert labels == ("init_weights_update_group",)
    assert before <= since <= rank.clock.now
    ((labels, since),) = seen["sglang_weight_update_phase_start_timestamp_seconds"]
    assert labels == ("wait",)
    assert before <= since <= rank.clock.now
    look()
    assert seen["sglang_weight_operation_start_timestamp_seconds"] == []
