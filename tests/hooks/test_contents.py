# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How much an update has changed, by class of layer: with stand-ins for SGLang's classes, and of a
mixture of experts in a real rank of SGLang on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch
from changed_ranks import Step, run_scenario
from engines import Installation
from standins import Rank, Request, answer

from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.records.contents import ContentChanges
from sglang_weight_exporter.runners.layers import Layers


def named(name: str, base: type = torch.nn.Module) -> Any:
    """A class of that name."""
    return type(name, (base,), {})


def holding(kind: str, base: type = torch.nn.Module, **children: Any) -> Any:
    made = named(kind, base)()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def weight(kind: str, size: int = 4, base: type = torch.nn.Module) -> Any:
    return holding(kind, base, weight=torch.nn.Parameter(torch.zeros(size)))


def mixture() -> Any:
    """Modules as ``models/qwen2_moe.py`` of 0.5.23 has them, with its classes' names."""
    attention = holding(
        "Qwen2MoeAttention",
        qkv_proj=weight("QKVParallelLinear"),
        o_proj=weight("RowParallelLinear"),
        q_norm=weight("RMSNorm"),
        attn=holding("RadixAttention", k_scale=torch.nn.Parameter(torch.zeros(1))),
    )
    mlp = holding(
        "Qwen2MoeSparseMoeBlock",
        gate=weight("ReplicatedLinear"),
        shared_expert=holding("Qwen2MoeMLP", down_proj=weight("RowParallelLinear")),
        experts=holding("DeepEPMoE", named("FusedMoE"), w13_weight=weight("x").weight),
    )
    layer = holding(
        "Qwen2MoeDecoderLayer", self_attn=attention, mlp=mlp, input_layernorm=weight("RMSNorm")
    )
    embeddings = named("VocabParallelEmbedding")
    inner = holding(
        "Qwen2MoeModel",
        embed_tokens=weight("VocabParallelEmbedding"),
        layers=torch.nn.ModuleList([layer]),
        norm=weight("RMSNorm"),
    )
    return holding(
        "Qwen2MoeForCausalLM",
        model=inner,
        lm_head=weight("ParallelLMHead", base=embeddings),
        visual=holding("Tower", rotary=weight("VisionRotaryEmbedding"), merger=weight("Merger")),
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "attention"),
        ("model.layers.0.self_attn.o_proj.weight", "attention"),
        ("model.layers.0.self_attn.attn.k_scale", "attention"),
        ("model.layers.0.self_attn.w_kc", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.mlp.gate.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", "mlp"),
        ("model.layers.0.mlp.experts.w13_weight", "experts"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "embedding"),
        ("visual.rotary.weight", "other"),
        ("visual.merger.weight", "other"),
        # Of no module that there is.
        ("draft.layers.1.self_attn.q_proj.weight", "attention"),
        ("draft.layers.1.mlp.shared_experts.up_proj.weight", "mlp"),
        ("draft.layers.1.mlp.experts.3.up_proj.weight", "experts"),
        ("draft.layers.1.post_attention_layernorm.weight", "norm"),
        ("draft.wte.weight", "embedding"),
        ("w", "other"),
    ],
)
def test_a_tensor_is_of_the_class_that_its_modules_say_or_else_its_name(
    name: str, layer: str
) -> None:
    assert Layers(mixture()).of(name) == layer


# Updates.


def write(runner: Any, *paths: str) -> Callable[[], Any]:
    def written() -> Any:
        with torch.no_grad():
            for path in paths:
                runner.model.get_parameter(path).add_(1)
        return True, "Success"

    return written


QKV = "model.layers.0.self_attn.qkv_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.w13_weight"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime", fingerprinter=Fingerprinter())


def started(rank: Rank, **more: Any) -> Any:
    model = mixture()
    model.lm_head.weight = model.model.embed_tokens.weight
    runner = rank.runner(model=model, answers={}, **more)
    runner.alloc_memory_pool()
    return runner


def update(rank: Rank, runner: Any, *paths: str) -> ContentChanges:
    runner.answers["disk"] = write(runner, *paths)
    rank.scheduler(runner).update_weights_from_disk(Request())
    contents = rank.last_update().contents
    assert contents is not None
    return contents


def test_an_update_says_how_many_tensors_and_bytes_it_changed_of_each_class(rank: Rank) -> None:
    runner = started(rank)
    changed = update(rank, runner, QKV, EMBEDDINGS)
    assert changed.tensors == {
        "attention": 1,
        "mlp": 0,
        "experts": 0,
        "embedding": 2,
        "norm": 0,
        "other": 0,
    }
    # Tied tensors have one memory.
    assert changed.nbytes == {**dict.fromkeys(changed.tensors, 0), "attention": 16, "embedding": 16}
    assert set(changed.names) == {QKV, EMBEDDINGS, HEAD}
    assert not any(update(rank, runner).tensors.values())
    assert rank.role().updates["disk"].without_change == 1


