# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Published addresses against the memory of a running engine, read through /proc/PID/mem."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from waiting import LIMIT, eventually

from sglang_weight_exporter import Table, TableError, TableReader, open_tables

#: SGLang makes one parameter of these, one behind the other.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def checkpoint_tensors(checkpoint: Path) -> dict[str, bytes]:
    """Name → bytes of a checkpoint, read by the library whose format it is."""
    safetensors = pytest.importorskip("safetensors", reason="comes with SGLang")
    content = (checkpoint / "model.safetensors").read_bytes()
    return {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(content)}


def as_stored(checkpoint: Path) -> dict[str, bytes]:
    """What SGLang keeps of a checkpoint in memory, by its own names."""
    tensors = checkpoint_tensors(checkpoint)
    stored = dict(tensors)
    for fused, parts in FUSED.items():
        for name in tensors:
            layer, found, end = name.partition(parts[0])
            if found:
                stored[layer + fused + end] = b"".join(
                    stored.pop(layer + part + end) for part in parts
                )
    if " amx_tile " in Path("/proc/cpuinfo").read_text():
        # There SGLang packs the matrices of linear layers; the others are as in the file.
        return {name: value for name, value in stored.items() if re.search("norm|embed", name)}
    return stored


def held(table: Table) -> dict[str, bytes]:
    """Name → bytes at each published address of the engine process."""
    with Path(f"/proc/{table.pid}/mem").open("rb", buffering=0) as memory:
        found = {}
        for row in table.rows():
            memory.seek(row.data_ptr)
            found[row.name] = memory.read(row.nbytes)
    return found


OLD = pytest.param("old_engine", marks=pytest.mark.release("oldest"))


