# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What hangs on a model's modules and is no weight: scratch of forward passes, adapter slots."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from standins import Rank, Request, Scheduler, model  # noqa: E402

from sglang_weight_exporter.hooks.targets import SCHEDULER  # noqa: E402
from sglang_weight_exporter.records.weights import TableRef  # noqa: E402


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


def table(rank: Rank) -> TableRef:
    found = rank.role().table
    assert found is not None
    return found


def derived(rank: Rank) -> int:
    return sum(part.nbytes for part in rank.weights() if part.kind == "derived")


def test_what_a_forward_pass_binds_is_no_weight(rank: Rank) -> None:
    """SGLang captures graphs, a forward pass each, before its scheduler is made."""
    made = model()
    made.w_kc = torch.zeros(4)

    def make() -> None:
        runner = rank.runner(model=made)
        made.proj.intermediate = torch.zeros(16)
        runner.alloc_memory_pool()

    rank.hook(SCHEDULER, Scheduler)(make)
    assert derived(rank) == 16
    (runner,) = rank.workers
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert derived(rank) == 16


def test_a_load_leaves_derived_weights_anew(rank: Rank) -> None:
    made = model()
    runner = rank.runner(model=made)
    made.w_kc = torch.zeros(4)
    runner.load_model()
    assert derived(rank) == 16


def test_what_is_bound_anew_while_nothing_is_updated_is_scratch_and_has_not_moved(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    """``MambaMixer2.intermediate_state_indices`` of 0.5.23, in each target-verify pass."""
    caplog.set_level(logging.INFO, "sglang_weight_exporter")
    made = model()
    made.mixer = torch.nn.Module()
    made.mixer.intermediate_state_indices = torch.arange(64)
    made.mixer.kept = torch.zeros(2)
    scheduler = rank.scheduler(rank.runner(model=made))
    for length in (32, 16, 64):
        kept = made.mixer.intermediate_state_indices
        made.mixer.intermediate_state_indices = torch.arange(length)
        scheduler.update_weights_from_disk(Request())
        assert rank.last_update().changes.moved == 0
        assert (table(rank).scratch, derived(rank)) == (1, 8)
        del kept
    assert rank.role().moved == 0
    assert table(rank).scratch_names == ("mixer.intermediate_state_indices",)
    logged = [each.message for each in caplog.records if "scratch" in each.message]
    assert len(logged) == 1
    assert "mixer.intermediate_state_indices" in logged[0]


def test_what_an_update_binds_anew_has_moved_and_is_a_weight(rank: Rank) -> None:
    made = model()
    made.w_kc = torch.zeros(4)

    def load() -> tuple[bool, str]:
        made.w_kc = torch.zeros(4)
        return True, "Success"

    runner = rank.runner(model=made, answers={"disk": load})
    kept = made.w_kc
    for _ in range(2):
        rank.scheduler(runner).update_weights_from_disk(Request())
    assert rank.last_update().changes.names["moved"] == ("w_kc",)
    assert (table(rank).scratch, derived(rank)) == (0, 16)
    del kept


class WithAdapters(torch.nn.Module):  # type: ignore[name-defined]
    """``sglang.srt.lora.layers.BaseLayerWithLoRA``."""

    def __init__(self, base_layer: Any, slots: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.A_buffer = slots


WithAdapters.__module__ = "sglang.srt.lora.layers"


@pytest.mark.parametrize("wrapped", ["after the load", "in it"])
def test_adapter_slots_count_once_and_weights_keep_counting(rank: Rank, wrapped: str) -> None:
    made, slots = model(), torch.zeros(8)
    made.proj.w_kc = torch.zeros(4)
    manager = SimpleNamespace(memory_pool=SimpleNamespace(A_buffer={"proj": [slots]}), loras={})
    if wrapped == "in it":
        made.proj = WithAdapters(made.proj, slots)
    runner = rank.runner(model=made, lora_manager=manager)
    if wrapped == "after the load":
        made.proj = WithAdapters(made.proj, slots)
    runner.alloc_memory_pool()
    assert [usage.nbytes for usage in rank.role().lora] == [32]
    assert derived(rank) == 16
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert derived(rank) == 16
