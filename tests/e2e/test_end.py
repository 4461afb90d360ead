# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real scheduler that dies by an exception in the middle of an update, and what is known of it
when its process is gone and another exporter has started."""

from __future__ import annotations

import base64
import contextlib
import http.client
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import tiny_model
import torch
from collectors import Backend, attributes_of
from engines import Engine
from ranks import ExporterProcess
from waiting import eventually

from sglang_weight_exporter.store.ended import ended_ranks
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

NORM = "model.norm.weight"


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.mark.ends_engine
def test_an_exception_that_ends_a_scheduler_is_known_after_it(
    traced_engine: Engine, backend: Backend
) -> None:
    """Two data-parallel ranks, of which SGLang kills what the first exception has not ended; nobody
    exports until they are gone."""
    engine = traced_engine
    table = engine.exporter_cli("table", "--filter", NORM, "--rank", "tp=0,dp=0")
    address = next(word for word in table.stdout.split() if word.startswith("0x"))
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensor = torch.full((tiny_model.HIDDEN,), 2.0, dtype=torch.bfloat16)
    good = base64.b64encode(bytes(ForkingPickler.dumps([(NORM, tensor)]))).decode()
    for path, body in (
        ("/begin_weight_update", {}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": [good]}),
    ):
        status, answer = engine.post(path, body)
        assert (status, answer["success"]) == (200, True), answer
    # SGLang reads this outside of what it catches.
    bad = base64.b64encode(b"no pickle").decode()
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        engine.post("/update_weights_from_tensor", {"serialized_named_tensors": [bad]})
    engine.main.wait()
    runtime_dir = RuntimeDir(engine.runtime_dir)
    eventually(lambda: not engine.schedulers(), what="the schedulers are gone")
    crashed = [
        ended
        for ended in ended_ranks(runtime_dir)
        if ended.box is not None and ended.box.crash is not None
    ]
    assert crashed
    assert "Scheduler hit an exception" in engine.log()
    said = engine.exporter_cli("status", "--last").stdout
    assert "by UnpicklingError: " in said
    assert "deserialize_own_rank" in said
    assert "update    of the target model from tensor failed" in said
    ours = engine.exporter_cli("table", "--at", hex(int(address, 16) + 1), "--rank", "tp=0,dp=0")
    assert f"{NORM}  byte 1 of {2 * tiny_model.HIDDEN}" in ours.stdout
    assert "which has ended" in ours.stdout

    backend.start()
    exporter = ExporterProcess(
        engine.runtime_dir,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
    ).start()
    try:
        ends = eventually(lambda: backend.spans("sglang.rank.crash"), what="the span of the end")
        assert attributes_of(ends[0])["exception.type"] == "UnpicklingError"
        failed = eventually(
            lambda: [
                span
                for span in backend.spans("sglang.weights.update")
                if not attributes_of(span)["sglang.weights.succeeded"]
            ],
            what="the span of the update",
        )
        assert len(failed) == len(ends) == len(crashed)
        ranks = runtime_dir.ranks
        eventually(lambda: not list(Path(ranks).iterdir()), what="they are put away")
    finally:
        exporter.end(signal.SIGTERM)
        backend.stop()
    assert exporter.log().count("UnpicklingError") == len(crashed)
    assert "by UnpicklingError: " in engine.exporter_cli("status", "--last").stdout
