# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a program that reads tables gets: a consistent one, or a reason; nothing stays locked."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import published
import pytest
from published import ROWS, PublishedRank
from waiting import LIMIT, eventually

import sglang_weight_exporter
from sglang_weight_exporter import (
    RankGoneError,
    TableError,
    TableReader,
    UpdateInProgressError,
    open_tables,
)
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.weight_table import WeightTable, table_of_rows

MOVED = tuple(row._replace(data_ptr=row.data_ptr + 2**20) for row in ROWS)


@pytest.fixture
def reader(rank: PublishedRank, runtime_dir: Path) -> TableReader:
    (found,) = open_tables(runtime_dir)
    return found


def test_a_reader_gets_what_the_rank_wrote(reader: TableReader) -> None:
    table = reader.read()
    assert tuple(table.rows()) == ROWS
    assert (table.engine.name, table.role.name, table.update) == ("30000", "target", 1)


def test_there_is_a_reader_for_each_living_rank_and_role(runtime_dir: Path) -> None:
    ranks = [PublishedRank(runtime_dir, ranks=Ranks(tp=tp)) for tp in (1, 0)]
    draft = PublishedRank(runtime_dir, engine="30001", role="draft")
    dead = PublishedRank(runtime_dir, ranks=Ranks(tp=2))
    for made in (*ranks, draft, dead):
        made.publish()
    dead.store.close()
    found = [
        (reader.read().engine.name, reader.read().ranks.tp, reader.role)
        for reader in open_tables(runtime_dir)
    ]
    assert found == [("30000", 0, "target"), ("30000", 1, "target"), ("30001", 0, "draft")]
    assert len(open_tables(runtime_dir, engine="30000")) == 2
    assert [reader.role for reader in open_tables(runtime_dir, role="draft")] == ["draft"]


def test_in_the_middle_of_an_update_a_reader_is_notified(
    rank: PublishedRank, reader: TableReader
) -> None:
    rank.begin_update()
    with pytest.raises(UpdateInProgressError, match="being updated"):
        reader.read()


def test_a_reader_that_waits_gets_the_table_after_the_update(
    rank: PublishedRank, reader: TableReader
) -> None:
    rank.begin_update()
    threading.Timer(0.3, rank.publish, [MOVED]).start()
    assert tuple(reader.read(timeout=LIMIT).rows()) == MOVED


def test_an_update_that_could_not_have_the_lock_is_noticed_all_the_same(
    rank: PublishedRank, reader: TableReader
) -> None:
    with reader.hold() as table:
        assert reader.is_current(table)
        rank.begin_update()  # Does not wait: the reader is in there.
        assert not rank.store.table_is_locked
        assert not reader.is_current(table)
    with pytest.raises(UpdateInProgressError):
        reader.read()


@pytest.mark.parametrize("event", ["in place", "moved", "released"])
def test_whatever_happens_to_the_memory_a_table_read_before_is_not_current(
    rank: PublishedRank, reader: TableReader, event: str
) -> None:
    table = reader.read()
    if event == "released":
        rank.release_memory()
        assert reader.read().released
    else:
        rank.publish(ROWS if event == "in place" else MOVED)
    assert not reader.is_current(table)
    assert reader.is_current(reader.read())


def test_a_reader_is_notified_of_the_next_change(rank: PublishedRank, reader: TableReader) -> None:
    table = reader.read()
    with pytest.raises(TimeoutError):
        reader.wait_for_change(table, timeout=0.05)
    threading.Timer(0.2, rank.publish).start()
    assert reader.wait_for_change(table, timeout=LIMIT).update == 2


def test_a_reader_in_a_loop_opens_a_table_once(rank: PublishedRank, reader: TableReader) -> None:
    first = reader.read()
    assert rank.role.table is not None
    (rank.store.path / rank.role.table.file).unlink()
    assert tuple(reader.read().rows()) == ROWS  # Nothing has changed, and it needs no file for it.
    assert reader.is_current(first)


def test_what_a_reader_keeps_is_of_the_last_update(
    rank: PublishedRank, reader: TableReader
) -> None:
    for number, rows in enumerate([ROWS, MOVED, MOVED, ROWS[:3], ROWS], start=1):
        if number > 1:
            rank.publish(rows)
        for _ in range(2):
            table = reader.read()
            assert table.update == number
            assert tuple(table.rows()) == rows
    rank.begin_update()
    with pytest.raises(UpdateInProgressError):
        reader.read()


def test_a_reader_notices_a_snapshot_that_looks_like_the_last_from_outside(
    rank: PublishedRank, reader: TableReader
) -> None:
    snapshot = rank.store.path / "snapshot"
    table, status = reader.read(), snapshot.stat()
    earlier = snapshot.with_name("earlier")
    earlier.hardlink_to(snapshot)
    rank.publish()
    # As two updates in one tick of the kernel's clock may leave it: in the inode of the first.
    earlier.write_bytes(snapshot.read_bytes())
    os.utime(earlier, ns=(status.st_atime_ns, status.st_mtime_ns))
    earlier.replace(snapshot)
    assert snapshot.stat().st_ino == status.st_ino
    assert snapshot.stat().st_mtime_ns == status.st_mtime_ns
    assert not reader.is_current(table)
    assert reader.wait_for_change(table, timeout=LIMIT).update == 2


