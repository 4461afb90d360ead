# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged or no files at all: each costs its own rank or model, and no other."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import PREFIX, Scrape, clean_environment
from ranks import ExporterProcess, Rank, rows
from waiting import LIMIT, eventually

from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Histogram, UpdateCounts
from sglang_weight_exporter.store.decoding import UnreadableError, read
from sglang_weight_exporter.store.engine_names import claim_engine_name
from sglang_weight_exporter.store.files import read_file
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader, read_endpoint
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.tables import TableError, TableReader
from sglang_weight_exporter.weight_table import WeightTable, table_of_rows

Fields = dict[str, Any]


@pytest.fixture
def runtime_dir(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir.open(tmp_path / "runtime", {})


def valid_snapshot(rank_id: str, *, tp: int = 0) -> Fields:
    """A snapshot of two models, as the plain values of its file."""
    counts = UpdateCounts(updates=1, calls=1, duration=Histogram().observe(0.5))
    snapshot = Snapshot(
        rank_id=rank_id,
        pid=os.getpid(),
        started_at=1.0,
        engine=Engine(name="30000", instance="one", model_name="tiny"),
        ranks=Ranks(tp=tp),
        roles=(
            Role(name="target", device="cuda:0", loaded_at=2.0, updates={"disk": counts}),
            Role(name="draft", device="cuda:0", loaded_at=2.0),
        ),
    )
    fields: Fields = msgspec.to_builtins(snapshot)
    return fields


def histogram_with_three_counts(fields: Fields) -> None:
    fields["roles"][0]["updates"]["disk"]["duration"]["counts"] = [1, 2, 3]


def nan(fields: Fields) -> None:
    fields["roles"][0]["loaded_at"] = float("nan")


def infinity(fields: Fields) -> None:
    fields["roles"][0]["load_seconds"] = float("inf")


def time_beyond_nanoseconds(fields: Fields) -> None:
    fields["roles"][0]["updated_at"] = 1e300


def negative_sum(fields: Fields) -> None:
    fields["roles"][0]["updates"]["disk"]["duration"]["sum"] = -2.0


def negative_count(fields: Fields) -> None:
    fields["roles"][0]["moved"] = -1


def count_beyond_64_bits_with_sign(fields: Fields) -> None:
    fields["roles"][0]["resident"] = {"cuda:0": 2**64 - 1}


def wrong_type(fields: Fields) -> None:
    fields["roles"][0]["device"] = 7


def exemplar_that_no_scrape_takes(fields: Fields) -> None:
    fields["roles"][0]["updates"]["disk"]["trace_id"] = "x" * 1000


def table_outside_the_directory(fields: Fields) -> None:
    table = {"file": "../../secret", "sha256": "a" * 64, "rows": 0, "regions": {}}
    fields["roles"][0]["table"] = {**table, "captured_at": 1.0}


def fingerprint_that_is_no_number(fields: Fields) -> None:
    table = {"file": "a", "sha256": "a" * 64, "rows": 0, "regions": {}, "captured_at": 1.0}
    fields["roles"][0]["table"] = {**table, "fingerprint": "x" * 32}


def negative_bytes_of_a_source(fields: Fields) -> None:
    fields["roles"][0]["updates"]["disk"]["nbytes"] = -1


def update_in_progress_since_nobody_knows_when(fields: Fields) -> None:
    progress = {"source": "disk", "started_at": float("nan"), "last_call_at": 3.0}
    fields["roles"][0]["in_progress"] = progress


#: What may be unknown, and is.
DAMAGED_FIELD: dict[Callable[[Any], Any], Callable[[Role], object]] = {
    nan: lambda role: role.loaded_at,
    infinity: lambda role: role.load_seconds,
    time_beyond_nanoseconds: lambda role: role.updated_at,
    count_beyond_64_bits_with_sign: lambda role: role.resident,
    table_outside_the_directory: lambda role: role.table,
    fingerprint_that_is_no_number: lambda role: role.table,
    negative_bytes_of_a_source: lambda role: role.updates["disk"].nbytes,
}

DAMAGED_ROLE: list[Callable[[Any], Any]] = [
    histogram_with_three_counts,
    negative_sum,
    negative_count,
    wrong_type,
    exemplar_that_no_scrape_takes,
    update_in_progress_since_nobody_knows_when,
]


def lone_surrogate(content: bytes) -> bytes:
    return content.replace(b"\xa4tiny", b"\xa4x\xed\xa0\x80")


def no_utf8(content: bytes) -> bytes:
    return content.replace(b"\xa4tiny", b"\xa4\xff\xfe\xfd\xfc")


def nested(content: bytes) -> bytes:
    return b"\xde\x00\x01\xa5weird" + b"\x91" * 200_000


def nested_beside_what_is_known(content: bytes) -> bytes:
    fields = msgspec.msgpack.decode(content)
    fields["a"] = fields["b"] = None
    return msgspec.msgpack.encode(fields)[:-1] + b"\x91" * 200_000


def nan_in_the_rank(content: bytes) -> bytes:
    fields = {**msgspec.msgpack.decode(content), "started_at": float("nan")}
    return msgspec.msgpack.encode(fields)


def negative_errors(content: bytes) -> bytes:
    fields = {**msgspec.msgpack.decode(content), "hook_errors": {"a": -1}}
    return msgspec.msgpack.encode(fields)


def no_roles(content: bytes) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(content), "roles": 3})


