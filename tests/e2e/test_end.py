# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real scheduler that dies by an exception in the middle of an update, and what is known of it
when its process is gone."""

from __future__ import annotations

import base64
import contextlib
import http.client
from multiprocessing.reduction import ForkingPickler

import pytest
import tiny_model
import torch
from engines import Engine
from waiting import eventually

from sglang_weight_exporter.store.ended import ended_ranks
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

NORM = "model.norm.weight"


@pytest.mark.ends_engine
def test_an_exception_that_ends_a_scheduler_is_known_after_it(speculative: Engine) -> None:
    engine = speculative
    table = engine.exporter_cli("table", "--filter", NORM, "--role", "target").stdout
    address = int(next(word for word in table.split() if word.startswith("0x")), 16)
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensor = torch.full((tiny_model.HIDDEN,), 2.0, dtype=torch.bfloat16)
    good = base64.b64encode(bytes(ForkingPickler.dumps([(NORM, tensor)]))).decode()

    def body(serialized: str) -> dict[str, object]:
        return {"serialized_named_tensors": [serialized], "selector": "target"}

    for path, asked in (
        ("/begin_weight_update", {"selector": "target"}),
        ("/update_weights_from_tensor", body(good)),
    ):
        status, answer = engine.post(path, asked)
        assert (status, answer["success"]) == (200, True), answer
    # SGLang reads this outside of what it catches, and answers nobody any more.
    bad = base64.b64encode(b"no pickle").decode()
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        engine.post("/update_weights_from_tensor", body(bad))
    engine.main.wait()
    eventually(lambda: not engine.schedulers(), what="the scheduler is gone")
    assert "Scheduler hit an exception" in engine.log()
    runtime_dir = RuntimeDir(engine.runtime_dir)
    eventually(lambda: not list(runtime_dir.ranks.iterdir()), what="it is put away")
    (ended,) = ended_ranks(runtime_dir)
    assert ended.box is not None
    crash = ended.box.crash
    assert crash is not None
    assert crash.error == "UnpicklingError"
    assert any("deserialize" in frame for frame in crash.where)
    said = engine.exporter_cli("status", "--last").stdout
    assert f"by UnpicklingError: {crash.message}" in said
    assert "update    of the target model from tensor failed" in said
    assert f"weights undefined: {crash.message}" in said
    assert "of the draft model" not in said
    ours = engine.exporter_cli("table", "--at", hex(address + 1)).stdout
    assert f"{NORM}  byte 1 of {2 * tiny_model.HIDDEN}" in ours
    assert "which has ended" in ours
