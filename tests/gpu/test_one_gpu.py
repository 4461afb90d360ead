# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank publishes against what its GPU holds: torch's allocator, NVML, memory itself."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from gpu_engines import (
    LAYERS,
    MIB,
    TOKENS,
    GpuEngine,
    GpuEngines,
    Record,
    grown,
    nvidia_smi,
    rows,
    storages,
)
from waiting import eventually


def in_sglang(checkpoint: Path) -> tuple[int, int]:
    """How many parameters SGLang makes of a checkpoint, and their bytes."""
    fused = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    fused |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    header = tiny_model.safetensors_header(checkpoint)
    names = {".".join(fused.get(part, part) for part in name.split(".")) for name in header}
    return len(names), sum(size for _, size in header.values())


def content(checkpoint: Path, names: set[str]) -> dict[str, str]:
    """Hashes of the tensors of a checkpoint that SGLang stores under their own names."""
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return {
            name: hashlib.sha256(file.get_tensor(name).view(torch_uint8()).numpy()).hexdigest()
            for name in file.keys()  # noqa: SIM118
            if name in names
        }


def torch_uint8() -> Any:
    import torch

    return torch.uint8


def test_weights_are_the_checkpoint(gpu_engine: GpuEngine) -> None:
    tensors, size = in_sglang(gpu_engine.engine.model)
    scrape = gpu_engine.engine.scrape()
    assert scrape.one("sglang_weight_bytes", kind="parameter", dtype="bfloat16") == size
    assert scrape.one("sglang_weight_tensors", kind="parameter", dtype="bfloat16") == tensors
    assert scrape.sum("sglang_weight_bytes", kind="parameter") == size


def test_weights_are_what_torch_allocated(gpu_engine: GpuEngine, record_property: Record) -> None:
    (rank,) = gpu_engine.ranks()
    held = storages(rank.table())
    published = gpu_engine.engine.scrape().sum("sglang_weight_bytes")
    assert published == sum(held.values())
    segments = rank.ask("segments")
    blocks = dict(block for _, _, blocks in segments for block in blocks)
    growth = grown(rank.ask("calls"), "load_model")
    in_blocks = sum(blocks[address] for address in held)
    record_property("published weight bytes", int(published))
    record_property("memory_allocated growth of load_model", growth)
    record_property("blocks of the published storages", in_blocks)
    record_property("storages", len(held))
    assert all(size <= blocks[address] for address, size in held.items())
    # The allocator rounds every tensor up to its block, and nothing else is left of the load.
    assert in_blocks == growth


def test_kv_pool_is_its_configuration(gpu_engine: GpuEngine, record_property: Record) -> None:
    assert gpu_engine.engine.server_info()["max_total_num_tokens"] == TOKENS
    size = gpu_engine.kv_pool_bytes()
    scrape = gpu_engine.engine.scrape()
    assert scrape.one("sglang_kv_pool_bytes", pool="full") == size
    assert scrape.sum("sglang_kv_pool_bytes") == size
    assert scrape.one("sglang_kv_pool_tokens", pool="full") == TOKENS
    growth = grown(gpu_engine.ranks()[0].ask("calls"), "alloc_memory_pool")
    kv, beside = gpu_engine.ranks()[0].ask("kv_blocks")
    record_property("published KV bytes", size)
    record_property("memory_allocated growth of alloc_memory_pool", growth)
    record_property("blocks of keys and values", kv)
    record_property("blocks of the tables of requests and free slots", beside)
    assert kv + beside == growth
    # The allocator keeps what is left of a segment, if it is less than 1 MiB, with its tensor.
    assert size <= kv < size + 2 * LAYERS * MIB


