# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of engines on GPUs: reloads, memory that is released, tensor parallelism."""

from __future__ import annotations

import pytest
from engines import Engine, Scrape, http_get
from gpu_engines import GpuEngine, GpuEngines, Record
from waiting import eventually

FINGERPRINT = "sglang_weight_fingerprint"


@pytest.fixture(params=["fingerprint_engine", "two_gpu_fingerprint_engine"])
def served(request: pytest.FixtureRequest) -> GpuEngine:
    engine: GpuEngine = request.getfixturevalue(request.param)
    return engine


def numbers(scrape: Scrape) -> dict[str, float]:
    """By tensor-parallel rank."""
    return {sample.labels["tp_rank"]: sample.value for sample in scrape.series(FINGERPRINT)}


def loads(scrape: Scrape) -> float:
    return scrape.sum("sglang_weight_updates_total", source="disk")


def verify(engine: Engine, *arguments: str) -> tuple[int, str]:
    done = engine.exporter_cli("verify", *arguments)
    return done.returncode, done.stdout + done.stderr


def reload(served: GpuEngine, gpu_engines: GpuEngines, name: str) -> dict[str, float]:
    engine = served.engine
    before = loads(engine.scrape())
    assert engine.update_weights_from_disk(gpu_engines.checkpoints[name])[0] == 200

    def counted() -> Scrape:
        scrape = engine.scrape()
        assert loads(scrape) == before + len(served.gpus)
        return scrape

    found = numbers(eventually(counted))
    assert len(found) == len(served.gpus)
    return found


def test_each_rank_holds_its_share_of_the_checkpoint(
    served: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    status, text = verify(served.engine, "--checkpoint", str(gpu_engines.checkpoints["a"]))
    assert status == 0, text
    assert text.count(" 0 different") == len(served.gpus), text
    status, text = verify(served.engine, "--checkpoint", str(gpu_engines.checkpoints["b"]))
    # Different where the zoo has confirmed this release's loader on this GPU.
    assert status == 1 or (status == 2 and "is confirmed by nothing" in text), text
    for sample in served.engine.scrape().series("sglang_weight_fingerprint_seconds"):
        record_property(f"fingerprint seconds, rank {sample.labels['tp_rank']}", sample.value)


def test_reloads_of_the_same_and_of_another_checkpoint(
    served: GpuEngine, gpu_engines: GpuEngines
) -> None:
    first = reload(served, gpu_engines, "a")
    assert reload(served, gpu_engines, "a") == first
    other = reload(served, gpu_engines, "b")
    assert all(other[rank] != first[rank] for rank in first)
    assert verify(served.engine, "--checkpoint", str(gpu_engines.checkpoints["b"]))[0] == 0
    assert reload(served, gpu_engines, "a") == first


def test_released_weights_have_no_fingerprint_and_the_engine_lives(
    served: GpuEngine, gpu_engines: GpuEngines
) -> None:
    """A kernel that read an unmapped page would end the engine."""
    engine = served.engine
    before = reload(served, gpu_engines, "a")
    for _ in range(3):
        assert engine.post("/release_memory_occupation", {})[0] == 200
        assert eventually(lambda: not numbers(engine.scrape()))
        assert verify(engine)[0] == 2  # It asks the engine to read its weights, and none are.
        assert engine.post("/resume_memory_occupation", {})[0] == 200
        assert eventually(lambda: len(numbers(engine.scrape())) == len(served.gpus))
        assert reload(served, gpu_engines, "a") == before
    assert http_get(engine.url + "/health")[0] == 200
    assert engine.scrape().sum("sglang_weight_exporter_hook_errors_total") == 0
