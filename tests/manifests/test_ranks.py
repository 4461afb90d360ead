# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real ranks, cut in every way, beside what a trainer has: all of it is compared, nothing healthy
is called different, and what a trainer did wrong is found by name."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import PREFIX, Installation
from waiting import LIMIT

NO_GPU = {
    "SGLANG_NCCL_SO_PATH": "none",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
TESTS = Path(__file__).parents[1]
UP, K = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
SPELT = "model.layers.1.mlp.upproj.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
GATE = "model.layers.0.mlp.experts.0.gate_proj.weight"

CUTS = (1, 2, 4, 8)
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192}
EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
TWICE: list[list[str]] = [[], []]


def job(model: str, ranks: int, steps: list[list[str]] = TWICE, **more: Any) -> dict[str, Any]:
    return {"model": model, "ranks": ranks, "steps": steps, "cuts": CUTS, **more}


#: All that they are sent is equal in each step, but for what a step is named after.
JOBS = {
    "one rank": job("llama", 1),
    "two key-value heads on four ranks": job("llama", 4),
    "eight heads on four ranks": job("llama", 4, changes=EIGHT_HEADS),
    "tied embeddings and biases": job("qwen2_tied", 2),
    "a vocabulary that is filled up": job("qwen2", 2, changes={"vocab_size": 1000}),
    # SGLang on a CPU fills six heads up to eight for two ranks.
    "heads that are filled up": job("qwen2", 2, changes=SIX_HEADS, cuts=(1, 2, 3)),
    "experts in two shares": job("mixtral", 2),
    "two ranks": job(
        "llama", 2, [[], [f"stale {UP}"], [f"drop {K}"], [f"rename {UP} {SPELT}"], []]
    ),
    "experts on two ranks": job(
        "qwen3_moe", 2, [[], [f"stale {EXPERT}"], [f"drop {GATE}"], []], flags="--ep-size 2"
    ),
    "a hundred updates": job("llama", 2, [[]] * 100),
}
#: What is named in the steps in which something was done wrong; another step has nothing.
NAMED = {
    "two ranks": {1: [UP], 2: [K], 3: [UP]},
    "experts on two ranks": {1: [EXPERT], 2: [GATE]},
}


@pytest.fixture(scope="module")
def said(newest: Installation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By job, of each rank what it said after each step."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = newest.environment(
        **NO_GPU,
        **{PREFIX + "FINGERPRINT": "on", PREFIX + "SERVE": "off"},
        **{PREFIX + "MANIFEST_DIR": str(directory / "sent")},
        PYTHONPATH=os.pathsep.join(str(TESTS / each) for each in ("shared", "zoo")),
    )
    program = Path(__file__).with_name("update_ranks.py")
    with (directory / "log").open("wb") as log:
        subprocess.run(
            [newest.python, program, directory, json.dumps(JOBS)],
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
            timeout=10 * LIMIT,
        )
    found = {}
    for name, each in JOBS.items():
        results = [directory / name / "results" / f"{rank}.json" for rank in range(each["ranks"])]
        found[name] = [json.loads(result.read_bytes()) for result in results]
        for ranks, result in zip(found[name], results, strict=True):
            assert isinstance(ranks, list), (ranks, result.with_suffix(".log").read_text()[-3000:])
    return found


@pytest.mark.release("manifests")
@pytest.mark.parametrize("name", JOBS)
def test_what_was_sent_is_what_every_rank_holds(said: dict[str, Any], name: str) -> None:
    ranks = said[name]
    assert {len(each) for each in ranks} == {len(JOBS[name]["steps"])}
    for number, steps in enumerate(zip(*ranks, strict=True)):
        named = NAMED.get(name, {}).get(number, [])
        assert sorted({each for step in steps for each in step["different"]}) == named, number
        assert all(step["not_comparable"] == step["unexplained"] == {} for step in steps), number
        assert all(step["unsent"] == [] for step in steps), number
        # With expert parallelism a rank has its own.
        assert set.intersection(*(set(step["unheld"]) for step in steps)) == set(), number
        assert all(step["equal"] for step in steps)
