# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Two real engines that place their experts by their own load, and a real Prometheus that finds
nothing wrong with them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rebalance_plugin
import zoo_manifests
import zoo_models
from engine_pool import KINDS
from engines import Engine, Installation
from monitoring import Monitoring
from ports import free_port
from waiting import eventually

pytestmark = pytest.mark.release("alerts")

FLAGS = (
    *("--ep-size", "2", "--enable-eplb", "--ep-num-redundant-experts", "2"),
    *("--eplb-rebalance-num-iterations", "8", "--disable-radix-cache"),
    *("--skip-tokenizer-init", "--skip-server-warmup", "--attention-backend", "torch_native"),
)
#: Alerts that wait for minutes, and not on the machine's speed: in seconds here.
LASTING = {
    "SGLangKVCacheStale",
    "SGLangWeightExporterIncomplete",
    "SGLangWeightReplicasDiffer",
    "SGLangWeightUpdateChangedNothing",
    "SGLangWeightsChangedWithoutUpdate",
}
Pair = tuple[Engine, Engine]


@pytest.fixture(scope="module")
def pair(newest: Installation) -> Iterator[Pair]:
    """Replicas on one host, behind one exporter; the first leaves its reference for the second."""
    directory = Path(tempfile.mkdtemp(prefix="rebalanced-"))
    kind, checkpoint = KINDS["tensor_parallel_engine"], directory / "model"
    zoo_models.write(zoo_models.MODELS["qwen3_moe"], checkpoint, 0)
    variables = {
        **dict(kind.variables),
        "PYTHONPATH": str(rebalance_plugin.write(directory / "plugin")),
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": f"{directory}/runtime",
        "SGLANG_WEIGHT_EXPORTER_REFERENCE_DIR": f"{directory}/references",
    }
    port = free_port()
    flags = [*kind.flags, *FLAGS]
    engines = [
        Engine(newest, checkpoint, flags=flags, variables=variables, exporter_port=port)
        for _ in range(2)
    ]
    try:
        for engine in engines:
            engine.start()
            engine.wait_until_ready()
        yield engines[0], engines[1]
    finally:
        for engine in engines:
            engine.stop()
        shutil.rmtree(directory, ignore_errors=True)


def generate(engine: Engine, token: int) -> None:
    body = {
        "input_ids": [token] * 16,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
    }
    status, answer = engine.post("/generate", body)
    assert status == 200, (answer, engine.log()[-3000:])


def moves(engine: Engine) -> list[float]:
    """Of each rank."""
    labels = {"source": "eplb", "role": "target", "engine": str(engine.port)}
    found = engine.scrape().series("sglang_weight_updates_total", **labels)
    return [sample.value for sample in found]


def fingerprints(pair: Pair) -> list[dict[str, float]]:
    """Of each engine, by rank."""
    scrape = pair[0].scrape()
    found = [scrape.series("sglang_weight_fingerprint", engine=str(each.port)) for each in pair]
    return [{each.labels["tp_rank"]: each.value for each in samples} for samples in found]


def test_a_fleet_that_rebalances_is_called_healthy(pair: Pair) -> None:
    one, other = fingerprints(pair)
    assert one == other
    assert len(one) == 2
    target = {"sglang-weights": f"127.0.0.1:{pair[0].exporter_port}"}
    directory = Path(tempfile.mkdtemp(prefix="monitoring-"))
    stack = Monitoring(directory, target, hastened=LASTING).start()
    try:
        for engine, token in zip(pair, (5, 100), strict=True):

            def rebalanced(engine: Engine = engine, token: int = token) -> bool:
                generate(engine, token)
                return min(moves(engine)) >= 2

            eventually(rebalanced, what="experts were moved on both ranks")
        one, other = fingerprints(pair)
        assert all(one[rank] != other[rank] for rank in one)
        for_seconds = f"min(timestamp(sglang_weight_fingerprint)) > {time.time() + 15}"
        eventually(lambda: stack.query(for_seconds), what="it has been so for longer than any rule")
        alerts = 'last_over_time(ALERTS{alertstate="firing"}[1h])'
        firing = stack.query(f"count by (alertname, reason) ({alerts})")
        # That weights changed is information.
        assert {each["metric"]["alertname"] for each in firing} <= {"SGLangWeightsReloaded"}, firing
    finally:
        stack.stop()


def test_each_expert_is_where_it_is_said_to_be(pair: Pair) -> None:
    """What was sent is compared by expert, wherever it lies, and however often."""
    zoo_manifests.write(pair[0].model)
    manifest = zoo_manifests.manifest_of(pair[0].model)
    for engine in pair:
        done = engine.exporter_cli("verify", "--manifest", str(manifest), "--require", "1")
        assert done.returncode == 0, done.stdout + done.stderr
    done = pair[0].exporter_cli("verify")
    assert " 0 different" in done.stdout, done.stdout + done.stderr
