# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update may not cost: Python's garbage is not collected because of it, and what grows with
the number of requests is not walked."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from standins import Rank, session  # noqa: E402

from sglang_weight_exporter.runners.pools import table_storages  # noqa: E402


def large(modules: int = 3000) -> Any:
    made = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(modules))
    for module in made[:100]:
        module.w_kc = torch.zeros(1)
    return made


@pytest.mark.parametrize("does", ["nothing", "moves", "registers elsewhere"])
def test_updates_never_have_the_garbage_collector_run(tmp_path: Path, does: str) -> None:
    rank = Rank(tmp_path / "runtime")
    made = large()

    def load() -> tuple[bool, str]:
        if does == "moves":
            made[0].weight = torch.nn.Parameter(torch.zeros(1, 1))
        elif does != "nothing":
            torch.nn.Linear(1, 1)
        return True, "Success"

    runner = rank.runner(model=made, answers={"tensor": load})
    runner.alloc_memory_pool()
    for _ in range(2):
        session(runner, loads=1)
    runs: list[int] = []

    def count(phase: str, information: dict[str, int]) -> None:
        if phase == "start":
            runs.append(information["generation"])

    gc.collect()
    gc.callbacks.append(count)
    try:
        for _ in range(5):
            session(runner, loads=1)
    finally:
        gc.callbacks.remove(count)
    assert runs == []
    assert rank.role().updates["tensor"].updates == 7


class FreeSlots(list[int]):
    """A list that counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Any:
        type(self).walks += 1
        return super().__iter__()


class ReqToTokenPool:
    """Of all releases; one entry a request that may run."""

    def __init__(self) -> None:
        self.req_to_token = torch.zeros(8, 4, dtype=torch.int32)
        self.free_slots = FreeSlots(range(4096))


ReqToTokenPool.__module__ = "sglang.srt.mem_cache.memory_pool"


def test_free_slots_are_not_walked() -> None:
    pool = ReqToTokenPool()
    found = table_storages(SimpleNamespace(req_to_token_pool=pool), ())
    assert [each.nbytes for each in found] == [pool.req_to_token.nbytes]
    assert FreeSlots.walks == 0
