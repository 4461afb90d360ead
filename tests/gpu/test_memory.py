# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The account of a GPU against torch's allocator and NVML, with CUDA graphs on.

Two engines share the GPU, one of them with the memory saver for weights, KV pool and graphs.
"""

from __future__ import annotations

import importlib
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gpu_engines import (
    MIB,
    GpuEngine,
    GpuEngines,
    Rank,
    Record,
    nvidia_smi,
    rows,
    run_on_gpu,
    storages,
)
from waiting import eventually

#: What NVML counts in.
GRANULE = 2 * MIB


@pytest.fixture(params=["graph_engine", "saver_graph_engine"])
def engine(request: pytest.FixtureRequest) -> GpuEngine:
    running: GpuEngine = request.getfixturevalue(request.param)
    return running


def parts_of(engine: GpuEngine) -> dict[str, int]:
    series = engine.engine.scrape().series("sglang_rank_memory_bytes")
    return {sample.labels["part"]: int(sample.value) for sample in series}


def one(engine: GpuEngine, name: str) -> int:
    return int(engine.engine.scrape().one(f"sglang_rank_memory_{name}_bytes"))


def pool_of(segment: dict[str, Any]) -> tuple[int, int]:
    first, second = segment["segment_pool_id"]
    return first, second


def counted_apart(rank: Rank, memory: dict[str, Any]) -> dict[str, int]:
    """The account by another way: a walk over torch's own segments and blocks."""
    graphs = memory["graph_pool"]
    parts = dict.fromkeys(("cuda_graphs", "fragments", "cached", "live blocks"), 0)
    for segment in memory["segments"]:
        live = [block for block in segment["blocks"] if block["state"] != "inactive"]
        in_use = sum(block["size"] for block in live)
        if graphs is not None and pool_of(segment) == tuple(graphs):
            parts["cuda_graphs"] += segment["total_size"]
            continue
        parts["live blocks"] += in_use
        parts["fragments" if live else "cached"] += segment["total_size"] - in_use
    parts["weights"] = sum(storages(rank.table()).values())
    parts["kv_tables"] = rank.ask("tables")
    return parts


def closes(engine: GpuEngine, checkpoint: Path | None, record: Record, moment: str) -> int:
    """The account after a capture, against torch and NVML; what is outside of torch."""
    if checkpoint is not None:
        status, answer = engine.engine.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True), answer
    (rank,) = engine.ranks()
    memory, parts = rank.ask("memory"), parts_of(engine)
    released = one(engine, "released")
    for name in ("allocated", "reserved", "allocated_peak", "reserved_peak"):
        assert one(engine, name) == memory[name], name
    assert sum(parts.values()) == memory["reserved"] - released
    if not released:
        expected = counted_apart(rank, memory)
        free = ("cuda_graphs", "fragments", "cached")
        live = sum(nbytes for name, nbytes in parts.items() if name not in free)
        assert live == expected.pop("live blocks")
        assert {name: parts[name] for name in expected} == expected
        assert parts["kv_pool"] == engine.kv_pool_bytes()
    for name, value in {**parts, "released": released, "reserved": memory["reserved"]}.items():
        record(f"{moment}: {name}", value)
    return outside(engine, rank, memory, record, moment)


def outside(
    engine: GpuEngine, rank: Rank, memory: dict[str, Any], record: Record, moment: str
) -> int:
    process = memory["processes"][rank.snapshot.pid]

    def same() -> int:
        assert one(engine, "process") == process
        return one(engine, "outside_torch")

    found = eventually(same)
    record(f"{moment}: NVML, process", process)
    record(f"{moment}: outside torch", found)
    scrape = engine.engine.scrape()
    uuid = nvidia_smi()[0].uuid
    of_gpu = scrape.series("sglang_gpu_memory_bytes", gpu_uuid=uuid)
    assert sum(sample.value for sample in of_gpu) == scrape.one(
        "sglang_gpu_memory_total_bytes", gpu_uuid=uuid
    )
    for sample in of_gpu:
        record(f"{moment}: GPU, {sample.labels['part']}", int(sample.value))
    return found


