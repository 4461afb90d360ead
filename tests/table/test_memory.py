# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Published addresses against the memory of a running engine, read through /proc/PID/mem."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, eventually

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


@pytest.fixture(params=["engine", "old_engine"])
def running(request: pytest.FixtureRequest) -> Engine:
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
            table = reader.read(timeout=30)
            found = held(table)
            assert len(expected) >= 6
            for name, content in expected.items():
                assert found[name] == content, name
            parameters = {row.name for row in table.rows() if row.kind == "parameter"}
            assert parameters >= set(expected)
            assert reader.is_current(table)


def test_regions_hold_every_tensor_and_nothing_else_than_memory(running: Engine) -> None:
    for reader in readers_of(running):
        table = reader.read(timeout=30)
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
    engine: Engine, checkpoints: tuple[Path, Path], times: int, answers: list[Any]
) -> None:
    answers.extend(
        engine.update_weights_from_disk(checkpoints[number % 2]) for number in range(times)
    )


def test_a_reader_of_memory_never_takes_a_mixture_for_a_checkpoint(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """200 reloads while a reader copies all weights, again and again, without being waited for."""
    versions = {
        name: tuple(sorted(as_stored(checkpoint).items()))
        for name, checkpoint in zip("ab", checkpoints, strict=True)
    }
    names = [name for name, _ in versions["a"]]
    engine.update_weights_from_disk(checkpoints[1])
    answers: list[Any] = []
    reloads = threading.Thread(
        target=reload_in_turn, args=(engine, checkpoints, 200, answers), daemon=True
    )
    reader = readers_of(engine)[0]
    taken: Counter[str] = Counter()
    tables = set()
    reloads.start()
    while reloads.is_alive():
        try:
            with reader.hold(timeout=5) as table:
                found = held(table)
                if not reader.is_current(table):
                    taken["told"] += 1
                    continue
        except TableError:
            taken["told"] += 1
            continue
        tables.add(table.columns.sha256)
        content = tuple((name, found[name]) for name in names)
        taken[next((name for name, known in versions.items() if known == content), "mixed")] += 1
    reloads.join()
    assert [answer[1]["success"] for answer in answers] == [True] * 200
    assert taken["mixed"] == 0, taken
    assert min(taken["a"], taken["b"]) > 10, taken
    assert len(tables) == 1  # Reloads in place move nothing.


@contextlib.contextmanager
def holding(readers: list[TableReader]) -> Iterator[list[Table]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(reader.hold(timeout=30)) for reader in readers]


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
    old_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """`old_engine` runs with SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS."""
    old_engine.update_weights_from_disk(checkpoints[0])
    expected = as_stored(checkpoints[0])
    readers = readers_of(old_engine)
    answers: list[Any] = []
    update = threading.Thread(
        target=reload_in_turn, args=(old_engine, checkpoints[::-1], 1, answers), daemon=True
    )
    with holding(readers) as (table,):
        update.start()
        eventually(lambda: not readers[0].is_current(table), what="the update to begin")
        found = held(table)  # It has begun, says so, and has not written anything.
        assert {name: found[name] for name in expected} == expected
        assert update.is_alive()
    update.join(60)
    assert answers[0][1]["success"] is True
    found = held(readers[0].read(timeout=30))
    expected = as_stored(checkpoints[1])
    assert {name: found[name] for name in expected} == expected


def test_metadata_files_follow_the_engine(
    old_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """`old_engine` runs with SGLANG_WEIGHT_EXPORTER_METADATA_DIR."""
    directory = old_engine.directory / "weights_metadata"
    old_engine.update_weights_from_disk(checkpoints[1])
    (table,) = (reader.read(timeout=30) for reader in readers_of(old_engine))
    assert table.role.last_update is not None
    ended_at = table.role.last_update.ended_at

    def summarized() -> bool:
        path = directory / "weight_update_summary_0.json"
        return path.exists() and json.loads(path.read_text())["update_timestamp"] == ended_at

    eventually(summarized, what="the files of this update")
    weights = json.loads((directory / "weights_meta_0.json").read_text())
    assert {name: (entry["ptr"], entry["size"]) for name, entry in weights.items()} == {
        row.name: (row.data_ptr, row.nbytes) for row in table.rows() if row.kind == "parameter"
    }
    assert all(entry["updated"] for entry in weights.values())
    total = sum(entry["size"] for entry in weights.values())
    assert json.loads((directory / "total_weight_meta_0.json").read_text()) == {
        "cpu": total / 2**30
    }
    summary = json.loads((directory / "weight_update_summary_0.json").read_text())
    assert summary["total_weights"] == len(weights)
    assert (summary["succeeded"], summary["pid"]) == (True, table.pid)


def test_the_command_prints_what_the_engine_holds(running: Engine) -> None:
    ran = running.exporter_cli("table", "--format", "json")
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)["tables"]
    tables = [reader.read(timeout=30) for reader in readers_of(running)]
    assert [entry["pid"] for entry in printed] == [table.pid for table in tables]
    for entry, table in zip(printed, tables, strict=True):
        assert [int(tensor["data_ptr"], 16) for tensor in entry["tensors"]] == [
            row.data_ptr for row in table.rows()
        ]
    assert running.exporter_cli("table", "--diff").returncode == 0