def announces_a_huge_array(content: bytes) -> bytes:
    return b"\x82\xa6schema\x01\xa5roles\xdd\xff\xff\xff\xff"


DAMAGED_RANK: list[Callable[[Any], Any]] = [
    lone_surrogate,
    no_utf8,
    nested,
    nested_beside_what_is_known,
    nan_in_the_rank,
    negative_errors,
    no_roles,
    announces_a_huge_array,
]


def write(
    rank: RankStore, fields: Fields, change: Callable[[Any], Any] = lambda content: content
) -> None:
    """Write a snapshot, changed like this."""
    if change in DAMAGED_ROLE or change in DAMAGED_FIELD:
        change(fields)
        content = msgspec.msgpack.encode(fields)
    else:
        content = change(msgspec.msgpack.encode(fields))
    (rank.path / "snapshot").write_bytes(content)


@pytest.fixture
def sound(runtime_dir: RuntimeDir) -> Iterator[RankStore]:
    rank = RankStore(runtime_dir, "sound")
    write(rank, valid_snapshot("sound", tp=1))
    yield rank
    rank.close()


@pytest.fixture
def broken(runtime_dir: RuntimeDir, sound: RankStore) -> Iterator[RankStore]:
    """A rank beside a sound one."""
    rank = RankStore(runtime_dir, "broken")
    yield rank
    rank.close()


def roles_by_rank(runtime_dir: RuntimeDir, said: list[str]) -> dict[str, list[str]]:
    reader = SnapshotReader(runtime_dir, on_unreadable=said.append)
    return {
        snapshot.rank_id: [role.name for role in snapshot.roles] for _, snapshot in reader.read()
    }


@pytest.mark.parametrize("change", DAMAGED_FIELD)
def test_a_damaged_field_costs_itself_alone(
    runtime_dir: RuntimeDir, broken: RankStore, change: Callable[[Fields], None]
) -> None:
    write(broken, valid_snapshot("broken"))
    ((_, before), _) = SnapshotReader(runtime_dir).read()
    write(broken, valid_snapshot("broken"), change)
    said: list[str] = []
    ((_, after), _) = SnapshotReader(runtime_dir, on_unreadable=said.append).read()
    assert [role.name for role in after.roles] == ["target", "draft"]
    field = DAMAGED_FIELD[change]
    assert field(after.roles[0]) is None
    assert msgspec.structs.replace(after, roles=()) == msgspec.structs.replace(before, roles=())
    assert after.roles[1] == before.roles[1]
    (sentence,) = said
    assert str(broken.path / "snapshot") in sentence
    assert "in its model 1." in sentence


