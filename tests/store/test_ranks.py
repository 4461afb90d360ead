# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that write, die, fill the disk and damage files, and readers that see only the truth.

Ranks are processes here, because what is tested belongs to processes: locks, forks, kills.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from disks import disk
from waiting import eventually

from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableRef
from sglang_weight_exporter.simulation import Simulation
from sglang_weight_exporter.store.decoding import UnreadableError, decode_snapshot, read
from sglang_weight_exporter.store.engine_names import claim_engine_name
from sglang_weight_exporter.store.files import Directory
from sglang_weight_exporter.store.locks import FileLock, is_held
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.reader import SnapshotReader, rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import SpoolReader, SpoolWriter
from sglang_weight_exporter.weight_table import WeightTable


@pytest.fixture
def runtime_dir(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir.open(tmp_path / "runtime", {})


def snapshot(rank_id: str, version: int = 1, **fields: object) -> Snapshot:
    described: dict[str, object] = {
        "rank_id": rank_id,
        "pid": os.getpid(),
        "weight_version": str(version),
        "started_at": 1.0,
        "engine": Engine(name="30000", instance="one"),
    }
    return msgspec.convert(described | fields, Snapshot)


def table(role: str = "target", digit: str = "a", padding: int = 0) -> WeightTable:
    columns: dict[str, Any] = dict.fromkeys(
        ("data_ptr", "nbytes", "storage_ptr", "storage_nbytes", "dtype", "shape", "stride"), b""
    )
    return WeightTable(
        role=role,
        captured_at=1.0,
        sha256=digit * 64,
        rows=0,
        names=b"n" * padding,
        **columns,
        device=b"",
        kind=b"",
        dtype_values=(),
        shape_values=(),
        stride_values=(),
        device_values=(),
        kind_values=(),
    )


def event(number: int, rank: RankStore, kept: WeightTable | None) -> Event:
    return Event(
        number=number,
        rank_id=rank.rank_id,
        pid=1,
        engine=Engine(name="30000", instance="one"),
        ranks=Ranks(),
        role="target",
        device=Device(name="cpu"),
        update=Update(
            action="update",
            source="disk",
            sequence=number,
            started_at=1.0,
            ended_at=2.0,
            succeeded=True,
            effect="changed",
        ),
        table=None
        if kept is None
        else TableRef(
            file=rank.write_table(kept), sha256=kept.sha256, rows=0, regions={}, captured_at=1.0
        ),
    )


RANK = """
import os, sys, time
from pathlib import Path
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
rank = RankStore(RuntimeDir.open(Path(sys.argv[1]), {}), sys.argv[2])
def write(version):
    rank.write_snapshot(Snapshot(rank_id=sys.argv[2], pid=os.getpid(), weight_version=str(version),
        started_at=1.0, engine=Engine(name="30000", instance="one")))
write(1)
"""


@pytest.fixture
def start_rank(runtime_dir: RuntimeDir) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Start a process that is a rank, runs more code and then waits; returns when it is alive."""
    processes: list[subprocess.Popen[str]] = []

    def start(rank_id: str, code: str) -> subprocess.Popen[str]:
        program = f"{RANK}\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(runtime_dir.path), rank_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ids(runtime_dir: RuntimeDir) -> list[str]:
    return [found.rank_id for _, found in SnapshotReader(runtime_dir).read()]


def test_a_killed_rank_is_gone_at_the_next_read_and_the_others_stay(
    runtime_dir: RuntimeDir, start_rank: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    first = start_rank("a", "")
    start_rank("b", "")
    assert ids(runtime_dir) == ["a", "b"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert ids(runtime_dir) == ["b"]
    # What it left can be told from the living and removed.
    (dead,) = [found for found in rank_directories(runtime_dir) if not found.is_alive()]
    dead.remove()
    assert [path.name for path in runtime_dir.ranks.iterdir()] == ["b"]


def test_a_forked_child_does_not_keep_its_dead_parent_alive(
    runtime_dir: RuntimeDir, start_rank: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    code = """
if os.fork() == 0:
    (rank.path / "child").write_text(str(os.getpid()))
    time.sleep(600)
    os._exit(0)
while not (rank.path / "child").exists() or not (rank.path / "child").read_text():
    time.sleep(0.01)
"""
    rank = start_rank("a", code)
    child = int((runtime_dir.ranks / "a" / "child").read_text())
    try:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
        os.kill(child, 0)  # It lives,
        assert ids(runtime_dir) == []  # and its parent does not.
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_does_not_keep_a_lock_that_a_thread_of_its_parent_waited_for(
    tmp_path: Path,
) -> None:
    """As a rank's thread waits for the exporter's; user code forks meanwhile, and goes on."""
    path = tmp_path / "lock"
    code = """
import os, sys, threading, time
from pathlib import Path
from sglang_weight_exporter.store.locks import FileLock
path = Path(sys.argv[1])
lock = FileLock(path)
thread = threading.Thread(target=lambda: lock.acquire(block=True), daemon=True)
thread.start()
stat = f"/proc/self/task/{thread.native_id}/stat"
while lock._opened is None or " S " not in open(stat).read():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
print(child, flush=True)
while not lock.held:
    time.sleep(0.01)
os._exit(0)
"""
    holder = FileLock(path)
    assert holder.acquire()
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        child = int(rank.stdout.readline())
        try:
            holder.release()
            assert rank.wait(60) == 0
            os.kill(child, 0)  # It lives,
            eventually(lambda: not is_held(path), what="a child that has run")  # and has no lock.
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_reader_never_sees_half_a_snapshot(
    runtime_dir: RuntimeDir, start_rank: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    code = """
import itertools, threading
def rewrite():
    for version in itertools.count(2):
        write(version)
threading.Thread(target=rewrite).start()
"""
    start_rank("a", code)
    complaints: list[str] = []
    reader = SnapshotReader(runtime_dir, on_unreadable=complaints.append)
    seen: list[int] = []

    def many() -> bool:
        seen.extend(int(found.weight_version) for _, found in reader.read())
        return len(set(seen)) > 100 and seen[-1] > 3000

    eventually(many, every=0)
    assert complaints == []
    assert seen == sorted(seen)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_half(
    runtime_dir: RuntimeDir, start_rank: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    code = """
import itertools, threading
def rewrite():
    for version in itertools.count(2):
        write(version)
threading.Thread(target=rewrite, daemon=True).start()
"""
    complaints: list[str] = []
    reader = SnapshotReader(runtime_dir, on_unreadable=complaints.append)
    for number in range(20):
        rank = start_rank(str(number), code)
        reader.read()
        rank.kill()
        rank.wait()
        # What it wrote last is whole, though nobody shows it any more.
        (directory,) = rank_directories(runtime_dir)
        assert int(directory.snapshot().weight_version) >= 1
        assert reader.read() == []
        directory.remove()
    assert complaints == []
    assert list(runtime_dir.ranks.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x81\xa6schema", b"not msgpack", os.urandom(500)])
def test_a_damaged_file_costs_its_rank_and_no_other(
    runtime_dir: RuntimeDir, content: bytes
) -> None:
    broken, sound = RankStore(runtime_dir, "broken"), RankStore(runtime_dir, "sound")
    sound.write_snapshot(snapshot("sound"))
    (broken.path / "snapshot").write_bytes(content)
    complaints: list[str] = []
    reader = SnapshotReader(runtime_dir, on_unreadable=complaints.append)
    for _ in range(3):
        assert [found.rank_id for _, found in reader.read()] == ["sound"]
    (complaint,) = complaints  # Said once, not at each scrape.
    assert str(broken.path / "snapshot") in complaint
    assert reader.unreadable == 1
    broken.write_snapshot(snapshot("broken"))
    assert [found.rank_id for _, found in reader.read()] == ["broken", "sound"]


def test_reading_a_snapshot_costs_little_beside_decoding_it(tmp_path: Path) -> None:
    """Processor time of this thread, the least of several tries in turn."""
    runtime_dir = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(runtime_dir, 1, 1, start=1e9)
    (file,) = runtime_dir.ranks.glob("*/snapshot")
    content, decoder = file.read_bytes(), msgspec.msgpack.Decoder(Snapshot)

    def seconds(do: Callable[[], object]) -> float:
        began = time.thread_time()
        for _ in range(100):
            do()
        return time.thread_time() - began

    tries = [
        (
            seconds(lambda: decode_snapshot(content, file)),
            seconds(lambda: decoder.decode(content)),
        )
        for _ in range(9)
    ]
    ours, alone = map(min, zip(*tries, strict=True))
    assert ours <= 2 * alone
    simulation.close()


def test_a_file_of_another_version_is_named_and_left_alone(runtime_dir: RuntimeDir) -> None:
    rank = RankStore(runtime_dir, "future")
    path = rank.path / "snapshot"
    path.write_bytes(msgspec.msgpack.encode({"schema": 999, "something": "new"}))
    with pytest.raises(UnreadableError, match=r"another version.*schema 999"):
        read(path, Snapshot)
    assert path.exists()


def test_a_table_lives_as_long_as_the_snapshot_or_an_event_names_it(
    runtime_dir: RuntimeDir,
) -> None:
    rank = RankStore(runtime_dir, "a")

    def publish(number: int, kept: WeightTable) -> None:
        occurred = event(number, rank, kept)
        rank.write_snapshot(
            snapshot("a", number, roles=[Role(name="target", device="cpu", table=occurred.table)])
        )
        rank.append_event(occurred, kept)

    publish(1, table(digit="a"))
    publish(2, table(digit="b"))
    tables = {path.name for path in rank.path.glob("*.table")}
    assert tables == {f"target-{'b' * 16}.table"}
    events = rank.path / "events"
    assert {path.name for path in events.glob("*.table")} == {
        f"{'a' * 16}.table",
        f"{'b' * 16}.table",
    }
    # The exporter has delivered the first event; the next one clears up behind it.
    next(events.glob("000000000001-*.event")).unlink()
    publish(3, table(digit="b"))
    assert {path.name for path in events.glob("*.table")} == {f"{'b' * 16}.table"}


def test_the_queue_is_bounded_and_drops_the_oldest_and_counts(runtime_dir: RuntimeDir) -> None:
    few = RankStore(runtime_dir, "few", event_count=3)
    for number in range(1, 6):
        few.append_event(event(number, few, None), None)
    (directory,) = rank_directories(runtime_dir)
    assert [directory.events.event(path).number for path in directory.events.waiting()] == [3, 4, 5]
    assert few.events_dropped == 2

    small = RankStore(runtime_dir, "small", event_bytes=50_000)
    for number, digit in enumerate("abcde", start=1):
        kept = table(digit=digit, padding=20_000)
        small.append_event(event(number, small, kept), kept)
    size = sum(path.stat().st_size for path in (small.path / "events").iterdir())
    assert size <= 50_000
    assert small.events_dropped == 3
    newest = next(each for each in rank_directories(runtime_dir) if each.rank_id == "small")
    assert [newest.events.event(path).number for path in newest.events.waiting()] == [4, 5]


def test_where_files_have_no_second_name_the_queue_has_copies_of_tables(
    small_disk: Path, tmp_path: Path
) -> None:
    """As on shared folders without hard links; here the queue is on another file system."""
    (small_disk / "events").mkdir()
    queue = SpoolWriter(Directory.open(small_disk / "events"))
    rank = RankStore(RuntimeDir.open(tmp_path / "runtime", {}), "a")
    kept = table()
    occurred = event(1, rank, kept)
    assert occurred.table is not None
    queue.append(occurred, kept, beside=(Directory.open(rank.path), occurred.table.file))
    waiting = SpoolReader(small_disk / "events")
    (found,) = (waiting.event(file) for file in waiting.waiting())
    assert waiting.table(found) == kept


def test_a_queue_that_is_emptied_meanwhile_never_fails(runtime_dir: RuntimeDir) -> None:
    rank = RankStore(runtime_dir, "a", event_count=50)
    (directory,) = rank_directories(runtime_dir)
    stop = threading.Event()

    def deliver() -> None:
        while not stop.is_set():
            for file in directory.events.waiting():
                directory.events.acknowledge(file)

    exporter = threading.Thread(target=deliver)
    exporter.start()
    try:
        for number in range(1, 3001):
            kept = table(digit="abcdef"[number % 6])
            rank.append_event(event(number, rank, kept), kept)
    finally:
        stop.set()
        exporter.join()


def test_a_vanished_directory_is_made_again(runtime_dir: RuntimeDir) -> None:
    # systemd-logind removes $XDG_RUNTIME_DIR when its user logs out.
    rank = RankStore(runtime_dir, "a")
    rank.write_snapshot(snapshot("a", 1))
    shutil.rmtree(runtime_dir.path)
    assert ids(runtime_dir) == []
    rank.write_snapshot(snapshot("a", 2))
    assert ids(runtime_dir) == ["a"]


@pytest.mark.parametrize("removed", ["lock", "table.lock", "snapshot", "events", "*.table", "*"])
def test_what_a_cleaner_took_out_is_there_again_with_the_next_update(
    runtime_dir: RuntimeDir, removed: str
) -> None:
    rank = RankStore(runtime_dir, "a")
    kept = table()
    rank.write_snapshot(
        snapshot(
            "a", 1, roles=(Role(name="target", device="cpu", table=event(1, rank, kept).table),)
        )
    )
    for path in list(rank.path.glob(removed)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rank.append_event(event(2, rank, kept), kept)
    rank.write_snapshot(
        snapshot(
            "a", 2, roles=(Role(name="target", device="cpu", table=event(2, rank, kept).table),)
        )
    )
    ((directory, found),) = SnapshotReader(runtime_dir).read()
    assert found.weight_version == "2"
    assert found.roles[0].table is not None
    assert directory.table(found.roles[0].table.file).sha256 == kept.sha256
    (waiting,) = directory.events.waiting()
    assert directory.events.table(directory.events.event(waiting)) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with disk(tmp_path / "disk", "256k") as path:
        yield path


def test_on_a_full_disk_an_old_number_is_taken_away_and_comes_back_new(small_disk: Path) -> None:
    runtime_dir = RuntimeDir.open(small_disk / "runtime", {})
    rank = RankStore(runtime_dir, "a")
    rank.write_snapshot(snapshot("a", 1))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 300_000)
    with pytest.raises(OSError, match="No space left"):
        rank.write_snapshot(snapshot("a", 2, engine=Engine(name="v" * 200_000, instance="one")))
    assert ids(runtime_dir) == []  # The truth or nothing: version 1 is over.
    filler.unlink()
    rank.write_snapshot(snapshot("a", 3))
    ((_, found),) = SnapshotReader(runtime_dir).read()
    assert found.weight_version == "3"


def test_what_cannot_be_encoded_takes_the_old_snapshot_away(runtime_dir: RuntimeDir) -> None:
    rank = RankStore(runtime_dir, "a")
    rank.write_snapshot(snapshot("a", 1))
    with pytest.raises(OverflowError):
        rank.write_snapshot(msgspec.structs.replace(snapshot("a", 2), update_groups=2**64))
    assert ids(runtime_dir) == []
    rank.write_snapshot(snapshot("a", 3))
    assert ids(runtime_dir) == ["a"]


def test_a_fork_of_a_rank_does_not_remove_it(runtime_dir: RuntimeDir) -> None:
    rank = RankStore(runtime_dir, "a")
    rank.write_snapshot(snapshot("a", 1))
    with pytest.raises(FileExistsError):
        RankStore(runtime_dir, "a")
    ((_, found),) = SnapshotReader(runtime_dir).read()
    assert found.weight_version == "1"
    rank.write_snapshot(snapshot("a", 2))
    ((_, found),) = SnapshotReader(runtime_dir).read()
    assert found.weight_version == "2"


def test_engines_of_one_port_get_names_of_their_own(runtime_dir: RuntimeDir) -> None:
    alive: list[RankStore] = []

    def join(instance: str, ranks: Ranks) -> tuple[str, RankStore]:
        engine = Engine(name="30000", instance=instance)
        with claim_engine_name(runtime_dir, engine, ranks) as name:
            rank = RankStore(runtime_dir, os.urandom(4).hex())
            named = msgspec.structs.replace(engine, name=name)
            rank.write_snapshot(snapshot(rank.rank_id, engine=named, ranks=ranks))
        alive.append(rank)
        return name, rank

    name, first = join("one", Ranks(tp=0))
    assert name == "30000"
    assert join("one", Ranks(tp=1))[0] == "30000"  # Another rank of the same engine.
    assert join("two", Ranks(tp=0))[0] == "30000-2"
    assert join("two", Ranks(tp=1))[0] == "30000-2"
    # Two living ranks never publish the same series, even if their engines look like one.
    assert join("one", Ranks(tp=0))[0] == "30000-3"
    first.close()
    assert join("one", Ranks(tp=0))[0] == "30000"  # Started again: the same name as before.


def test_an_engine_of_several_hosts_that_share_a_directory_has_one_name(
    runtime_dir: RuntimeDir,
) -> None:
    """Ranks are named before they have met, and each host has a launcher of its own."""
    alive: list[RankStore] = []

    def join(node_rank: int, pp: int, *, meets_at: str, group: str = "") -> str:
        engine = Engine(
            name="30000",
            instance=os.urandom(8).hex(),
            node_rank=node_rank,
            nodes=2,
            meets_at=meets_at,
            group=group,
        )
        with claim_engine_name(runtime_dir, engine, Ranks(pp=pp)) as name:
            rank = RankStore(runtime_dir, os.urandom(4).hex())
            named = msgspec.structs.replace(engine, name=name)
            rank.write_snapshot(snapshot(rank.rank_id, engine=named, ranks=Ranks(pp=pp)))
        alive.append(rank)
        return name

    first, other = "10.0.0.1:5000", "10.0.0.2:5000"
    assert join(0, 0, meets_at=first) == "30000"
    assert join(1, 1, meets_at=first) == "30000"
    assert join(1, 1, meets_at=other) == "30000-2"
    assert join(0, 0, meets_at=other) == "30000-2"
    # Of one that is replaced while it ends, and that met at the same address.
    assert join(0, 2, meets_at=first, group="a") == "30000-3"
    assert join(1, 3, meets_at=first, group="b") == "30000-4"
    # Where nobody knows where they meet, ranks of two launchers are two engines.
    assert join(0, 4, meets_at="") == "30000-5"
    assert join(1, 5, meets_at="") == "30000-6"


def test_a_lock_tells_the_living_from_the_dead(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with FileLock(path) as lock:
        assert lock.acquire()
        assert is_held(path)
        assert not FileLock(path).acquire()
    assert not is_held(path)
    reader, other = FileLock(path), FileLock(path)
    assert reader.acquire(exclusive=False)
    assert other.acquire(exclusive=False)
    assert not FileLock(path).acquire()


def test_a_rank_that_could_not_even_remove_is_back_once_it_can_write(
    runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a directory that was read-only for a while: it has the same lock again."""
    rank = RankStore(runtime_dir, "a")
    rank.write_snapshot(snapshot("a", 1))
    reader = SnapshotReader(runtime_dir)
    assert len(reader.read()) == 1
    with monkeypatch.context() as patched:
        for name in ("write", "remove"):
            patched.setattr(Directory, name, raises(PermissionError(1, "not permitted")))
        with pytest.raises(PermissionError):
            rank.write_snapshot(snapshot("a", 2))
        rank.withdraw()
        assert reader.read() == []
    rank.write_snapshot(snapshot("a", 3))
    ((_, found),) = reader.read()
    assert found.weight_version == "3"


def raises(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_a_directory_that_cannot_be_made_costs_no_descriptor(
    runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = RankStore(runtime_dir, "a")
    shutil.rmtree(rank.path)

    def no_room(directory: Directory, name: str, new_name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Directory, "rename", no_room)
    counted = []
    for version in range(1, 10):
        with pytest.raises(OSError, match="No space left"):
            rank.write_snapshot(snapshot("a", version))
        counted.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counted[-1] <= counted[0]
    monkeypatch.undo()
    rank.write_snapshot(snapshot("a", 10))
    ((_, found),) = SnapshotReader(runtime_dir).read()
    assert found.weight_version == "10"
    assert not [path for path in runtime_dir.ranks.iterdir() if path.name != "a"]


def test_locks_that_are_gone_leave_nothing_for_a_fork_to_do(tmp_path: Path) -> None:
    """A lock is made for each look at a dead rank, in a process that lives for months."""
    program = """
import gc, sys
from pathlib import Path
from sglang_weight_exporter.store.locks import FileLock
def objects():
    gc.collect()
    return sum(1 for each in gc.get_objects() if getattr(each, "__name__", "") == "close_in_child")
for _ in range(100):
    with FileLock(Path(sys.argv[1])) as lock:
        lock.acquire()
print(objects())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lock")], capture_output=True, text=True
    )
    assert int(ran.stdout) <= 1, ran.stderr
