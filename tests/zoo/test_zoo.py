# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Models of many architectures in real ranks: nothing that a healthy one does is called wrong.

What came of each is in ``seen.json``, of which ``document.py`` makes ``docs/models.md`` and what
``verify`` takes for proved. A run in which less is proved fails, and ``document.py RESULTS`` takes
over what it saw where that is right.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import PREFIX, Installation
from monitoring import Monitoring
from published import PublishedRank
from ranks import ExporterProcess
from zoo import document
from zoo_models import MODELS, WITH_ADAPTERS
from zoo_variants import VARIED

RELEASE = "0.5.23"
#: Loaders that add, transpose, tie, fuse, stack and prefix.
SIX = ("llama", "qwen2_tied", "gemma", "gpt2", "mixtral", "ernie4_5")
#: That there was a reload raises an alert, and that one was of the same checkpoint; nothing else.
RAISED = {"SGLangWeightsReloaded", "SGLangWeightUpdateChangedNothing"}
#: Alerts that wait for minutes, and not on the machine's speed: in seconds here.
LASTING = {
    "SGLangWeightDraftBehind",
    "SGLangKVCacheStale",
    "SGLangWeightReplicasDiffer",
    "SGLangWeightsChangedWithoutUpdate",
    "SGLangWeightsReleased",
    "SGLangWeightExporterIncomplete",
}
NO_GPU = {
    "SGLANG_NCCL_SO_PATH": "none",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}


def seen() -> dict[str, Any]:
    """On a CPU that no weights are packed for, which takes SGLang's kernels for CPUs."""
    found: dict[str, Any] = json.loads(document.SEEN.read_bytes())[RELEASE]["cpu"]
    return found


def load(newest: Installation, directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Each in ranks of its own, with an exporter and a Prometheus beside them."""
    exporter = ExporterProcess(directory / "run").start()
    # SGLang's import and the making of a checkpoint may take longer than half an hour is in the
    # rules here, and a host without ranks for so long is an alert. So there is always one.
    always = PublishedRank(directory / "run", engine="always")
    always.publish()
    job = "sglang-weights"
    target, scrape = f"127.0.0.1:{exporter.port}", {job: {"scrape_interval": "1s"}}
    (directory / "monitoring").mkdir()  # What it leaves is removed, and the results are kept.
    stack = Monitoring(directory / "monitoring", {job: target}, scrape, hastened=LASTING).start()
    environment = newest.environment(
        **NO_GPU,
        **{PREFIX + "RUNTIME_DIR": str(directory / "run")},
        **{PREFIX + "FINGERPRINT": "on", PREFIX + "SERVE": "off"},
        # Whoever has one takes the sums that manifests are compared with.
        **{PREFIX + "MANIFEST_DIR": str(directory / "sent")},
        ZOO_PROMETHEUS=stack.url,
        PYTHONPATH=os.pathsep.join(str(document.ROOT / "tests" / each) for each in ("shared",)),
    )
    try:
        program = Path(__file__).with_name("load_models.py")
        with (directory / "log").open("wb") as log:
            subprocess.run(
                [newest.python, program, directory, "cpu", *names],
                env=environment,
                stdout=log,
                stderr=log,
                check=True,
            )
        alerts = 'last_over_time(ALERTS{alertstate="firing"}[1h])'
        firing = stack.query(f"count by (alertname, reason) ({alerts})")
        assert {each["metric"]["alertname"] for each in firing} <= RAISED, firing
    finally:
        results = document.read_results(directory / "results")
        stack.stop()
        always.store.withdraw()
        exporter.end(signal.SIGTERM)
    return results


def check(name: str, result: dict[str, Any]) -> list[str]:
    """What is wrong with it, in words."""
    wrong = []
    was = seen().get(name)
    if was is None:
        return [f"{name}: what it should be was never recorded"]
    if ("error" in result) != ("error" in was):
        return [f"{name}: {result.get('error', 'is loaded')}, was {was.get('error', 'loaded')}"]
    for kind, patterns in was.get("confirmed", {}).items():
        lost = set(patterns) - set(result["confirmed"].get(kind, ()))
        if lost:
            wrong.append(f"{name}: what was proved of {kind} is no more: {sorted(lost)}")
    for step, found in result.get("steps", {}).items():
        published, held = found["bytes"]
        if published != held:
            wrong.append(f"{name}, {step}: {published} bytes are published and {held} are there")
        if step != "tokens" and found["moved"][0] != found["moved"][1]:
            wrong.append(f"{name}, {step}: {found['moved']} tensors moved")
        if found["different"] or found["modified"]:
            wrong.append(f"{name}, {step}: {found['different']} {found['modified_names']}")
        wrong += check_sent(f"{name}, {step}", found.get("sent"), was)
    if result.get("confirmed", {}).get("whole") and not result["told"]:
        wrong.append(f"{name}: another checkpoint is not told from its own")
    return wrong


def check_sent(where: str, found: dict[str, Any] | None, was: dict[str, Any]) -> list[str]:
    """Beside what a trainer would have sent; nobody sends a draft."""
    if found is None:
        return []
    wrong = [
        f"{where}: {kind} of what was sent: {found[kind]}"
        for kind in ("different", "unnamed")
        if found[kind]
    ]
    unheld = set(found["unheld"]) - set(was.get("unheld", ()))
    if unheld:
        wrong.append(f"{where}: of what was sent no rank is said to hold {sorted(unheld)}")
    if found["equal_bytes"] < was.get("sent", 0):
        wrong.append(f"{where}: of what was sent {found['equal_bytes']:.1%} is proved")
    return wrong


def test_six_models(newest: Installation, tmp_path: Path) -> None:
    results = load(newest, tmp_path, SIX)
    assert results.keys() == set(SIX)
    assert [each for name, result in results.items() for each in check(name, result)] == []


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("", id="one rank", marks=pytest.mark.release("zoo")),
        pytest.param(":2", id="two ranks", marks=pytest.mark.release("parallel")),
        pytest.param("+lora", id="adapters", marks=pytest.mark.release("parallel")),
    ],
)
def test_the_zoo(newest: Installation, tmp_path: Path, how: str) -> None:
    """With two ranks those that one could load."""
    recorded = seen()
    loaded = [name for name in MODELS if not how or "error" not in recorded.get(name, {})]
    names = [name + how for name in (WITH_ADAPTERS if how == "+lora" else loaded)]
    names += () if how else VARIED
    results = load(newest, tmp_path, names)
    assert results.keys() == set(names)
    assert [each for name, result in results.items() for each in check(name, result)] == []


def test_the_page_and_what_is_proved_are_of_what_was_seen() -> None:
    everything = json.loads(document.SEEN.read_bytes())
    assert document.PAGE.read_text() == document.page(everything)
    assert json.loads(document.CONFIRMED.read_bytes()) == document.confirmed(everything)
