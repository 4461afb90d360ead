# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Engines on NVIDIA GPUs as fixtures.

    pytest tests/gpu -o junit_family=xunit1 --junitxml=measured.xml

runs what the machine's GPUs suffice for and skips the rest; the figures that tests measure are
properties of their test cases. SGLang 0.5.17 or later has to be importable. All engines that the
collected tests ask for start at once, and the tests begin when all are ready: GPU memory is
counted for the whole device.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from gpu_engines import KINDS, GpuEngine, GpuEngines, need_gpus, nvidia_smi, write_checkpoint
from waiting import eventually


def answers_or_has_ended(engine: Engine) -> bool:
    return engine.main.poll() is not None or engine.ready()


@pytest.fixture(scope="session")
def gpu_engines(request: pytest.FixtureRequest) -> Iterator[GpuEngines]:
    gpus = len(nvidia_smi())
    asked: set[str] = set()
    for item in request.session.items:
        asked |= set(getattr(item, "fixturenames", ()))
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            asked |= {value for value in item.callspec.params.values() if isinstance(value, str)}
    directory = Path(tempfile.mkdtemp(prefix="gpu-"))
    engines = GpuEngines(directory)
    try:
        engines.install_probe()
        engines.checkpoints = {
            "a": write_checkpoint(directory / "a", 0),
            "b": write_checkpoint(directory / "b", 1),
            "draft": write_checkpoint(directory / "draft", 2, layers=1),
            "eagle": write_checkpoint(directory / "eagle", 3, layers=1, eagle=True),
        }
        for name, kind in KINDS.items():
            if name in asked and len(kind.gpus) <= gpus:
                engines.start(name)
        for running in engines.engines.values():
            eventually(
                partial(answers_or_has_ended, running.engine),
                every=0.5,
            )
        yield engines
    finally:
        for running in engines.engines.values():
            running.engine.stop()
        shutil.rmtree(directory, ignore_errors=True)


def gpu_engine_fixture(name: str) -> Any:
    @pytest.fixture(scope="session", name=name)
    def fixture(request: pytest.FixtureRequest) -> GpuEngine:
        need_gpus(len(KINDS[name].gpus))
        if importlib.util.find_spec("sglang") is None:
            pytest.skip("needs SGLang 0.5.17 or later")
        running: GpuEngine = request.getfixturevalue("gpu_engines").engines[name]
        running.engine.wait_until_ready()
        eventually(running.engine.scrape)
        return running

    return fixture


gpu_engine = gpu_engine_fixture("gpu_engine")
two_gpu_engine = gpu_engine_fixture("two_gpu_engine")
fingerprint_engine = gpu_engine_fixture("fingerprint_engine")
two_gpu_fingerprint_engine = gpu_engine_fixture("two_gpu_fingerprint_engine")
manifest_engine = gpu_engine_fixture("manifest_engine")
offload_engine = gpu_engine_fixture("offload_engine")
lora_engine = gpu_engine_fixture("lora_engine")
graph_engine = gpu_engine_fixture("graph_engine")
saver_graph_engine = gpu_engine_fixture("saver_graph_engine")
eagle_engine = gpu_engine_fixture("eagle_engine")
standalone_engine = gpu_engine_fixture("standalone_engine")
