# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA adapters that are loaded, fail to load, are asked for and are unloaded."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from gpu_engines import GpuEngine, GpuEngines, Record
from zoo_models import write_adapter

ADAPTERS, PROJECTIONS = 20, ("q_proj", "v_proj")


class Trainer:
    """Whoever loads adapters: what it was answered, and how long that took."""

    def __init__(self, running: GpuEngine, directory: Path) -> None:
        self.engine, self.directory = running.engine, directory
        self.seconds: list[float] = []

    def load(self, name: str) -> bool:
        started = time.perf_counter()
        body = {"lora_name": name, "lora_path": str(self.directory / name)}
        loaded = self._success("/load_lora_adapter", body)
        self.seconds.append(time.perf_counter() - started)
        return loaded

    def unload(self, name: str) -> bool:
        return self._success("/unload_lora_adapter", {"lora_name": name})

    def generate(self, name: str) -> None:
        parameters = {"max_new_tokens": 2, "ignore_eos": True}
        body = {"input_ids": [5, 6, 7], "lora_path": name, "sampling_params": parameters}
        status, answer = self.engine.post("/generate", body)
        assert status == 200, answer

    def _success(self, path: str, body: dict[str, Any]) -> bool:
        return bool(self.engine.post(path, body)[1]["success"])


def held(adapter: Path) -> int:
    """What its file has, and as much again as its values' for the keys that are missing
    (``LoRAAdapter.normalize_qkv_proj``)."""
    header = tiny_model.safetensors_header(adapter, "adapter_model.safetensors")
    values = sum(size for name, (_, size) in header.items() if ".v_proj." in name)
    return sum(size for _, size in header.values()) + values


def named(running: GpuEngine) -> dict[str, tuple[int, int | None]]:
    """As the probe says it."""
    (rank,) = running.ranks()
    return {each.name: (each.nbytes, each.slot) for each in rank.role().adapters.named}


@pytest.fixture
def trainer(lora_engine: GpuEngine, gpu_engines: GpuEngines, tmp_path: Path) -> Trainer:
    for number in range(ADAPTERS):
        write_adapter(
            gpu_engines.checkpoints["a"], tmp_path / f"step-{number}", PROJECTIONS, rank=16
        )
    write_adapter(gpu_engines.checkpoints["a"], tmp_path / "too large", PROJECTIONS, rank=64)
    return Trainer(lora_engine, tmp_path)


def test_twenty_adapters_come_fail_are_asked_for_and_go(
    lora_engine: GpuEngine, trainer: Trainer, record_property: Record
) -> None:
    before = lora_engine.engine.scrape()
    names = [f"step-{number}" for number in range(ADAPTERS)]
    size = held(trainer.directory / names[0])
    for number, name in enumerate(names, start=1):
        assert trainer.load(name)
        scrape = lora_engine.engine.scrape()
        assert scrape.one("sglang_lora_adapters") == number
        assert scrape.one("sglang_lora_adapter_changes_total") == number
        assert scrape.one("sglang_lora_adapter_bytes") == number * size
    assert scrape.one("sglang_lora_adapter_failures_total") == 0
    (rank,) = lora_engine.ranks()
    assert named(lora_engine) == rank.ask("adapters") == dict.fromkeys(names, (size, None))
    contents = {each.fingerprint for each in rank.role().adapters.named}
    assert len(contents) == ADAPTERS
    assert "" not in contents
    # What fails leaves what was there.
    for name in ("too large", "nowhere"):
        assert not trainer.load(name)
    scrape = lora_engine.engine.scrape()
    assert scrape.one("sglang_lora_adapter_failures_total") == 2
    assert scrape.one("sglang_lora_adapters") == ADAPTERS
    # Requests move adapters into slots; the next thing that the rank writes says which.
    for name in ("step-3", "step-7", "step-11", "step-15"):
        trainer.generate(name)
    assert trainer.unload("step-0")
    (rank,) = lora_engine.ranks()
    slots = rank.ask("adapters")
    assert named(lora_engine) == slots
    assert {name for name, (_, slot) in slots.items() if slot is not None} <= {
        *("step-3", "step-7", "step-11", "step-15")
    }
    assert sum(slot is not None for _, slot in slots.values()) >= 1
    for name in names[1:]:
        assert trainer.unload(name)
    scrape = lora_engine.engine.scrape()
    assert scrape.one("sglang_lora_adapters") == scrape.one("sglang_lora_adapter_bytes") == 0
    assert scrape.one("sglang_lora_adapter_changes_total") == 2 * ADAPTERS
    # They are no weights, and slots do not grow.
    for name in ("sglang_weight_fingerprint", "sglang_lora_pool_bytes"):
        assert scrape.one(name) == before.one(name)
    assert scrape.sum("sglang_weight_tensors_altered_total") == 0
    assert scrape.sum("sglang_weight_exporter_hook_errors_total") == 0
    record_property("bytes of an adapter in the host's memory", size)
    record_property("seconds of a load, median", round(statistics.median(trainer.seconds), 4))
    snapshot = scrape.one("sglang_weight_exporter_snapshot_seconds")
    record_property("seconds of the capture after the last unload", round(snapshot, 4))