@pytest.mark.parametrize("change", DAMAGED_ROLE)
def test_a_damaged_model_costs_itself_alone(
    runtime_dir: RuntimeDir, broken: RankStore, change: Callable[[Fields], None]
) -> None:
    write(broken, valid_snapshot("broken"), change)
    said: list[str] = []
    assert roles_by_rank(runtime_dir, said) == {"broken": ["draft"], "sound": ["target", "draft"]}
    (sentence,) = said
    assert str(broken.path / "snapshot") in sentence
    assert "model 1" in sentence


@pytest.mark.parametrize("change", DAMAGED_RANK)
def test_a_damaged_snapshot_costs_its_rank_alone(
    runtime_dir: RuntimeDir, broken: RankStore, change: Callable[[bytes], bytes]
) -> None:
    write(broken, valid_snapshot("broken"), change)
    said: list[str] = []
    assert roles_by_rank(runtime_dir, said) == {"sound": ["target", "draft"]}
    (sentence,) = said
    assert str(broken.path / "snapshot") in sentence


@pytest.mark.parametrize("linked", [False, True])
def test_a_copy_of_a_rank_is_not_served_beside_it(
    runtime_dir: RuntimeDir, sound: RankStore, linked: bool
) -> None:
    """With hard links, as some backups are made, it has the rank's lock too."""
    copy = runtime_dir.ranks / "copy"
    if linked:
        copy.symlink_to(sound.path)
    else:
        shutil.copytree(sound.path, copy, copy_function=os.link)
    said: list[str] = []
    assert roles_by_rank(runtime_dir, said) == {"sound": ["target", "draft"]}
    assert ["is a copy of what rank sound has" in each for each in said] == [True] * (not linked)


@pytest.mark.parametrize("change", [*DAMAGED_FIELD, *DAMAGED_ROLE, *DAMAGED_RANK])
def test_an_engine_that_starts_can_claim_a_name(
    runtime_dir: RuntimeDir, broken: RankStore, change: Callable[[Any], Any]
) -> None:
    write(broken, valid_snapshot("broken"), change)
    engine = Engine(name="30000", instance="two")
    with claim_engine_name(runtime_dir, engine, Ranks()) as name:
        assert name == "30000-2"


def test_an_engine_can_claim_a_name_where_the_lock_cannot_be_had(runtime_dir: RuntimeDir) -> None:
    runtime_dir.engines_lock.mkdir()
    with claim_engine_name(runtime_dir, Engine(name="30000", instance="two"), Ranks()) as name:
        assert name == "30000"


