# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates over NCCL, whose weights a GPU reads while SGLang goes on. The group is the engine's rank
alone: with one GPU there is no second one that NCCL takes."""

from __future__ import annotations

from functools import partial

import pytest
from engines import http_get
from gpu_engines import LAYERS, GpuEngine, GpuEngines, shapes
from ports import free_port
from waiting import eventually

ROUNDS = 20
#: A tenth of a second, and the time in which a device is asked to do something else.
CYCLES = 200_000_000


def updates(served: GpuEngine, source: str) -> float:
    return served.engine.scrape().sum("sglang_weight_updates_total", source=source)


@pytest.fixture(scope="module")
def group(fingerprint_engine: GpuEngine) -> str:
    body = {
        "master_address": "127.0.0.1",
        "master_port": free_port(),
        "rank_offset": 0,
        "world_size": 1,
        "group_name": "alone",
        "backend": "nccl",
    }
    assert fingerprint_engine.engine.post("/init_weights_update_group", body)[0] == 200
    return "alone"


@pytest.mark.parametrize("delay", [{}, {"read": CYCLES}], ids=str)
def test_memory_that_is_released_directly_after_an_update(
    fingerprint_engine: GpuEngine, gpu_engines: GpuEngines, group: str, delay: dict[str, int]
) -> None:
    """A kernel that read it would end the engine."""
    engine = fingerprint_engine.engine
    sent = shapes(LAYERS)
    batch = {
        "names": list(sent),
        "dtypes": ["bfloat16"] * len(sent),
        "shapes": list(map(list, sent.values())),
        "group_name": group,
        "flush_cache": True,
    }
    (rank,) = fingerprint_engine.ranks()
    before = updates(fingerprint_engine, "distributed")
    rank.ask("delay", **delay)
    for number in range(1, ROUNDS + 1):
        assert engine.post("/update_weights_from_distributed", batch)[0] == 200
        assert engine.post("/release_memory_occupation", {})[0] == 200
        assert engine.post("/resume_memory_occupation", {})[0] == 200
        counted = partial(updates, fingerprint_engine, "distributed")
        assert eventually(lambda n=number, of=counted: of() == before + n)  # type: ignore[misc]
    rank.ask("delay")
    loaded = updates(fingerprint_engine, "disk")
    assert engine.update_weights_from_disk(gpu_engines.checkpoints["a"])[0] == 200
    assert eventually(lambda: updates(fingerprint_engine, "disk") == loaded + 1)
    done = engine.exporter_cli("verify", "--checkpoint", str(gpu_engines.checkpoints["a"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert http_get(engine.url + "/health")[0] == 200
    assert engine.scrape().sum("sglang_weight_exporter_hook_errors_total") == 0
