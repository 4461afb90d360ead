# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that come and go: what is said of each, with stand-ins for SGLang's classes, and in
a real rank of SGLang on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch
from changed_ranks import run_scenario
from engines import Installation
from standins import ModelRunner, Rank, Request

from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.hooks.targets import RUNNER
from sglang_weight_exporter.records.adapters import NAMED_ADAPTERS, Adapters


class Layer(torch.nn.Module):
    """``LoRALayer`` of 0.5.23 (``lora/lora.py``)."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.pinned_weights = {name: tensor.clone() for name, tensor in weights.items()}


class LoRAAdapter(torch.nn.Module):
    """Of the same."""

    def __init__(self, config: Any, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = config
        self.layers = torch.nn.ModuleList([Layer(weights)])
        self.embedding_layers: dict[str, torch.Tensor] = {}
        self.added_tokens_embeddings: dict[str, torch.Tensor] = {}


class LoRAManager:
    """Of 0.5.23 (``lora/lora_manager.py``): what it keeps, and what becomes of it."""

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}
        self.loras: dict[str, LoRAAdapter] = {}
        self.lora_refs: dict[str, Any] = {}
        self.memory_pool = SimpleNamespace(
            A_buffer={"qkv_proj": [torch.zeros(2, 8)]},
            uid_to_buffer_id={None: 0},
            max_loras_per_batch=2,
        )

    def load(self, reference: Any, weights: dict[str, torch.Tensor], fails: str) -> Any:
        config = SimpleNamespace(r=reference.rank, lora_alpha=16, target_modules=["q_proj"])
        self.configs[reference.lora_id] = config
        if not fails:
            self.loras[reference.lora_id] = LoRAAdapter(config, weights)
            self.lora_refs[reference.lora_id] = reference
        return SimpleNamespace(success=not fails, error_message=fails)

    def unload(self, reference: Any) -> Any:
        for each in (self.configs, self.loras, self.lora_refs, self.memory_pool.uid_to_buffer_id):
            each.pop(reference.lora_id, None)
        return SimpleNamespace(success=True, error_message="")


class RunnerWithAdapters(ModelRunner):
    """With its methods of 0.4.9 and later."""

    lora_manager: LoRAManager

    def load_lora_adapter(self, lora_ref: Any) -> Any:
        return self.lora_manager.load(lora_ref, lora_ref.weights, lora_ref.fails)

    def unload_lora_adapter(self, lora_ref: Any) -> Any:
        return self.lora_manager.unload(lora_ref)


RunnerWithAdapters.__name__ = "ModelRunner"


def reference(name: str, *, rank: int = 8, fails: str = "", seed: int = 0, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"layers.0.q_proj.lora_{part}.weight": torch.randn(4, rank, generator=generator)
        for part in "AB"
    }
    settings = {"weights": weights, "pinned": False, **more}
    return SimpleNamespace(
        lora_id=f"id of {name}", lora_name=name, rank=rank, fails=fails, **settings
    )


def started(directory: Path, *, fingerprints: bool = False) -> tuple[Rank, Any]:
    rank = Rank(directory, fingerprinter=Fingerprinter() if fingerprints else None)
    rank.runners = rank.hook(RUNNER, RunnerWithAdapters)
    runner = rank.runner(lora_manager=LoRAManager())
    runner.alloc_memory_pool()
    return rank, runner


def adapters(rank: Rank) -> Adapters:
    found = rank.role().adapters
    assert found is not None
    return found


def test_each_is_named_with_its_rank_and_bytes_until_it_is_unloaded(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    assert (adapters(rank).count, adapters(rank).nbytes) == (0, 0)
    assert adapters(rank).changed_at is None
    one, two = reference("one"), reference("two", rank=16, pinned=True)
    began_at = rank.clock.now
    runner.load_lora_adapter(one)
    (found,) = adapters(rank).named
    assert (found.name, found.rank, found.nbytes) == ("one", 8, 2 * 4 * 8 * 4)
    assert (found.slot, found.pinned, found.fingerprint) == (None, False, "")
    assert found.loaded_at == adapters(rank).changed_at
    assert began_at < found.loaded_at <= rank.clock.now
    runner.load_lora_adapter(two)
    assert [each.name for each in adapters(rank).named] == ["one", "two"]
    assert adapters(rank).nbytes == 2 * 4 * 8 * 4 + 2 * 4 * 16 * 4
    assert adapters(rank).named[0] == found  # It is not read again.
    assert adapters(rank).named[1].pinned
    runner.unload_lora_adapter(one)
    assert [each.name for each in adapters(rank).named] == ["two"]


def test_a_slot_is_the_one_of_when_the_rank_wrote_last(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    runner.load_lora_adapter(reference("one"))
    runner.load_lora_adapter(reference("two"))
    slots = runner.lora_manager.memory_pool.uid_to_buffer_id
    slots["id of two"] = 1  # As ``prepare_lora_batch`` does in a forward pass.
    assert [each.slot for each in adapters(rank).named] == [None, None]
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert [each.slot for each in adapters(rank).named] == [None, 1]


def test_tensors_that_share_their_memory_count_once(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    bucket = torch.zeros(1000)
    parts = {
        "layers.0.o_proj.lora_A.weight": bucket[:8],
        "layers.0.o_proj.lora_B.weight": bucket[8:],
    }
    runner.load_lora_adapter(reference("flat", weights=parts))
    assert adapters(rank).nbytes == 4000


def test_a_load_that_fails_leaves_what_was_there_and_is_counted(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    runner.load_lora_adapter(reference("one"))
    before = adapters(rank)
    runner.load_lora_adapter(reference("two", fails="rank 64 is incompatible"))
    assert adapters(rank) == before
    counts = rank.snapshot().operations["load_lora_adapter"]
    assert (counts.calls, counts.failures) == (2, 1)


def test_one_that_is_loaded_anew_under_its_name_is_read_anew(tmp_path: Path) -> None:
    rank, runner = started(tmp_path, fingerprints=True)
    runner.load_lora_adapter(reference("policy"))
    first = adapters(rank)
    runner.unload_lora_adapter(reference("policy"))
    runner.load_lora_adapter(reference("policy", seed=1))
    second = adapters(rank)
    assert first.hashes["names"] == second.hashes["names"]
    assert first.hashes["settings"] == second.hashes["settings"]
    assert first.hashes["content"] != second.hashes["content"]
    assert first.named[0].fingerprint != second.named[0].fingerprint
    runner.unload_lora_adapter(reference("policy"))
    runner.load_lora_adapter(reference("policy"))
    assert adapters(rank).hashes == first.hashes


def test_ranks_that_have_the_same_say_the_same_in_whatever_order_it_came(tmp_path: Path) -> None:
    one, two = reference("one"), reference("two", rank=16, seed=1)
    said = []
    for number, order in enumerate(((one, two), (two, one), (one, reference("two", seed=1)))):
        rank, runner = started(tmp_path / str(number), fingerprints=True)
        for each in order:
            runner.load_lora_adapter(each)
        said.append(adapters(rank).hashes)
    assert said[0] == said[1]
    assert said[0]["names"] == said[2]["names"]
    assert said[0]["settings"] != said[2]["settings"]


def test_without_fingerprints_nothing_is_said_of_what_they_hold(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    runner.load_lora_adapter(reference("one"))
    assert adapters(rank).hashes.keys() == {"names", "settings"}


def test_of_many_the_last_are_named_and_all_are_counted(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    for number in range(NAMED_ADAPTERS + 5):
        runner.load_lora_adapter(reference(f"step-{number}"))
    found = adapters(rank)
    assert (found.count, len(found.named)) == (NAMED_ADAPTERS + 5, NAMED_ADAPTERS)
    assert (found.named[0].name, found.named[-1].name) == ("step-5", f"step-{NAMED_ADAPTERS + 4}")
    assert found.nbytes == found.count * 2 * 4 * 8 * 4


def test_without_lora_there_are_none_to_name(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.runner().alloc_memory_pool()
    assert rank.role().adapters is None


def test_what_cannot_be_read_is_absent_and_costs_sglang_nothing(tmp_path: Path) -> None:
    rank, runner = started(tmp_path)
    runner.load_lora_adapter(reference("one"))
    runner.lora_manager.loras["id of two"] = SimpleNamespace()  # No adapter of any release.
    runner.lora_manager.lora_refs["id of two"] = reference("two")
    assert runner.load_lora_adapter(reference("three")).success
    with pytest.raises(AssertionError):
        rank.snapshot()  # Which looks for errors of ours.
    runner.unload_lora_adapter(reference("two"))
    rank.installation.errors.clear()
    runner.unload_lora_adapter(reference("one"))
    assert [each.name for each in adapters(rank).named] == ["three"]


def held(adapter: Path) -> int:
    """Bytes that SGLang holds of an adapter: what its file has, by its header, and as much again
    as the values' for the keys that are missing (``normalize_qkv_proj``)."""
    header = tiny_model.safetensors_header(adapter, "adapter_model.safetensors")
    values = sum(size for name, (_, size) in header.items() if ".v_proj." in name)
    return sum(size for _, size in header.values()) + values