def command(runtime_dir: RuntimeDir, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", *arguments],
        env=clean_environment(**{PREFIX + "RUNTIME_DIR": str(runtime_dir.path)}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture
def exporter(runtime_dir: RuntimeDir) -> Iterator[ExporterProcess]:
    started = ExporterProcess(runtime_dir.path).start()
    eventually(started.scrape, what="metrics of the exporter process")
    yield started
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        started.end(signal.SIGKILL)


def test_scrapes_and_commands_show_what_is_sound(
    runtime_dir: RuntimeDir, exporter: ExporterProcess
) -> None:
    sound = RankStore(runtime_dir, "sound")
    write(sound, valid_snapshot("sound", tp=100))
    ranks = []
    for tp, change in enumerate((*DAMAGED_ROLE, *DAMAGED_RANK)):
        ranks.append(RankStore(runtime_dir, change.__name__))
        write(ranks[-1], valid_snapshot(change.__name__, tp=tp), change)
    scrape = exporter.scrape()
    loaded = {
        (sample.labels["tp_rank"], sample.labels["role"])
        for sample in scrape.samples
        if sample.name == "sglang_weight_loaded_timestamp_seconds"
    }
    assert loaded == {
        ("100", "target"),
        ("100", "draft"),
        *((str(tp), "draft") for tp in range(len(DAMAGED_ROLE))),
    }
    assert scrape.one("sglang_weight_exporter_read_errors_total") == len(ranks)
    status = command(runtime_dir, "status")
    for rank in ranks:
        assert str(rank.path) in status.stdout
    for answer in (status, command(runtime_dir, "table", "--wait", "0")):
        assert "Traceback" not in answer.stderr


def test_a_model_that_comes_twice_counts_once(
    runtime_dir: RuntimeDir, exporter: ExporterProcess, sound: RankStore
) -> None:
    """The same series twice is what some readers of a scrape refuse all of."""
    fields = valid_snapshot("sound", tp=1)
    second = {**fields["roles"][0], "loaded_at": 99.0}
    fields["roles"] = [*fields["roles"], second, fields["roles"][1]]
    write(sound, fields)
    scrape = exporter.scrape()
    assert_distinct(scrape)
    assert scrape.one("sglang_weight_loaded_timestamp_seconds", role="target") == 2.0
    assert scrape.one("sglang_weight_exporter_read_errors_total") == 2
    for asked in ("status", "table"):
        answer = command(runtime_dir, asked, *(("--wait", "0") if asked == "table" else ()))
        assert "Traceback" not in answer.stderr
    assert "by a second model 'target'" in command(runtime_dir, "status").stdout


def with_doubles() -> Fields:
    """A snapshot in which an entry of each list comes a second time, with other numbers."""
    fields = valid_snapshot("sound", tp=1)
    cuda = {"device": "cuda:0"}
    sums = {**cuda, "kind": "parameter", "dtype": "bfloat16"}
    account = {**cuda, "at": 1.0, "allocated": 1, "allocated_peak": 1, "reserved_peak": 1}
    fields["roles"] = list(fields["roles"])
    fields["roles"][0] |= {
        "weights": [
            {**sums, "nbytes": 11, "tensors": 1},
            {**sums, "nbytes": 99, "tensors": 9},
            {**sums, "dtype": "float32", "nbytes": 12, "tensors": 1},
        ],
        "kv_pools": [{**cuda, "pool": "full", "nbytes": nbytes} for nbytes in (13, 99)],
        "lora": [{**cuda, "nbytes": nbytes, "adapters": 1} for nbytes in (14, 99)],
    }
    fields["memory"] = [{**account, "reserved": reserved} for reserved in (15, 99)]
    fields["hooks"] = [
        {"target": "load_model", "status": status} for status in ("failed", "absent")
    ]
    fields["devices"] = [{"name": "cuda:0", "uuid": uuid} for uuid in ("GPU-1", "GPU-2")]
    return fields


def assert_distinct(scrape: Scrape) -> None:
    series = [(sample.name, *sorted(sample.labels.items())) for sample in scrape.samples]
    assert len(series) == len(set(series))


def test_an_entry_that_comes_twice_counts_once(
    runtime_dir: RuntimeDir, exporter: ExporterProcess, sound: RankStore
) -> None:
    write(sound, with_doubles())
    scrape = exporter.scrape()
    assert_distinct(scrape)
    weights = scrape.series("sglang_weight_bytes", role="target")
    assert {(each.labels["dtype"], each.value) for each in weights} == {
        ("bfloat16", 11.0),
        ("float32", 12.0),
    }
    assert scrape.one("sglang_kv_pool_bytes", role="target") == 13
    assert scrape.one("sglang_lora_pool_bytes", role="target") == 14
    assert scrape.one("sglang_rank_memory_reserved_bytes", gpu_uuid="GPU-1") == 15
    assert scrape.one("sglang_weight_exporter_hooks", target="load_model", state="failed") == 1
    assert scrape.sum("sglang_weight_exporter_hooks") == 1
    assert scrape.one("sglang_weight_exporter_read_errors_total") == 6
    said = command(runtime_dir, "status").stdout
    for what in (
        "sum of weights 'cuda:0 parameter bfloat16' in its model 'target'",
        "KV pool 'cuda:0 full' in its model 'target'",
        "pool of adapters on 'cuda:0' in its model 'target'",
        "account of memory of 'cuda:0'",
        "hook 'load_model'",
        "device 'cuda:0'",
    ):
        assert f"is damaged by a second {what}, which is left out" in said


@pytest.mark.parametrize("field", ["weights", "resident", "kv_pools", "kv_resident"])
def test_nobodys_device_is_not_the_roles_own(
    runtime_dir: RuntimeDir, sound: RankStore, field: str
) -> None:
    """Its series would be those of the role's device a second time."""
    fields = valid_snapshot("sound", tp=1)
    usage = {"kind": "parameter", "dtype": "bfloat16", "pool": "full", "nbytes": 1, "tensors": 1}
    fields["roles"][0][field] = (
        {"": 1, "cuda:0": 1}
        if field.endswith("resident")
        else [{**usage, "device": ""}, {**usage, "device": "cuda:0"}]
    )
    write(sound, fields)
    said: list[str] = []
    ((_, found),) = SnapshotReader(runtime_dir, on_unreadable=said.append).read()
    assert getattr(found.roles[0], field) is None
    (sentence,) = said
    assert f"in its model 1.{field}" in sentence


def test_of_two_ranks_that_are_the_same_one_the_first_is_served(
    runtime_dir: RuntimeDir, exporter: ExporterProcess, sound: RankStore
) -> None:
    """As two engines of one port may be that start at once where the lock cannot be had."""
    other = RankStore(runtime_dir, "another")  # Before it in the order of their directories.
    fields = {**valid_snapshot("another", tp=1), "started_at": 2.0}
    fields["roles"][0]["loaded_at"] = 3.0
    write(other, fields)
    loaded = "sglang_weight_loaded_timestamp_seconds"
    for _ in range(2):
        scrape = exporter.scrape()
        assert_distinct(scrape)
        assert scrape.one("sglang_weight_exporter_ranks") == 1
        assert scrape.one(loaded, role="target") == 2.0
        assert scrape.one("sglang_weight_exporter_read_errors_total") == 1
    (line,) = [line for line in exporter.log().splitlines() if "another" in line]
    assert "Rank another says that it is tp 1 pp 0 of engine 30000, which rank sound" in line
    sound.close()
    eventually(lambda: exporter.scrape().one(loaded, role="target") == 3.0, what="the other one")


@pytest.mark.slow
def test_threads_that_read_for_the_first_time_at_once_read(
    runtime_dir: RuntimeDir, sound: RankStore
) -> None:
    program = """
import sys, threading
from pathlib import Path
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
sys.setswitchinterval(1e-6)
runtime_dir, together, found = RuntimeDir(Path(sys.argv[1])), threading.Barrier(4), []
def read():
    together.wait()
    found.extend(snapshot for _, snapshot in SnapshotReader(runtime_dir).read())
threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found))
"""
    for _ in range(10):
        ran = subprocess.run(
            [sys.executable, "-c", program, str(runtime_dir.path)], capture_output=True, text=True
        )
        assert (ran.returncode, ran.stdout) == (0, "4\n"), ran.stderr


def test_odd_strings_do_not_keep_an_old_snapshot_published(tmp_path: Path) -> None:
    """Python has paths that are no UTF-8 with lone surrogates in them."""
    odd = os.fsdecode(b"/models/caf\xe9")
    rank = Rank(tmp_path / "runtime")
    rank.engine = msgspec.structs.replace(rank.engine, model_name=odd)
    rank.load(rows(3))
    rank.update(message=f"{odd} is not there")
    ((directory, snapshot),) = SnapshotReader(rank.runtime_dir).read()
    assert snapshot.engine.model_name == r"/models/caf\udce9"
    assert snapshot.roles[0].table is not None
    event = directory.events.event(directory.events.waiting()[-1])
    assert event.update.message == r"/models/caf\udce9 is not there"


def as_fields(table: WeightTable) -> Fields:
    fields: Fields = msgspec.to_builtins(table, builtin_types=(bytes,))
    return fields


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 4},
        {"rows": 2**62},
        {"names": b"a\nb"},
        {"names": b"\xff\nb\nc"},
        {"data_ptr": b"\0" * 23},
        {"dtype": b"\xff" * 12},
        {"shape_values": []},
        {"shape_values": [[-1], [1]]},
        {"region_ptr": b"\0" * 8},
        {"region_ptr": b"\0" * 8, "region_nbytes": b"\0" * 8, "region_device": b"\7\0\0\0"},
        {"captured_at": float("nan")},
    ],
)
def test_a_damaged_table_is_refused_in_words(tmp_path: Path, change: Fields) -> None:
    table = table_of_rows(rows(3), role="target", captured_at=1.0)
    path = tmp_path / "file.table"
    path.write_bytes(msgspec.msgpack.encode(as_fields(table)))
    assert read(path, WeightTable) == table
    path.write_bytes(msgspec.msgpack.encode(as_fields(table) | change))
    with pytest.raises(UnreadableError, match="is damaged"):
        read(path, WeightTable)


