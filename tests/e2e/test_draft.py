# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine with a draft model, of which only the target is updated, and a real Prometheus.

On the CPU, for which SGLang's wheel lacks what speculation needs: it makes no token there. Model
runners, pools, scheduler and requests are SGLang's own. Of its operators for the CPU, the only one
that is called before the first token is defined by a plugin, and the draft is given a backend for
attention that can be built without a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from engines import Engine
from monitoring import Monitoring
from serialized import serialized
from waiting import eventually

NORM = "model.norm.weight"
BEHIND = "SGLangWeightDraftBehind"
ROLES = ("target", "draft")


@pytest.fixture(scope="module")
def monitoring(speculative: Engine) -> Iterator[Monitoring]:
    target = {"sglang-weights": f"127.0.0.1:{speculative.exporter_port}"}
    stack = Monitoring(
        Path(tempfile.mkdtemp(prefix="monitoring-")), target, hastened={BEHIND}
    ).start()
    try:
        seen = "count(sglang_weight_updates_total) by (role)"
        eventually(lambda: len(stack.query(seen)) == 2, what="both roles are scraped")
        yield stack
    finally:
        stack.stop()


def post(engine: Engine, path: str, **body: Any) -> None:
    status, answer = engine.post(path, body)
    assert (status, answer["success"]) == (200, True), answer


def send(engine: Engine, selector: str, value: float) -> None:
    """A tensor for one of the two models."""
    tensor = torch.full((tiny_model.HIDDEN,), value, dtype=torch.bfloat16)
    post(engine, "/begin_weight_update", selector=selector)
    body = {"serialized_named_tensors": [serialized(NORM, tensor)], "selector": selector}
    post(engine, "/update_weights_from_tensor", **body)
    post(engine, "/end_weight_update")


def updates(engine: Engine, source: str) -> list[float]:
    scrape = engine.scrape()
    return [scrape.one("sglang_weight_updates_total", role=role, source=source) for role in ROLES]


def fingerprints(engine: Engine) -> list[float]:
    scrape = engine.scrape()
    return [scrape.one("sglang_weight_fingerprint", role=role) for role in ROLES]


def test_target_and_draft_are_two_models_of_one_rank(
    speculative: Engine, checkpoints: tuple[Path, Path]
) -> None:
    scrape = speculative.scrape()
    for role, layers in ("target", tiny_model.LAYERS), ("draft", 1):
        model = speculative.flags[speculative.flags.index("--speculative-draft-model-path") + 1]
        checkpoint = checkpoints[0] if role == "target" else Path(model)
        size = sum(nbytes for _, nbytes in tiny_model.safetensors_header(checkpoint).values())
        assert scrape.sum("sglang_weight_bytes", role=role, kind="parameter") == size
        token = 2 * layers * tiny_model.KV_HEADS * tiny_model.HEAD_DIM * 2
        assert scrape.sum("sglang_kv_pool_bytes", role=role) == (4096 + 1) * token


def test_an_update_from_disk_reaches_both(
    speculative: Engine, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    status, answer = speculative.update_weights_from_disk(checkpoints[1])
    assert (status, answer["success"]) == (200, True), answer
    assert updates(speculative, "disk") == [1, 1]
    seen = 'count(sglang_weight_updates_total{source="disk"} == 1) == 2'
    eventually(lambda: monitoring.query(seen), what="Prometheus has the update")
    assert monitoring.active_alerts(BEHIND) == []


def test_a_draft_that_is_behind_raises_an_alert_until_it_is_updated(
    speculative: Engine, monitoring: Monitoring
) -> None:
    before = fingerprints(speculative)
    send(speculative, "target", 2.0)
    assert updates(speculative, "tensor") == [1, 0]
    target, draft = fingerprints(speculative)
    assert target != before[0]
    assert draft == before[1]

    def firing() -> list[dict[str, Any]]:
        return [each for each in monitoring.active_alerts(BEHIND) if each["state"] == "firing"]

    (alert,) = eventually(firing, what=BEHIND)
    assert alert["labels"]["role"] == "draft"
    assert alert["labels"]["engine"] == str(speculative.port)
    assert str(speculative.model) in alert["annotations"]["summary"]
    send(speculative, "draft", 2.0)
    assert updates(speculative, "tensor") == [1, 1]
    assert fingerprints(speculative)[0] == target
    assert fingerprints(speculative)[1] != draft
    eventually(lambda: not monitoring.active_alerts(BEHIND), what=f"{BEHIND} resolves")
