# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Update functions of slime and verl, as they are, against a real engine of two ranks over gloo,
with the manifest in the loop: a healthy step is called right, and what went wrong is named."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import zoo_models
from engine_pool import KINDS
from engines import Engine, Installation
from waiting import LIMIT, eventually

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

UP, SPELT = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.upproj.weight"
STEPS = ("", "drop", f"rename {UP} {SPELT}", f"stale {UP}", "")
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
STEPS_OF_EXPERTS = ("", f"stale {EXPERT}", "")


@contextmanager
def steps_of(
    trainer: str, engine: Engine, checkpoint: Path, sabotages: Sequence[str], **variables: str
) -> Iterator[Iterator[str]]:
    """Each step's sabotage, when the step has been made."""
    sent = engine.directory / "sent"
    for left in sent.glob("*"):
        left.unlink()
    sent.mkdir(exist_ok=True)
    program = Path(__file__).with_name("trainers") / "steps.py"
    log = sent.parent / f"{trainer}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                *map(str, (engine.installation.python, program, trainer, engine.url)),
                *map(str, (sent, checkpoint, json.dumps(sabotages))),
            ],
            env=engine.installation.environment(
                NCCL_CUMEM_ENABLE="0", GLOO_SOCKET_IFNAME="lo", **variables
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def steps() -> Iterator[str]:
        for sabotage in sabotages:
            assert stdout.readline().strip(), log.read_text()[-3000:]
            yield sabotage
            stdin.write("\n")
            stdin.flush()

    try:
        yield steps()
        assert process.wait(LIMIT) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()


def matches(engine: Engine) -> list[float]:
    scrape = engine.scrape()
    return [sample.value for sample in scrape.series("sglang_weight_manifest_match")]


def follow(
    trainer: str,
    engine: Engine,
    checkpoint: Path,
    ranks: int,
    sabotages: Sequence[str] = STEPS,
    **variables: str,
) -> None:
    """Each step is called right or named, by every rank."""
    with steps_of(trainer, engine, checkpoint, sabotages, **variables) as steps:
        for number, sabotage in enumerate(steps, start=1):
            expected = [float(not sabotage)] * ranks

            def compared(expected: list[float] = expected) -> bool:
                return matches(engine) == expected

            eventually(compared, what=f"step {number} ({sabotage!r}) is compared")
            done = engine.exporter_cli("status", "--manifest-dir", str(engine.directory / "sent"))
            text = done.stdout + done.stderr
            if "rename" in sabotage:
                assert f"{SPELT} was sent as version {number}" in text
                assert f"was {UP} meant?" in text
            elif "stale" in sabotage:
                stale = sabotage.split()[1]
                assert f"{stale} is not what the trainer sent as version {number}" in text
            elif sabotage:
                other = text.count(f"is not what the trainer sent as version {number}")
                assert other == ranks, text


@pytest.mark.release("manifests")
@pytest.mark.parametrize("trainer", ["slime", "verl"])
def test_a_trainers_own_steps(
    tensor_parallel_engine: Engine, checkpoints: tuple[Path, Path], trainer: str
) -> None:
    follow(trainer, tensor_parallel_engine, checkpoints[0], ranks=2)


@pytest.fixture
def engine_of_experts(newest: Installation, tmp_path: Path) -> Iterator[Engine]:
    """As `tensor_parallel_engine`, of a mixture of experts."""
    kind, checkpoint = KINDS["tensor_parallel_engine"], tmp_path / "experts"
    zoo_models.write(zoo_models.MODELS["qwen3_moe"], checkpoint, 0)
    flags = ["--skip-tokenizer-init", "--skip-server-warmup"]
    flags += ["--attention-backend", "torch_native"]
    variables = {**dict(kind.variables), "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    engine = Engine(newest, checkpoint, flags=[*kind.flags, *flags], variables=variables)
    try:
        engine.start()
        yield engine.wait_until_ready()
    finally:
        engine.stop()


@pytest.mark.release("manifests")
def test_a_stale_expert_in_a_trainers_own_steps(engine_of_experts: Engine) -> None:
    follow("slime", engine_of_experts, engine_of_experts.model, 2, STEPS_OF_EXPERTS)