# Files that are not files.


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1_500_000_000)


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_link, make_sparse])
@pytest.mark.parametrize("name", ["snapshot", "lock"])
def test_what_is_no_file_hangs_nobody(
    runtime_dir: RuntimeDir, broken: RankStore, make: Callable[[Path], None], name: str
) -> None:
    write(broken, valid_snapshot("broken"), nan)
    (broken.path / name).unlink()
    make(broken.path / name)
    said: list[str] = []
    reader = SnapshotReader(runtime_dir, on_unreadable=said.append)
    for _ in range(3):
        assert [snapshot.rank_id for _, snapshot in reader.read()] == ["sound"]
    # Whoever has another lock than the one that is there counts as dead.
    assert len(said) == (1 if name == "snapshot" or make is make_link else 0)
    with claim_engine_name(runtime_dir, Engine(name="30000", instance="two"), Ranks()) as claimed:
        assert claimed == "30000-2"


def test_a_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    make_sparse(tmp_path / "file")
    with pytest.raises(OSError, match="more than"):
        read_file(tmp_path / "file", 2**20)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_link, make_sparse])
@pytest.mark.parametrize("name", ["snapshot", "lock", "table.lock", "exported", "events"])
def test_what_is_no_file_costs_no_descriptor(
    runtime_dir: RuntimeDir, broken: RankStore, make: Callable[[Path], None], name: str
) -> None:
    write(broken, valid_snapshot("broken"))
    path = broken.path / name
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    make(path)
    directory = RankDirectory(broken.path)
    reader = SnapshotReader(runtime_dir)
    gc.collect()
    before = descriptors()
    for _ in range(3):
        reader.read()
        for read_something in (
            directory.is_alive,
            directory.events.waiting,
            directory.events.size,
            lambda: directory.noted("exported", ExporterEndpoint),
            lambda: TableReader(directory, "target", Engine(name="", instance=""), Ranks()).read(),
        ):
            with contextlib.suppress(OSError, UnreadableError, TableError):
                read_something()
    assert descriptors() <= before


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_link, make_sparse])
@pytest.mark.parametrize("name", ["snapshot", "lock", "events", "."])
def test_a_rank_that_writes_again_is_there_again(
    runtime_dir: RuntimeDir, tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    rank = Rank(runtime_dir.path)
    rank.load(rows(3))
    path = rank.store.path / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)
    if make is make_directory:
        (path / "file").write_text("")
    counted = []
    for _ in range(3):
        rank.update()
        ((_, found),) = SnapshotReader(runtime_dir).read()
        assert found.roles[0].table is not None
        assert rank.waiting()
        counted.append(descriptors())
    assert counted[-1] <= counted[0]