def test_without_fingerprints_nothing_is_said(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime")
    runner = started(rank)
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert rank.last_update().contents is None
    assert rank.role().layers_missed == {}


def test_what_a_release_has_left_is_neither_what_was_before_nor_what_came(rank: Rank) -> None:
    saver = SimpleNamespace(enabled=True)
    runner = started(rank, memory_saver_adapter=saver)
    scheduler = rank.scheduler(runner)
    parameters = dict(runner.model.named_parameters())
    before = {name: each.detach().clone() for name, each in parameters.items()}
    for each in parameters.values():  # As memory is that has come back.
        each.data.fill_(7)
    scheduler.release_memory_occupation(Request(tags=None))
    scheduler.resume_memory_occupation(Request(tags=None))

    def all_but_the_experts() -> Any:
        for name, each in parameters.items():
            if name != EXPERTS:
                each.data.copy_(before[name] + (name == QKV))
        return True, "Success"

    runner.answers["disk"] = all_but_the_experts
    scheduler.update_weights_from_disk(Request())
    contents = rank.last_update().contents
    assert contents is not None
    # The experts are garbage now, which this update has not brought; what it brought again is as
    # the load had left it.
    assert contents.names == (QKV,)


def test_an_update_that_fails_says_what_it_has_changed_and_misses_nothing(rank: Rank) -> None:
    runner = started(rank)
    for _ in range(8):
        update(rank, runner, QKV, EXPERTS)
    wrote = write(runner, QKV)

    def half() -> Any:
        wrote()
        return False, "Failed to update weights: no such file. Rolling back to original weights."

    for _ in range(8):
        runner.answers["disk"] = half
        rank.scheduler(runner).update_weights_from_disk(Request())
    assert rank.role().layers_missed == {"attention": 0, "experts": 0}
    runner.answers["disk"] = answer(True, "Success")


def test_experts_that_stop_to_come_are_counted_until_they_come_again(rank: Rank) -> None:
    runner = started(rank)
    for _ in range(4):
        update(rank, runner, QKV, EXPERTS)
    missed = []
    for _ in range(4):
        update(rank, runner, QKV)
        missed.append(rank.role().layers_missed["experts"])
    assert missed == [0, 1, 2, 3]  # One late: where buckets are updates, this may go on.
    update(rank, runner)  # Brings nothing at all.
    assert rank.role().layers_missed["experts"] == 3
    update(rank, runner, QKV, EXPERTS)
    update(rank, runner, QKV, EXPERTS)
    assert rank.role().layers_missed == {"attention": 0, "experts": 0}
    assert "embedding" not in rank.role().layers_missed  # It is frozen.


# A real rank.


def sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes by class of layer, by the names in the checkpoint's header."""
    found = dict.fromkeys(("attention", "mlp", "experts", "embedding", "norm"), 0)
    for name, (_, size) in tiny_model.safetensors_header(checkpoint).items():
        if "norm" in name:
            found["norm"] += size
        elif ".experts." in name:
            found["experts"] += size
        elif ".self_attn." in name:
            found["attention"] += size
        else:
            found["mlp" if ".mlp." in name else "embedding"] += size
    return found


def changed(step: Step) -> dict[str, int]:
    update = step.role.last_update
    assert update is not None
    assert update.contents is not None
    return {str(layer): nbytes for layer, nbytes in update.contents.nbytes.items()}


@pytest.mark.release("launches")
def test_in_a_real_rank_experts_that_do_not_come_are_missed(
    newest: Installation, tmp_path: Path
) -> None:
    steps = run_scenario(newest, tmp_path, "experts")
    assert {name: step.problem for name, step in steps.items() if step.problem} == {}
    expected = sizes(tmp_path / "experts" / "a")
    assert changed(steps["all 1"]) == changed(steps["all 4"]) == expected
    assert set(changed(steps["the same"]).values()) == {0}
    without = {**expected, "experts": 0}
    assert changed(steps["dense 1"]) == changed(steps["dense 7"]) == without
    missed = [steps[f"dense {number}"].role.layers_missed["experts"] for number in range(1, 8)]
    assert missed == [0, 1, 2, 3, 4, 5, 6]
    last = steps["dense 7"].role.layers_missed
    assert last == {**dict.fromkeys(expected, 0), "experts": 6}
