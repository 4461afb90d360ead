# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that is driven out of memory: by an allocation that somebody catches, by a buffer that
is to receive weights, and by a prompt, which ends it.

What its black box says is compared with torch, the driver and NVML. Each test has an engine of its
own, and the whole GPU.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_engines import (
    BFLOAT16,
    MIB,
    GpuEngine,
    GpuEngines,
    Rank,
    Record,
    need_gpus,
    rows,
    storages,
    write_checkpoint,
)
from ports import free_port
from waiting import eventually

from sglang_weight_exporter.records.black_box import BlackBox, OutOfMemory
from sglang_weight_exporter.store.ended import ended_ranks, read_black_box
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

GIB = 1024 * MIB

#: An error is looked into once a second.
APART = 1.5

#: What a scheduler that holds an error may wait.
LONGEST_SECONDS = 0.1

TRAINER = """
import sys, time
from sglang.srt.utils import init_custom_process_group
init_custom_process_group(
    backend="gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", world_size=2, rank=0,
    group_name="trainer",
)
time.sleep(600)
"""


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[GpuEngine]:
    need_gpus()
    engines = GpuEngines(tmp_path)
    engines.install_probe()
    engines.checkpoints = {"a": write_checkpoint(tmp_path / "a", 0)}
    config = tmp_path / "a" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 16384}
    config.write_text(json.dumps(longer))
    engines.start("doomed_engine")
    running = engines.engines["doomed_engine"]
    try:
        running.engine.wait_until_ready()
        eventually(running.engine.scrape)
        # Kernels of a first prompt are loaded while there is room for them.
        body = {"text": "a b c", "sampling_params": {"max_new_tokens": 2}}
        assert running.engine.post("/generate", body)[0] == 200
        yield running
    finally:
        running.engine.stop()


def black_box(rank: Rank) -> BlackBox:
    found = read_black_box(rank.directory)
    assert found is not None, "there is no black box"
    return found


def count(engine: GpuEngine) -> float:
    return engine.engine.scrape().one("sglang_rank_out_of_memory_total")


def closes(error: OutOfMemory, memory: dict[str, Any], asked: dict[str, Any]) -> None:
    """The account of the moment, against what torch and CUDA say after it: what failed has changed
    nothing."""
    assert error.memory is not None
    assert error.memory.parts is not None, error.memory.reason
    assert error.memory.reserved == memory["reserved"] == sum(error.memory.parts.values())
    assert error.memory.allocated == memory["allocated"]
    assert error.memory.parts["cached"] == 0  # torch has given it back before it gave up.
    assert (error.free, error.total) == (asked["free"], asked["total"])
    assert error.limit == error.total
    free = [
        block["size"]
        for segment in memory["segments"]
        if tuple(segment["segment_pool_id"]) == (0, 0)
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    assert error.largest_free == max(free, default=0)


def test_an_error_that_somebody_catches(doomed: GpuEngine, record_property: Record) -> None:
    (rank,) = doomed.ranks()
    assert count(doomed) == 0
    address, filled = rank.ask("fill", leave=GIB)
    asked = rank.ask("fail", size=2 * GIB)
    assert len(asked["messages"]) == asked["num_ooms"] == 1
    eventually(lambda: count(doomed) == 1, what="it is counted")
    memory = rank.ask("memory")
    box = black_box(rank)
    (error,) = box.errors
    closes(error, memory, asked)
    assert error.requested == 2 * GIB
    assert asked["allocations"] == 0
    assert error.doing.updates == {}
    # What has the most, by name: the tensor that nobody knows, the pool, the embeddings.
    largest = [(owner.part, owner.nbytes) for owner in error.owners]
    pool = doomed.kv_pool_bytes()
    part, nbytes = largest[0]
    assert part == "other_tensors"
    assert filled <= nbytes < filled + 2 * MIB
    assert error.owners[0].address == address
    assert largest[1] == ("kv_pool", pool)
    weights = [nbytes for part, nbytes in largest if part == "weights"]
    assert weights == sorted(storages(rank.table()).values(), reverse=True)[: len(weights)]
    assert len(largest) == 10
    # Other processes and CUDA's own: what NVML has of this process beside torch, at the least.
    mine = memory["processes"][rank.snapshot.pid]
    assert error.elsewhere is not None
    assert error.elsewhere >= mine - memory["reserved"]
    for name, value in {
        "seconds": error.seconds,
        "elsewhere": error.elsewhere,
        "parts": json.dumps(None if error.memory is None else error.memory.parts),
        "status --last": doomed.engine.exporter_cli("status", "--last").stdout,
    }.items():
        record_property(f"one error: {name}", value)
    assert "  goes on\n" in doomed.engine.exporter_cli("status", "--last").stdout
    assert "CUDA out of memory on cuda:0" in doomed.engine.log()
    # It serves on.
    rank.ask("drain")
    body = {"text": "a b c", "sampling_params": {"max_new_tokens": 2}}
    assert doomed.engine.post("/generate", body)[0] == 200


def test_a_storm_and_many_blocks(doomed: GpuEngine, record_property: Record) -> None:
    (rank,) = doomed.ranks()
    rank.ask("fill", leave=GIB, blocks=20_000)
    first = rank.ask("fail", size=2 * GIB)
    (error,) = black_box(rank).errors
    assert error.memory is not None
    assert error.memory.parts is not None, error.memory.reason
    record_property("20,000 blocks: seconds", error.seconds)
    record_property("20,000 blocks: seconds of the allocation", first["seconds"])
    assert error.seconds < LONGEST_SECONDS
    storm = rank.ask("fail", size=2 * GIB, times=500)
    assert storm["num_ooms"] == 501
    assert storm["allocations"] == 0
    record_property("storm: seconds of each, median", sorted(storm["seconds"])[250])
    record_property("storm: the longest", max(storm["seconds"]))
    assert max(storm["seconds"]) < LONGEST_SECONDS
    eventually(lambda: rank.ask("fail", size=2 * GIB)["num_ooms"] == count(doomed), every=APART)
    box = black_box(rank)
    assert len(box.errors) <= 4
    record_property("bytes of the black box", (rank.directory.path / "black_box").stat().st_size)


def test_a_buffer_that_is_to_receive_weights(doomed: GpuEngine, record_property: Record) -> None:
    (rank,) = doomed.ranks()
    engine, port = doomed.engine, free_port()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(port)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "SGLANG_WEIGHT_EXPORTER_DISABLED": "1"},
    )
    try:
        group = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1}
        group |= {"world_size": 2, "group_name": "trainer", "backend": "gloo"}
        status, answer = engine.post("/init_weights_update_group", group)
        assert (status, answer["success"]) == (200, True), answer
        rank.ask("fill", leave=GIB)
        sessions = engine.post("/begin_weight_update", {})[0] == 200  # 0.5.21 and later.
        body: dict[str, Any] = {"names": ["model.norm.weight"], "group_name": "trainer"}
        body |= {"dtypes": ["bfloat16"], "shapes": [[GIB]]}
        _, answer = engine.post("/update_weights_from_distributed", body)
        assert answer["success"] is False
        assert "out of memory" in answer["message"]
        (error,) = black_box(rank).errors
        assert error.requested == GIB * BFLOAT16
        update = error.doing.updates["target"]
        assert update.source == "distributed"
        assert update.phase == ("receive" if sessions else "load")
        text = engine.exporter_cli("status", "--last").stdout
        record_property("receive buffer: status --last", text)
        assert f"in an update of the target model from distributed ({update.phase})" in text
        if sessions:
            engine.post("/end_weight_update", {})
        eventually(
            lambda: (
                engine.scrape().one("sglang_weight_update_failures_total", source="distributed")
                == 1
            ),
            what="the failure is counted",
        )
        (rank,) = doomed.ranks()
        assert rank.role().last_update.failed_in == update.phase
    finally:
        trainer.kill()
        trainer.wait()