def test_the_gpu_is_nvmls(gpu_engine: GpuEngine) -> None:
    gpu = nvidia_smi()[0]
    scrape = gpu_engine.engine.scrape()
    (rank,) = gpu_engine.ranks()
    assert gpu.uuid.endswith(rank.ask("uuid"))
    for sample in scrape.series("sglang_weight_bytes") + scrape.series("sglang_kv_pool_bytes"):
        assert sample.labels["gpu_uuid"] == gpu.uuid
        assert sample.labels["device"] == "cuda:0"
    (info,) = scrape.series("sglang_weight_info")
    assert info.labels["gpu_name"] == gpu.name
    (engine_info,) = scrape.series("sglang_weight_engine_info")
    assert engine_info.labels["pci_bus_id"] == gpu.pci_bus_id
    assert info.labels["sglang_version"]


def test_gpu_memory_is_nvidia_smis(gpu_engine: GpuEngine, record_property: Record) -> None:
    def same() -> bool:
        scrape = gpu_engine.engine.scrape()
        gpus = [gpu for gpu in nvidia_smi() if gpu.index in gpu_engine.gpus]
        for gpu in gpus:
            used = scrape.one("sglang_gpu_memory_used_bytes", gpu_uuid=gpu.uuid)
            total = scrape.one("sglang_gpu_memory_total_bytes", gpu_uuid=gpu.uuid)
            record_property(f"GPU {gpu.index}: used bytes on the endpoint", int(used))
            record_property(f"GPU {gpu.index}: used MiB of nvidia-smi", gpu.used)
            assert abs(used / MIB - gpu.used) <= 1
            assert abs(total / MIB - gpu.total) <= 1
        return len(scrape.series("sglang_gpu_memory_used_bytes")) == len(gpus)

    assert eventually(same)


def test_published_addresses_are_the_parameters(
    gpu_engine: GpuEngine, record_property: Record
) -> None:
    (rank,) = gpu_engine.ranks()
    published = rows(rank.table())
    held = rank.ask("tensors", draft=False)
    assert published == {name: (address, size) for name, (address, size, _) in held.items()}
    contiguous = {name for name, (_, _, contiguous) in held.items() if contiguous}
    assert contiguous == held.keys()
    assert rank.ask("differing", rows=published, draft=False) == []
    printed = gpu_engine.engine.exporter_cli("table", "--format", "jsonl")
    assert printed.returncode == 0, printed.stderr
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    assert {row["name"]: (int(row["data_ptr"], 16), row["nbytes"]) for row in lines} == published
    assert {row["device"] for row in lines} == {"cuda:0"}
    record_property("tensors read at their published addresses", len(published))


def test_regions_lie_in_torchs_segments(gpu_engine: GpuEngine, record_property: Record) -> None:
    (rank,) = gpu_engine.ranks()
    table = rank.table()
    segments = [(start, start + size) for start, size, _ in rank.ask("segments")]
    # Independently of the package: walk the rows by address, and begin anew at every gap and at
    # every segment's start.
    runs: list[list[int]] = []
    for address, size in sorted(set(rows(table).values())):  # Layers share rotary embeddings.
        begins = (
            not runs or address != runs[-1][1] or any(address == start for start, _ in segments)
        )
        if size and begins:
            runs.append([address, address + size])
        elif size:
            runs[-1][1] = address + size
    regions = zip(array("Q", table.region_ptr), array("Q", table.region_nbytes), strict=True)
    assert sorted((start, start + size) for start, size in regions) == [tuple(run) for run in runs]
    for start, end in runs:
        assert sum(first <= start and end <= last for first, last in segments) == 1
    assert gpu_engine.engine.scrape().one("sglang_weight_regions") == len(runs)
    record_property("tensors", table.rows)
    record_property("regions", len(runs))
    record_property("segments", len(segments))


def test_every_hook_is_in_place_and_none_went_wrong(gpu_engine: GpuEngine) -> None:
    (rank,) = gpu_engine.ranks()
    assert [hook for hook in rank.snapshot.hooks if hook.status == "failed"] == []
    assert rank.snapshot.hook_errors == {}


def test_what_looking_costs(gpu_engine: GpuEngine, record_property: Record) -> None:
    (rank,) = gpu_engine.ranks()
    for name, value in rank.ask("costs").items():
        record_property(name, value)
    seconds = gpu_engine.engine.scrape().one("sglang_weight_exporter_snapshot_seconds")
    record_property("sglang_weight_exporter_snapshot_seconds", seconds)
    assert seconds > 0


