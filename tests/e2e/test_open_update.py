# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``verify`` says of a real engine that is asked in the middle of an update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from engines import Engine
from serialized import serialized

from sglang_weight_exporter import fingerprint

NORM = "model.norm.weight"


def post(engine: Engine, path: str, **body: Any) -> None:
    status, answer = engine.post(path, body)
    assert (status, answer["success"]) == (200, True), answer


def verify(engine: Engine, *arguments: str) -> tuple[int, str]:
    done = engine.exporter_cli("verify", "--checkpoint", str(engine.model), *arguments)
    return done.returncode, done.stdout + done.stderr


def test_a_session_is_awaited_and_then_said(engine: Engine) -> None:
    assert engine.update_weights_from_disk(engine.model)[0] == 200
    post(engine, "/begin_weight_update")
    try:
        status, text = verify(engine, "--wait", "0.5")
    finally:
        post(engine, "/end_weight_update")
    assert status == 2, text
    assert f"An update of engine {engine.port}, " in text
    assert "did not end in the 0.5 s that this waited" in text
    status, text = verify(engine)
    assert status == 0, text


@pytest.mark.release("oldest")
def test_buckets_of_which_none_asks_for_a_flush_are_over_ten_seconds_later(
    old_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    """slime's pattern. Whoever asks then learns what is in memory."""
    assert old_engine.update_weights_from_disk(checkpoints[0])[0] == 200
    for value in (2.0, 3.0):
        tensor = torch.full((tiny_model.HIDDEN,), value, dtype=torch.bfloat16)
        body = {"serialized_named_tensors": [serialized(NORM, tensor)], "flush_cache": False}
        post(old_engine, "/update_weights_from_tensor", **body)
    assert old_engine.scrape().one("sglang_weight_update_in_progress") == 1
    status, text = verify(old_engine)
    assert status == 0, text
    assert "changed without an update" not in text
    done = old_engine.exporter_cli("table", "--fingerprints")
    sent = fingerprint.of_bytes(tensor.view(torch.uint8).numpy().tobytes())
    assert f"{sent} {NORM}" in done.stdout.splitlines(), done.stdout + done.stderr
    scrape = old_engine.scrape()
    assert scrape.one("sglang_weight_updates_total", source="tensor") == 1
    assert scrape.one("sglang_weight_update_in_progress") == 0
    assert old_engine.update_weights_from_disk(checkpoints[0])[0] == 200