def test_an_update_waits_for_readers_as_long_as_it_is_told_and_no_longer(
    rank: PublishedRank, reader: TableReader
) -> None:
    with reader.hold():
        started = time.monotonic()
        rank.store.lock_table(wait_seconds=0.3)
        assert time.monotonic() - started >= 0.3
        assert not rank.store.table_is_locked
    entered, leave = threading.Event(), threading.Event()

    def read() -> None:
        with reader.hold():
            entered.set()
            leave.wait(LIMIT)

    thread = threading.Thread(target=read)
    thread.start()
    entered.wait(LIMIT)
    threading.Timer(0.2, leave.set).start()
    rank.store.lock_table(wait_seconds=30)
    assert rank.store.table_is_locked
    thread.join()


def test_an_update_waits_for_nobody_who_reads_the_table_alone(
    rank: PublishedRank, reader: TableReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: the exporter may be stopped in the middle of it."""
    table_of = RankDirectory.table
    locked = []

    def slow(directory: RankDirectory, file: str) -> WeightTable:
        rank.store.lock_table()
        locked.append(rank.store.table_is_locked)
        rank.store.unlock_table()
        return table_of(directory, file)

    monkeypatch.setattr(RankDirectory, "table", slow)
    assert tuple(reader.read().rows()) == ROWS
    assert locked == [True]


def test_an_update_of_many_calls_that_nobody_ended_counts_as_ended_once_it_is_idle(
    rank: PublishedRank, reader: TableReader
) -> None:
    an_hour_ago = time.time() - 3600
    rank.begin_update(last_call_at=an_hour_ago, calls=3, idle_seconds=10.0)
    with pytest.raises(UpdateInProgressError):
        reader.read()  # A call of it is running: it has the lock.
    rank.store.unlock_table()
    assert tuple(reader.read().rows()) == ROWS  # Captured after its last call.


def test_a_table_that_nobody_looked_at_since_the_last_call_is_not_consistent(
    rank: PublishedRank, reader: TableReader
) -> None:
    rank.begin_update(last_call_at=time.time(), calls=3, idle_seconds=0.0)
    rank.store.unlock_table()
    with pytest.raises(UpdateInProgressError, match="they were not captured since"):
        reader.read()


def test_a_model_whose_table_could_not_be_read_is_an_error_with_a_reason(runtime_dir: Path) -> None:
    loading = PublishedRank(runtime_dir)
    loading._write()
    (reader,) = open_tables(runtime_dir)
    with pytest.raises(TableError, match="not loaded yet"):
        reader.read()


def test_a_damaged_table_is_an_error_with_a_reason(
    rank: PublishedRank, reader: TableReader
) -> None:
    assert rank.role.table is not None
    (rank.store.path / rank.role.table.file).write_bytes(b"\x93garbage")
    with pytest.raises(TableError, match="damaged"):
        reader.read()


@pytest.fixture
def other_process(runtime_dir: Path, request: pytest.FixtureRequest) -> Iterator[object]:
    """A rank in a process of its own."""
    program = published.__file__
    process = subprocess.Popen(
        [sys.executable, program, runtime_dir, *getattr(request, "param", ())],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("other_process", [(), ("updating",)], indirect=True)
def test_a_killed_engine_is_gone_and_leaves_nothing_locked(
    other_process: subprocess.Popen[str], runtime_dir: Path
) -> None:
    (reader,) = open_tables(runtime_dir)
    other_process.kill()
    other_process.wait()
    with pytest.raises(RankGoneError, match="has ended"):
        reader.read(timeout=LIMIT)
    assert open_tables(runtime_dir) == []
    with FileLock(reader.directory.path / "table.lock") as lock:
        assert lock.acquire()


def test_a_killed_reader_leaves_nothing_locked(rank: PublishedRank, runtime_dir: Path) -> None:
    program = (
        "import sys, time, pathlib, sglang_weight_exporter as w\n"
        "(reader,) = w.open_tables(pathlib.Path(sys.argv[1]))\n"
        "with reader.hold():\n"
        "    print('inside', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, runtime_dir], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    rank.store.lock_table()
    assert not rank.store.table_is_locked
    process.kill()
    process.wait()
    rank.store.lock_table()
    assert rank.store.table_is_locked


def test_a_reader_in_a_loop_never_sees_rows_of_two_tables(
    rank: PublishedRank, reader: TableReader
) -> None:
    enough = threading.Event()

    def update() -> None:
        for step in itertools.count(1):
            moved = [row._replace(data_ptr=row.data_ptr + step * 2**20) for row in ROWS]
            table = table_of_rows(moved, role="target", captured_at=0.0)
            rank.begin_update()
            rank.publish(table=table)
            if enough.is_set():
                return

    thread = threading.Thread(target=update)
    thread.start()
    seen: set[int] = set()
    try:

        def poll() -> bool:
            with contextlib.suppress(UpdateInProgressError):
                pairs = zip(tuple(reader.read().rows()), ROWS, strict=True)
                (step,) = {now.data_ptr - row.data_ptr for now, row in pairs}
                seen.add(step)
            return len(seen) >= 50 and max(seen) >= 200

        eventually(poll, every=0)
    finally:
        enough.set()
        thread.join()


def test_the_package_offers_what_it_lists() -> None:
    in_a_trainer = {"FingerprintError", "Sharded", "fingerprint_tensors", "megatron_tensors"}
    in_a_trainer |= {"sum_tensors", "write_manifest"}
    without = set() if importlib.util.find_spec("torch") else in_a_trainer
    for name in set(sglang_weight_exporter.__all__) - without:
        assert getattr(sglang_weight_exporter, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sglang_weight_exporter.nothing  # noqa: B018
