# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own gauges beside what is published, of one engine at the same moments.

The README compares them; these tests hold it to that, and record the figures.
"""

from __future__ import annotations

from pathlib import Path

import tiny_model
from engines import Engine, Scrape
from gpu_engines import GpuEngine, GpuEngines, Record
from waiting import eventually

GIB = 2**30


def theirs(engine: Engine, name: str, **labels: str) -> float:
    """SGLang's gauge on its own endpoint, which joins its processes' files and may come late."""

    def read() -> list[float]:
        scrape = Scrape.of(engine.url + "/metrics", timeout=60)
        return [sample.value for sample in scrape.series(f"sglang:{name}", **labels)]

    (value,) = eventually(read, what=name)
    return float(value)


def moment(engine: Engine, name: str, record: Record) -> tuple[float, float]:
    """GiB of SGLang's gauge, and the resident bytes that are published."""
    gauge = theirs(engine, "weight_memory_usage_gb")
    resident = engine.scrape().sum("sglang_weight_resident_bytes")
    record(f"{name}: weight_memory_usage_gb", gauge)
    record(f"{name}: the same in bytes", int(gauge * GIB))
    record(f"{name}: sglang_weight_resident_bytes", int(resident))
    return gauge, resident


def test_their_weights_are_a_figure_of_the_start(
    gpu_engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    engine = gpu_engine.engine
    before, held = moment(engine, "loaded", record_property)
    status, answer = engine.update_weights_from_disk(gpu_engines.checkpoints["b"])
    assert (status, answer["success"]) == (200, True), answer
    updates = engine.scrape().one("sglang_weight_updates_total", source="disk", role="target")
    assert updates >= 1
    assert moment(engine, "reloaded", record_property) == (before, held)
    assert theirs(engine, "weight_load_duration_seconds", source="disk") > 0
    failures = engine.scrape().one("sglang_weight_update_failures_total", source="disk")
    engine.update_weights_from_disk(Path("/nowhere/at/all"))
    eventually(
        lambda: (
            engine.scrape().one("sglang_weight_update_failures_total", source="disk")
            == failures + 1
        )
    )
    assert moment(engine, "failed", record_property) == (before, held)
    record_property(
        "failed: weight_load_duration_seconds",
        theirs(engine, "weight_load_duration_seconds", source="disk"),
    )
    tags = {"tags": ["weights"]}
    status, answer = engine.post("/release_memory_occupation", tags)
    assert status == 200, answer
    try:
        # Rotary embeddings lie outside of the saver's regions.
        eventually(lambda: engine.scrape().sum("sglang_weight_resident_bytes") < held / 20)
        gauge, _ = moment(engine, "released", record_property)
        assert gauge == before
    finally:
        status, answer = engine.post("/resume_memory_occupation", tags)
        assert status == 200, answer
    # What was released came back without its content.
    engine.update_weights_from_disk(engine.model)
    assert moment(engine, "resumed", record_property) == (before, held)


def test_a_draft_is_a_role_here(
    standalone_engine: GpuEngine, gpu_engines: GpuEngines, record_property: Record
) -> None:
    engine = standalone_engine.engine
    header = tiny_model.safetensors_header(gpu_engines.checkpoints["draft"])
    draft = sum(size for _, size in header.values())
    scrape = engine.scrape()
    assert scrape.sum("sglang_weight_bytes", role="draft") == draft
    record_property("sglang_weight_bytes of the draft", draft)
    target = scrape.sum("sglang_weight_bytes", role="target")
    record_property("sglang_weight_bytes of the target", int(target))
    # Nothing is said of its size: it counts what other engines take meanwhile. For a figure of the
    # target alone run this test by itself.
    gauge = theirs(engine, "weight_memory_usage_gb")
    record_property("weight_memory_usage_gb in bytes", int(gauge * GIB))