def reload(engine: GpuEngine, checkpoint: Path) -> None:
    """Update the weights from disk, and see one update counted and the new bytes in place."""
    before, (rank,) = engine.engine.scrape(), engine.ranks()
    table = rank.table()
    status, answer = engine.engine.update_weights_from_disk(checkpoint)
    assert (status, answer["success"]) == (200, True), answer
    after = engine.engine.scrape()
    for name in ("updates_total", "update_calls_total", "update_duration_seconds_count"):
        series = f"sglang_weight_{name}"
        # Durations come with the first update.
        counted = sum(sample.value for sample in before.series(series))
        assert after.sum(series) == after.one(series, source="disk") == counted + 1
    assert after.sum("sglang_weight_update_failures_total") == 0
    assert after.one("sglang_weight_tensors_moved_total") == 0
    assert after.series("sglang_weight_table_changes_total") == []
    (rank,) = engine.ranks()
    assert rank.table().sha256 == table.sha256
    expected = content(checkpoint, set(rows(table)))
    assert len(expected) > LAYERS
    assert rank.ask("sha256", rows={name: rows(table)[name] for name in expected}) == expected


def test_a_reload_changes_values_and_no_address(
    gpu_engine: GpuEngine, gpu_engines: GpuEngines
) -> None:
    reload(gpu_engine, gpu_engines.checkpoints["b"])
    reload(gpu_engine, gpu_engines.checkpoints["a"])


@pytest.mark.parametrize(
    "tags", [["kv_cache"], ["weights"], ["kv_cache", "weights"], None], ids=str
)
def test_released_memory_is_not_resident(
    gpu_engine: GpuEngine,
    gpu_engines: GpuEngines,
    record_property: Record,
    tags: list[str] | None,
) -> None:
    names = {"weights": "sglang_weight_resident_bytes", "kv_cache": "sglang_kv_pool_resident_bytes"}
    engine, body = gpu_engine.engine, {} if tags is None else {"tags": tags}
    gone = names.keys() if tags is None else set(tags)
    full, (used,) = engine.scrape(), gpu_engine.used()
    resident = {tag: full.one(name) for tag, name in names.items()}
    assert resident["weights"] == full.sum("sglang_weight_bytes")
    assert resident["kv_cache"] == full.sum("sglang_kv_pool_bytes")
    record_property("used MiB before", used)

    assert engine.post("/release_memory_occupation", body)[0] == 200

    def released() -> bool:
        scrape, (now,) = engine.scrape(), gpu_engine.used()
        left = {tag: scrape.one(name) for tag, name in names.items()}
        for tag in names:
            if tag not in gone:
                assert left[tag] == resident[tag], tag
            record_property(f"{tag}: bytes that stay", left[tag])
        # SGLang makes some of the weights outside of the saver's regions (rotary embeddings).
        assert all(left[tag] < 0.05 * resident[tag] for tag in gone)
        freed = sum(resident[tag] - left[tag] for tag in gone) / MIB
        # Addresses stay reserved, and the bytes that belong to them are still published.
        assert scrape.sum("sglang_weight_bytes") == resident["weights"]
        assert scrape.sum("sglang_kv_pool_bytes") == resident["kv_cache"]
        record_property("published as released, MiB", round(freed, 2))
        record_property("used MiB released", now)
        # Whole segments are unmapped: what was cached in them goes too.
        return freed - 4 <= used - now <= 1.1 * freed + 64

    assert eventually(released)
    assert engine.post("/resume_memory_occupation", body)[0] == 200

    def resumed() -> bool:
        scrape, (now,) = engine.scrape(), gpu_engine.used()
        record_property("used MiB resumed", now)
        return {tag: scrape.one(name) for tag, name in names.items()} == resident and abs(
            now - used
        ) <= 64

    assert eventually(resumed)
    if "weights" in gone:  # The memory is back with whatever was in it.
        reload(gpu_engine, gpu_engines.checkpoints["b"])
        reload(gpu_engine, gpu_engines.checkpoints["a"])