def test_a_prompt_that_ends_the_engine(doomed: GpuEngine, record_property: Record) -> None:
    (rank,) = doomed.ranks()
    engine = doomed.engine
    table = rank.table()
    address, _ = rank.ask("fill", leave=64 * MIB)
    prompt = {"input_ids": [5 + number % 30_000 for number in range(14_000)]}
    # It ends in the middle of its answer.
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        engine.post("/generate", {**prompt, "sampling_params": {"max_new_tokens": 4}})
    engine.main.wait(120)
    runtime_dir = RuntimeDir(engine.runtime_dir)
    eventually(lambda: ended_ranks(runtime_dir), what="what it left")
    (ended,) = ended_ranks(runtime_dir)
    box = ended.box
    assert box is not None
    assert box.crash is not None
    assert box.crash.error == "OutOfMemoryError"
    assert "CUDA out of memory. Tried to allocate" in box.crash.message
    error = box.errors[-1]
    tried = re.search(r"Tried to allocate ([\d.]+) (MiB|GiB)", box.crash.message)
    assert tried is not None
    unit = {"MiB": MIB, "GiB": GIB}[tried[2]]
    assert error.requested / unit == pytest.approx(float(tried[1]), abs=0.01)
    text = engine.exporter_cli("status", "--last").stdout
    record_property("prompt: status --last", text)
    assert "by OutOfMemoryError: CUDA out of memory." in text
    # Whose an address was, now that the process is gone.
    name, (start, nbytes) = next(iter(rows(table).items()))
    found = engine.exporter_cli("table", "--at", hex(start + 1)).stdout
    record_property("prompt: table --at a weight", found)
    assert f"{name}  byte 1 of {nbytes:,}" in found
    assert "which has ended" in found
    pool = next(owner for owner in box.owners if owner.part == "kv_pool")
    found = engine.exporter_cli("table", "--at", hex(pool.address + 7)).stdout
    record_property("prompt: table --at the KV pool", found)
    assert f"{pool.name}  byte 7 of {pool.nbytes:,}, kv_pool" in found
    found = engine.exporter_cli("table", "--at", hex(address)).stdout
    record_property("prompt: table --at a tensor of nobody's", found)
    assert "of no tensor that is known" in found
    assert "it is in none" in engine.exporter_cli("table", "--at", "0x10").stdout