@pytest.mark.release("launches")
def test_in_a_real_rank_adapters_come_and_go(newest: Installation, tmp_path: Path) -> None:
    directory, steps = tmp_path, run_scenario(newest, tmp_path, "adapters")
    problems = {name for name, step in steps.items() if step.problem}
    assert problems == {"large", "missing"}
    named = {
        name: [(each.name, each.rank, each.nbytes) for each in step.adapters.named]
        for name, step in steps.items()
    }
    one, two = ("one", 8, held(directory / "one")), ("two", 4, held(directory / "two"))
    assert named["start"] == []
    assert named["one"] == named["token"] == [one]
    assert named["two"] == named["large"] == named["missing"] == [one, two]
    assert named["without one"] == [two]
    assert named["two as one"] == [("one", *two[1:])]
    assert [steps[name].loads for name in ("two", "large", "missing")] == [(2, 0), (3, 1), (4, 2)]
    # A slot is taken in a forward pass, and said with what is written next.
    assert steps["token"].slots.keys() == {"one"}
    assert {each.name: each.slot for each in steps["two"].adapters.named} == {
        "one": steps["token"].slots["one"],
        "two": None,
    }
    # Another adapter under a name that was there.
    before, after = steps["one"].adapters.hashes, steps["two as one"].adapters.hashes
    assert before["names"] == after["names"]
    assert before["content"] != after["content"]
    contents = {each.name: each.fingerprint for each in steps["two"].adapters.named}
    assert steps["two as one"].adapters.named[0].fingerprint == contents["two"] != contents["one"]
