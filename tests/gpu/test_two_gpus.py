# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over two GPUs: each rank publishes its own half, on one endpoint."""

from __future__ import annotations

import tiny_model
from engines import Scrape
from gpu_engines import (
    MIB,
    GpuEngine,
    GpuEngines,
    Record,
    grown,
    nvidia_smi,
    rows,
    storages,
)
from waiting import eventually


def when_all_are_loaded(engine: GpuEngine) -> Scrape:
    """Rank 1 may still load when rank 0 answers requests."""
    found = engine.engine.scrape()

    def both() -> bool:
        nonlocal found
        found = engine.engine.scrape()
        series = found.series("sglang_kv_pool_resident_bytes")
        loaded = found.series("sglang_weight_loaded_timestamp_seconds")
        return len(series) == len(loaded) == 2

    assert eventually(both)
    return found


def test_each_rank_publishes_its_half_on_its_gpu(
    two_gpu_engine: GpuEngine, record_property: Record
) -> None:
    header = tiny_model.safetensors_header(two_gpu_engine.engine.model)
    # Norms are on both, everything else is split.
    half = sum(size if "norm" in name else size // 2 for name, (_, size) in header.items())
    scrape, ranks = when_all_are_loaded(two_gpu_engine), two_gpu_engine.ranks()
    gpus = nvidia_smi()
    pool = two_gpu_engine.kv_pool_bytes()
    assert [rank.snapshot.ranks.tp for rank in ranks] == [0, 1]
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    for gpu, rank in zip(gpus, ranks, strict=False):
        labels = {"tp_rank": str(gpu.index), "gpu_uuid": gpu.uuid, "device": f"cuda:{gpu.index}"}
        assert scrape.sum("sglang_weight_bytes", kind="parameter", **labels) == half
        published = scrape.sum("sglang_weight_bytes", **labels)
        held = storages(rank.table())
        assert published == sum(held.values())
        blocks = dict(block for _, _, blocks in rank.ask("segments") for block in blocks)
        growth = grown(rank.ask("calls"), "load_model")
        record_property(f"rank {gpu.index}: published weight bytes", int(published))
        record_property(f"rank {gpu.index}: memory_allocated growth of load_model", growth)
        assert sum(blocks[address] for address in held) == growth
        assert scrape.sum("sglang_kv_pool_bytes", **labels) == pool // 2
        assert rank.ask("differing", rows=rows(rank.table()), draft=False) == []
    assert len(scrape.series("sglang_weight_resident_bytes")) == 2
    assert len({sample.labels["engine"] for sample in scrape.series("sglang_weight_bytes")}) == 1


def test_an_update_is_one_on_every_rank(two_gpu_engine: GpuEngine, gpu_engines: GpuEngines) -> None:
    status, answer = two_gpu_engine.engine.update_weights_from_disk(gpu_engines.checkpoints["b"])
    assert (status, answer["success"]) == (200, True), answer
    # Rank 0 answers for both, and rank 1 may still write what it counts.
    counted = "sglang_weight_updates_total"
    assert eventually(lambda: two_gpu_engine.engine.scrape().sum(counted) == 2)
    scrape, ranks = two_gpu_engine.engine.scrape(), two_gpu_engine.ranks()
    for rank in ("0", "1"):
        assert scrape.one("sglang_weight_updates_total", tp_rank=rank, source="disk") == 1
        assert scrape.sum("sglang_weight_updates_total", tp_rank=rank) == 1
        assert scrape.one("sglang_weight_tensors_moved_total", tp_rank=rank) == 0
    assert len({rank.role().last_update.trace_id for rank in ranks}) == 1


def test_both_gpus_give_their_memory_back(
    two_gpu_engine: GpuEngine, record_property: Record
) -> None:
    engine = two_gpu_engine.engine
    scrape, before = engine.scrape(), two_gpu_engine.used()
    assert engine.post("/release_memory_occupation", {})[0] == 200
    after = two_gpu_engine.used()
    for rank, (used, now) in enumerate(zip(before, after, strict=True)):
        resident = sum(
            scrape.one(f"sglang_{name}_resident_bytes", tp_rank=str(rank))
            for name in ("weight", "kv_pool")
        )
        record_property(f"rank {rank}: published as released, MiB", round(resident / MIB, 2))
        record_property(f"rank {rank}: used MiB before and after", f"{used}, {now}")
        assert resident / MIB - 4 <= used - now <= 1.1 * resident / MIB + 64
        for name in ("weight", "kv_pool"):
            series = f"sglang_{name}_resident_bytes"
            left = engine.scrape().one(series, tp_rank=str(rank))
            assert left < 0.05 * scrape.one(series, tp_rank=str(rank))
    assert engine.post("/resume_memory_occupation", {})[0] == 200
    assert engine.scrape().sum("sglang_weight_resident_bytes") == scrape.sum("sglang_weight_bytes")
