# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that SGLang keeps in the host's memory, and adapter slots beside the weights."""

from __future__ import annotations

import tiny_model
from gpu_engines import GpuEngine, GpuEngines, Record, grown, nvidia_smi, rows, storages


def test_offloaded_weights_are_published_where_they_are(
    offload_engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    header = tiny_model.safetensors_header(offload_engine.engine.model)
    # One gibibyte is more than all layers have; embeddings and the last norm are in none.
    offloaded = sum(size for name, (_, size) in header.items() if ".layers." in name)
    rest = sum(size for _, size in header.values()) - offloaded

    def placed() -> None:
        scrape = offload_engine.engine.scrape()
        parameters = {"kind": "parameter", "dtype": "bfloat16"}
        assert scrape.one("sglang_weight_bytes", device="cpu", **parameters) == offloaded
        assert scrape.one("sglang_weight_bytes", device="cuda:0", **parameters) == rest
        for device, uuid in (("cpu", ""), ("cuda:0", nvidia_smi()[0].uuid)):
            published = scrape.sum("sglang_weight_bytes", device=device, gpu_uuid=uuid)
            record_property(f"weight bytes on {device}", int(published))
            assert scrape.one("sglang_weight_resident_bytes", device=device) == published

    placed()
    (rank,) = offload_engine.ranks()
    blocks = dict(block for _, _, blocks in rank.ask("segments") for block in blocks)
    held = [address for address in storages(rank.table()) if address in blocks]
    assert sum(blocks[address] for address in held) == grown(rank.ask("calls"), "load_model")
    status, answer = offload_engine.engine.update_weights_from_disk(gpu_engines.checkpoints["b"])
    assert (status, answer["success"]) == (200, True), answer
    placed()
    (rank,) = offload_engine.ranks()
    held_now = {name: row[:2] for name, row in rank.ask("tensors", draft=False).items()}
    assert rows(rank.table()) == held_now
    scrape = offload_engine.engine.scrape()
    record_property("moved by a reload", scrape.one("sglang_weight_tensors_moved_total"))


def test_adapter_slots_are_no_weights(lora_engine: GpuEngine, record_property: Record) -> None:
    scrape, (rank,) = lora_engine.engine.scrape(), lora_engine.ranks()
    header = tiny_model.safetensors_header(lora_engine.engine.model)
    size = sum(size for _, size in header.values())
    # A wrapped layer has its weight under two names, and the bytes are there once.
    assert scrape.sum("sglang_weight_bytes", kind="parameter") == size
    names = rows(rank.table())
    assert {"base_layer" in name for name in names} == {True, False}
    assert rank.ask("differing", rows=names, draft=False) == []
    slots = scrape.one("sglang_lora_pool_bytes")
    growth = grown(rank.ask("calls"), "init_lora_manager")
    record_property("published bytes of adapter slots", int(slots))
    record_property("memory_allocated growth of init_lora_manager", growth)
    record_property("tensors", len(names))
    assert scrape.one("sglang_lora_adapters") == 0
    assert 0 < slots <= growth