@pytest.fixture(params=["engine", OLD])
def running(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(request.param)
    return engine


@pytest.fixture(params=["tensor_parallel_engine", OLD])
def with_readers(request: pytest.FixtureRequest) -> Engine:
    """Updates wait for readers, and files follow them."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


def readers_of(engine: Engine) -> list[TableReader]:
    found = open_tables(engine.runtime_dir)
    assert found
    return found


def test_the_bytes_at_each_address_are_the_checkpoints(
    running: Engine, checkpoints: tuple[Path, Path]
) -> None:
    a, b = checkpoints
    for checkpoint in (a, b, a):  # Before and after a reload.
        status, answer = running.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True)
        expected = as_stored(checkpoint)
        for reader in readers_of(running):
            table = reader.read(timeout=LIMIT)
            found = held(table)
            assert len(expected) >= 6
            for name, content in expected.items():
                assert found[name] == content, name
            parameters = {row.name for row in table.rows() if row.kind == "parameter"}
            assert parameters >= set(expected)
            assert reader.is_current(table)


def test_regions_hold_every_tensor_and_nothing_else_than_memory(running: Engine) -> None:
    for reader in readers_of(running):
        table = reader.read(timeout=LIMIT)
        spans = [(region.data_ptr, region.data_ptr + region.nbytes) for region in table.regions()]
        for row in table.rows():
            assert any(
                start <= row.data_ptr and row.data_ptr + row.nbytes <= end for start, end in spans
            ), row
        with Path(f"/proc/{table.pid}/mem").open("rb", buffering=0) as memory:
            for start, end in spans:
                memory.seek(start)
                assert len(memory.read(end - start)) == end - start
        storages = {row.storage_ptr: row.storage_nbytes for row in table.rows()}
        assert sum(end - start for start, end in spans) <= sum(storages.values())


def reload_in_turn(
    engine: Engine, checkpoints: tuple[Path, Path], times: Iterable[int], answers: list[Any]
) -> None:
    answers.extend(engine.update_weights_from_disk(checkpoints[number % 2]) for number in times)


def test_a_reader_of_memory_never_takes_a_mixture_for_a_checkpoint(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """100 reloads and more while a reader copies all weights, again and again, without being
    waited for, until it has had each checkpoint more than ten times."""
    versions = {
        name: tuple(sorted(as_stored(checkpoint).items()))
        for name, checkpoint in zip("ab", checkpoints, strict=True)
    }
    names = [name for name, _ in versions["a"]]
    engine.update_weights_from_disk(checkpoints[1])
    answers: list[Any] = []
    taken: Counter[str] = Counter()

    def more(number: int) -> bool:
        return number < 100 or min(taken["a"], taken["b"]) <= 10

    numbers = itertools.takewhile(more, itertools.count())
    reloads = threading.Thread(
        target=reload_in_turn, args=(engine, checkpoints, numbers, answers), daemon=True
    )
    reader = readers_of(engine)[0]
    tables = set()
    reloads.start()
    while reloads.is_alive():
        try:
            with reader.hold(timeout=LIMIT) as table:
                found = held(table)
                if not reader.is_current(table):
                    taken["notified"] += 1
                    continue
        except TableError:
            taken["notified"] += 1
            continue
        tables.add(table.columns.sha256)
        content = tuple((name, found[name]) for name in names)
        taken[next((name for name, known in versions.items() if known == content), "mixed")] += 1
        assert taken["mixed"] == 0, taken
    assert len(answers) >= 100
    assert all(answer[1]["success"] is True for answer in answers)
    assert len(tables) == 1  # Reloads in place move nothing.


@contextlib.contextmanager
def holding(readers: list[TableReader]) -> Iterator[list[Table]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(reader.hold(timeout=LIMIT)) for reader in readers]


def test_an_update_does_not_wait_for_a_reader(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    readers = readers_of(engine)
    with holding(readers) as tables:
        status, answer = engine.update_weights_from_disk(checkpoints[0])
        assert (status, answer["success"]) == (200, True)
        for reader, table in zip(readers, tables, strict=True):
            assert not reader.is_current(table)


def test_an_update_waits_for_a_reader_where_it_is_told_to(
    with_readers: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """It runs with SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS."""
    readers = readers_of(with_readers)

    def expected(checkpoint: Path, rank: int) -> dict[str, bytes]:
        """What the only rank has; of two half of the rows of what is split by rows."""
        stored = as_stored(checkpoint)
        if len(readers) == 1:
            return stored
        name = "model.embed_tokens.weight"
        half = len(stored[name]) // 2
        return {name: stored[name][rank * half : (rank + 1) * half]}

    with_readers.update_weights_from_disk(checkpoints[0])
    answers: list[Any] = []
    wanted = with_readers, checkpoints[::-1], range(1), answers
    update = threading.Thread(target=reload_in_turn, args=wanted, daemon=True)
    with holding(readers) as tables:
        update.start()
        for reader, table in zip(readers, tables, strict=True):
            eventually(lambda: not reader.is_current(table), what="the update to begin")  # noqa: B023
            found = held(table)  # It has begun, says so, and has not written anything.
            before = expected(checkpoints[0], table.ranks.tp)
            assert {name: found[name] for name in before} == before
        assert update.is_alive()
    update.join(LIMIT)
    assert answers[0][1]["success"] is True
    for reader in readers:
        found = held(table := reader.read(timeout=LIMIT))
        after = expected(checkpoints[1], table.ranks.tp)
        assert {name: found[name] for name in after} == after


def test_metadata_files_follow_the_engine(
    with_readers: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """It runs with SGLANG_WEIGHT_EXPORTER_METADATA_DIR."""
    directory = with_readers.directory / "weights_metadata"
    with_readers.update_weights_from_disk(checkpoints[1])
    for table in [reader.read(timeout=LIMIT) for reader in readers_of(with_readers)]:
        owner = table.ranks.tp  # SGLang gives the n-th rank the n-th GPU, also where there is none.
        assert table.role.last_update is not None
        ended_at = table.role.last_update.ended_at

        def read(name: str, owner: int = owner) -> dict[str, Any]:
            found: dict[str, Any] = json.loads((directory / f"{name}_{owner}.json").read_text())
            return found

        def summarized(ended_at: float = ended_at) -> bool:
            return bool(read("weight_update_summary")["update_timestamp"] == ended_at)

        eventually(summarized, what="the files of this update")
        weights = read("weights_meta")
        assert {name: (entry["ptr"], entry["size"]) for name, entry in weights.items()} == {
            row.name: (row.data_ptr, row.nbytes) for row in table.rows() if row.kind == "parameter"
        }
        assert all(entry["updated"] for entry in weights.values())
        total = sum(entry["size"] for entry in weights.values())
        assert read("total_weight_meta") == {"cpu": total / 2**30}
        summary = read("weight_update_summary")
        assert summary["total_weights"] == len(weights)
        assert (summary["succeeded"], summary["pid"]) == (True, table.pid)


def test_the_command_prints_what_the_engine_holds(running: Engine) -> None:
    ran = running.exporter_cli("table", "--format", "json")
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)["tables"]
    tables = [reader.read(timeout=LIMIT) for reader in readers_of(running)]
    assert [entry["pid"] for entry in printed] == [table.pid for table in tables]
    for entry, table in zip(printed, tables, strict=True):
        assert [int(tensor["data_ptr"], 16) for tensor in entry["tensors"]] == [
            row.data_ptr for row in table.rows()
        ]
    assert running.exporter_cli("table", "--diff").returncode == 0
