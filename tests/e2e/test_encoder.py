# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real encoder server: a vision tower without a model runner, on two data-parallel ranks, with
OTLP configured in the environment that it is started in."""

from __future__ import annotations

import time

import psutil
import pytest
import tiny_model
from collectors import Backend, attributes_of
from engines import Engine
from waiting import eventually

from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


def test_an_encoder_s_weights_are_its_checkpoint_s(encoder: Engine) -> None:
    scrape = eventually(encoder.scrape, what="the exporter answers")
    header = tiny_model.safetensors_header(encoder.model)
    labels = {"role": "encoder", "engine": str(encoder.port)}
    loaded = scrape.series("sglang_weight_loaded_timestamp_seconds", **labels)
    assert {sample.labels["dp_rank"] for sample in loaded} == {"0", "1"}
    started = psutil.Process(encoder.main.pid).create_time()
    assert all(started < sample.value <= time.time() for sample in loaded)
    for rank in ("0", "1"):
        found = scrape.one("sglang_weight_bytes", kind="parameter", dp_rank=rank, **labels)
        assert found == sum(nbytes for _, nbytes in header.values())
        tensors = scrape.one("sglang_weight_tensors", kind="parameter", dp_rank=rank, **labels)
        assert tensors == len(header) - 2 * tiny_model.VISION_LAYERS  # gate and up are fused, twice
    assert scrape.series("sglang_kv_pool_bytes") == []
    assert scrape.series("sglang_weight_exporter_hooks", state="failed") == []


def test_both_ranks_are_one_engine_that_says_what_it_loaded(encoder: Engine) -> None:
    ranks = SnapshotReader(RuntimeDir.open(encoder.runtime_dir, {})).read()
    assert len(ranks) == 2
    assert len({snapshot.engine.instance for _, snapshot in ranks}) == 1
    for _, snapshot in ranks:
        (role,) = snapshot.roles
        assert role.architecture == "Qwen2_5_VLForConditionalGeneration"
        assert role.model_path == str(encoder.model)
        load = role.last_update
        assert load is not None
        assert (load.action, load.succeeded) == ("load", True)
        assert load.ended_at > load.started_at
        assert role.load_seconds == pytest.approx(load.ended_at - load.started_at)


def test_a_collector_that_comes_late_gets_the_loads_of_both_ranks(encoder: Engine) -> None:
    backend = Backend()
    backend.http_port = encoder.otlp_port
    backend.start()
    try:
        eventually(lambda: len(backend.spans("sglang.weights.load")) >= 2, what="two loads")
        found = backend.spans_with_resource()
    finally:
        backend.stop()
    assert {resource["service.name"] for _, resource in found} == {"encoders"}
    assert {attributes_of(span)["sglang.weights.dp_rank"] for span, _ in found} == {0, 1}
    assert len({span.trace_id for span, _ in found}) == 1
    (table,) = {attributes_of(span)["sglang.weights.tensors"] for span, _ in found}
    scrape = encoder.scrape()
    assert table == scrape.sum("sglang_weight_tensors", role="encoder", dp_rank="0")