def test_what_is_no_directory_is_said_once(runtime_dir: RuntimeDir) -> None:
    (runtime_dir.ranks / "file").write_text("")
    said: list[str] = []
    reader = SnapshotReader(runtime_dir, on_unreadable=said.append)
    for _ in range(3):
        assert reader.read() == []
    assert len(said) == 1


def test_ranks_that_cannot_be_listed_are_none_for_now(runtime_dir: RuntimeDir) -> None:
    runtime_dir.ranks.rmdir()
    runtime_dir.ranks.write_text("")
    assert SnapshotReader(runtime_dir).read() == []


@pytest.mark.parametrize(
    "content",
    [b"\xff", b'{"pid": 1, "started_at": NaN}', b"[" * 100_000, json.dumps({"pid": "x"}).encode()],
)
def test_a_damaged_note_of_the_exporter_is_none(runtime_dir: RuntimeDir, content: bytes) -> None:
    exporter = ExporterProcess(runtime_dir.path).start()
    try:
        eventually(lambda: read_endpoint(runtime_dir), what="the note")
        runtime_dir.exporter_file.write_bytes(content)
        assert read_endpoint(runtime_dir) is None
        assert "Traceback" not in command(runtime_dir, "status").stderr
    finally:
        exporter.end(signal.SIGKILL)