def test_the_account_closes_at_every_moment(
    engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    (rank,) = engine.ranks()
    saves = rank.role().weights is not None and "memory-saver" in " ".join(engine.engine.flags)
    for method, reserved, process in rank.ask("moments"):
        record_property(f"{method}: reserved", reserved)
        record_property(f"{method}: NVML, process", process)
    before = closes(engine, None, record_property, "ready")
    assert parts_of(engine)["cuda_graphs"] > 0
    status, _ = engine.engine.post(
        "/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 8}}
    )
    assert status == 200
    generated = closes(engine, gpu_engines.checkpoints["a"], record_property, "generated")
    assert generated >= before  # Kernels are loaded when they are needed first.
    if not saves:
        return
    ready = parts_of(engine)
    for tags, gone in (
        (["kv_cache"], {"kv_pool"}),
        (["weights"], {"weights"}),
        (["cuda_graph"], {"cuda_graphs"}),
        (["kv_cache", "weights", "cuda_graph"], {"kv_pool", "weights", "cuda_graphs"}),
    ):
        name = "+".join(tags)
        assert engine.engine.post("/release_memory_occupation", {"tags": tags})[0] == 200
        assert abs(closes(engine, None, record_property, f"released {name}") - generated) == 0
        left = parts_of(engine)
        # Rotary embeddings and the list of free slots are made outside of the saver's regions.
        assert all(left[part] < 0.05 * ready[part] for part in gone)
        assert one(engine, "after_release") == sum(left.values())
        assert engine.engine.post("/resume_memory_occupation", {"tags": tags})[0] == 200
        checkpoint = gpu_engines.checkpoints["a"] if "weights" in tags else None
        assert closes(engine, checkpoint, record_property, f"resumed {name}") == generated
        assert one(engine, "released") == 0


def test_parts_follow_what_flushes_and_batches_leave_in_what_is_reserved(
    engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    """From the first flush after the start on, lists of free slots are made anew in what was free
    before; nothing that is reserved changes then, and no segment is read."""
    for round_ in range(6):
        if round_ >= 2:
            status, _ = engine.engine.post(
                "/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 1 + round_}}
            )
            assert status == 200
        if round_ % 2:
            assert engine.engine.flush_cache()[0] == 200
        # A request's last tensor may be let go between the capture and what torch is asked.
        checkpoint, moment = gpu_engines.checkpoints["b"], f"round {round_}"
        eventually(partial(closes, engine, checkpoint, record_property, moment))


def test_reserved_memory_grows_with_a_loader_that_leaks_and_with_no_other(
    graph_engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    (rank,) = graph_engine.ranks()
    checkpoint = gpu_engines.checkpoints["a"]

    def reserved() -> int:
        status, answer = graph_engine.engine.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True), answer
        return one(graph_engine, "reserved")

    in_place = [reserved() for _ in range(50)]
    rank.ask("leak", size=24 * MIB)
    leaking = [reserved() for _ in range(50)]
    rank.ask("leak", size=0)
    record_property("reserved after each update in place", json.dumps(in_place))
    record_property("reserved after each update that leaks", json.dumps(leaking))
    assert len(set(in_place[1:])) == 1
    assert leaking[-1] - in_place[-1] >= 49 * 24 * MIB
    assert one(graph_engine, "update_growth") in {24 * MIB, 0}


def test_what_an_account_costs(graph_engine: GpuEngine, record_property: Record) -> None:
    (rank,) = graph_engine.ranks()
    for name, value in rank.ask("costs").items():
        record_property(name, value)


def test_every_weight_block_of_a_snapshot_has_its_name(
    graph_engine: GpuEngine, tmp_path: Path, record_property: Record
) -> None:
    (rank,) = graph_engine.ranks()
    cli = graph_engine.engine.exporter_cli
    assert cli("snapshot", "--ask").returncode == 0
    assert graph_engine.engine.flush_cache()[0] == 200
    taken = eventually(
        lambda: cli("snapshot", "--output", str(tmp_path)).returncode == 0, every=1.0
    )
    assert taken
    (viewer,) = tmp_path.glob("*.pickle")
    content = pickle.loads(viewer.read_bytes())
    named: dict[int, dict[str, Any]] = {}
    for segment in content["segments"]:
        for block in segment["blocks"]:
            named[block["address"]] = block
    held = storages(rank.table())
    expected: dict[int, str] = {}
    for name, (address, _) in rows(rank.table()).items():
        expected.setdefault(address, f"{name} (target)")
    assert {address: named[address]["name"] for address in held} == {
        address: expected[address] for address in held
    }
    by_part: dict[str, int] = {}
    for block in named.values():
        part = block.get("part", "free")
        by_part[part] = by_part.get(part, 0) + block["size"]
    record_property("bytes of named blocks", json.dumps(by_part))
    record_property("size of the viewer's file", viewer.stat().st_size)
    assert by_part["cuda_graphs"] == parts_of(graph_engine)["cuda_graphs"]
    segsum: Any = importlib.import_module("torch.cuda._memory_viz").segsum
    assert "segments" in segsum(content)


STEPS = """
import json, os, sys, time
import pynvml, torch
from sglang_weight_exporter.capture.account import OwnedStorages, account
from sglang_weight_exporter.capture.allocations import Segments
import numpy as np

pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
found = []

def process():
    torch.cuda.synchronize()
    for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if each.pid == os.getpid():
            return each.usedGpuMemory
    return 0

def step(name, known=()):
    segments = torch.cuda.memory_snapshot()
    parts = account(Segments.of_snapshot(segments), known, device=0).parts
    reserved = torch.cuda.memory_reserved()
    assert sum(parts.values()) == reserved, (name, parts, reserved)
    found.append((name, process() - reserved, reserved, parts))

torch.cuda.init()
torch.cuda.current_stream().synchronize()
torch.empty(0, device="cuda")
step("context")
sizes = (3000, 1 << 20, 50 << 20)
weights = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
known = [OwnedStorages("weights", np.array([t.data_ptr() for t in weights], dtype=np.uint64),
               np.array([t.nbytes for t in weights], dtype=np.uint64))]
step("tensors", known)
x = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
(x + 1).sum()
step("elementwise kernels", known)
x @ x
step("cuBLAS", known)
if "expandable" not in sys.argv[1]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x @ x).relu()
        z = y + 1
    step("CUDA graph", known)
    found[-1][3]["pool"] = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    torch.distributed.all_reduce(x)
    step("NCCL", known)
print(json.dumps(found))
"""


@pytest.mark.parametrize("configuration", ["", "expandable_segments:True"])
def test_what_is_outside_of_torch_comes_step_by_step(
    tmp_path: Path, configuration: str, record_property: Record
) -> None:
    """Context, kernels, cuBLAS, a graph and a communicator are added to it one by one."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    printed = run_on_gpu(script, configuration, PYTORCH_CUDA_ALLOC_CONF=configuration)
    steps = json.loads(printed.splitlines()[-1])
    by_name = {name: (outside, parts) for name, outside, _, parts in steps}
    for name, outside, reserved, parts in steps:
        record_property(f"{name}: outside torch", outside)
        record_property(f"{name}: reserved", reserved)
        record_property(f"{name}: parts", json.dumps(parts))
    assert by_name["tensors"][0] == by_name["context"][0]
    assert by_name["tensors"][1]["weights"] == 3000 + (1 << 20) + (50 << 20)
    order = [outside for _, outside, _, _ in steps]
    assert order == sorted(order)
    assert order[-1] > order[0] > 100 * MIB
    if not configuration:
        parts = by_name["CUDA graph"][1]
        assert parts["cuda_graphs"] == parts["pool"] > 0
