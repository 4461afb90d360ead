# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a draft beside the target, and no byte counted twice."""

from __future__ import annotations

import pytest
import tiny_model
from gpu_engines import (
    GpuEngine,
    GpuEngines,
    Record,
    rows,
    storages,
)


@pytest.fixture(params=["eagle_engine", "standalone_engine"])
def speculative(request: pytest.FixtureRequest) -> tuple[str, GpuEngine]:
    """The draft's checkpoint, and the engine."""
    engine: GpuEngine = request.getfixturevalue(request.param)
    return {"eagle_engine": "eagle", "standalone_engine": "draft"}[request.param], engine


def test_a_draft_counts_what_it_adds(
    speculative: tuple[str, GpuEngine], gpu_engines: GpuEngines, record_property: Record
) -> None:
    checkpoint, running = speculative
    scrape, (rank,) = running.engine.scrape(), running.ranks()
    draft = rows(rank.table("draft"))
    # EAGLE's draft has the target's embeddings, and its checkpoint has none; the other kind keeps
    # its own.
    size = sum(
        size
        for _, size in tiny_model.safetensors_header(gpu_engines.checkpoints[checkpoint]).values()
    )
    assert scrape.sum("sglang_weight_bytes", role="draft", kind="parameter") == size
    target = sum(size for _, size in tiny_model.safetensors_header(running.engine.model).values())
    assert scrape.sum("sglang_weight_bytes", role="target", kind="parameter") == target
    shared = rows(rank.table()).keys() & {
        name for name, row in draft.items() if rows(rank.table()).get(name) == row
    }
    record_property("draft bytes", int(scrape.sum("sglang_weight_bytes", role="draft")))
    record_property("tensors at the target's addresses", ", ".join(sorted(shared)))
    # SGLang makes one table of rotary embeddings for all layers of a process.
    expected = {"model.layers.0.self_attn.rotary_emb.cos_sin_cache"}
    if checkpoint == "eagle":
        expected |= {"lm_head.weight", "model.embed_tokens.weight"}
    assert shared == expected
    assert scrape.sum("sglang_weight_bytes", role="draft", kind="buffer") == 0

    held = {**storages(rank.table()), **storages(rank.table("draft"))}
    assert scrape.sum("sglang_weight_bytes") == sum(held.values())
    blocks = dict(block for _, _, blocks in rank.ask("segments") for block in blocks)
    assert held.keys() <= blocks.keys()
    assert rank.ask("differing", rows=draft, draft=True) == []
    assert rank.ask("differing", rows=rows(rank.table()), draft=False) == []


def test_kv_pools_of_target_and_draft(speculative: tuple[str, GpuEngine]) -> None:
    _, running = speculative
    scrape = running.engine.scrape()
    target, draft = running.kv_pool_bytes(), running.kv_pool_bytes(layers=1)
    assert scrape.sum("sglang_kv_pool_bytes", role="target") == target
    assert scrape.sum("sglang_kv_pool_bytes", role="draft") == draft


def test_an_update_of_the_target_leaves_the_draft_true(
    speculative: tuple[str, GpuEngine], gpu_engines: GpuEngines
) -> None:
    _, running = speculative
    status, answer = running.engine.update_weights_from_disk(gpu_engines.checkpoints["b"])
    assert (status, answer["success"]) == (200, True), answer
    scrape, (rank,) = running.engine.scrape(), running.ranks()
    assert scrape.one("sglang_weight_updates_total", role="target", source="disk") == 1
    for role in ("target", "draft"):
        table = rank.table(role)
        assert rank.ask("differing", rows=rows(table), draft=role == "draft") == []
