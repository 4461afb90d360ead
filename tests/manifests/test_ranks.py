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
UP = "model.layers.1.mlp.up_proj.weight"
SPELT = "model.layers.1.mlp.upproj.weight"


def said_by(installation: Installation, directory: Path, **job: Any) -> list[list[dict[str, Any]]]:
    """Of each rank, what it said after each step."""
    environment = installation.environment(
        **NO_GPU,
        **{PREFIX + "RUNTIME_DIR": str(directory / "run"), PREFIX + "FINGERPRINT": "on"},
        **{PREFIX + "MANIFEST_DIR": str(directory / "sent"), PREFIX + "SERVE": "off"},
        PYTHONPATH=os.pathsep.join(str(TESTS / each) for each in ("shared", "zoo")),
    )
    program = Path(__file__).with_name("update_ranks.py")
    with (directory / "log").open("wb") as log:
        subprocess.run(
            [installation.python, program, directory, json.dumps(job)],
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
            timeout=10 * LIMIT,
        )
    results = [directory / "results" / f"{rank}.json" for rank in range(job["ranks"])]
    said = [json.loads(result.read_bytes()) for result in results]
    failed = [result.with_suffix(".log").read_text()[-3000:] for result in results]
    assert all(isinstance(each, list) for each in said), (said, failed)
    return said


def check_healthy(said: dict[str, Any]) -> None:
    assert said["different"] == []
    assert said["not_comparable"] == {}
    assert said["unheld"] == said["unsent"] == []
    assert said["equal"]


CUTS = [
    pytest.param("llama", {}, 1, "", id="one rank"),
    pytest.param("llama", {}, 2, "", id="two ranks"),
    pytest.param("llama", {}, 4, "", id="two key-value heads on four ranks"),
    pytest.param("qwen2_tied", {}, 2, "", id="tied embeddings and biases"),
    pytest.param("qwen2", {"vocab_size": 1000}, 2, "", id="a vocabulary that is filled up"),
    pytest.param("qwen3_moe", {}, 2, "--ep-size 2", id="experts on two ranks"),
    pytest.param("mixtral", {}, 2, "", id="experts in two shares"),
]


@pytest.mark.release("manifests")
@pytest.mark.parametrize(("model", "changes", "ranks", "flags"), CUTS)
def test_every_cut(
    newest: Installation,
    tmp_path: Path,
    model: str,
    changes: dict[str, Any],
    ranks: int,
    flags: str,
) -> None:
    for said in said_by(
        newest, tmp_path, model=model, changes=changes, ranks=ranks, flags=flags, steps=[[], []]
    ):
        for step in said:
            check_healthy(step)
