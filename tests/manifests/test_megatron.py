# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron's shards, each summed by its rank, are what slime's own converter makes of the whole."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import torch

from sglang_weight_exporter import Cut, megatron_tensors, sum_tensors, write_manifest
from sglang_weight_exporter.verification.manifest import read_parts
from sglang_weight_exporter.verification.megatron import UnknownParameterError

HEADS, GROUPS, HEAD, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 4, 16, 64, 96, 200
SIZES = types.SimpleNamespace(
    num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD, hidden_size=HIDDEN
)
LAYER = "module.module.decoder.layers.0."


def whole(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "module.module.embedding.word_embeddings.weight": (256, HIDDEN),
        "module.module.output_layer.weight": (256, HIDDEN),
        "module.module.decoder.final_layernorm.weight": (HIDDEN,),
        LAYER + "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
        LAYER + "self_attention.linear_qkv.bias": ((HEADS + 2 * GROUPS) * HEAD,),
        LAYER + "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        LAYER + "self_attention.q_layernorm.weight": (HEAD,),
        LAYER + "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
        LAYER + "mlp.linear_fc1.weight": (2 * INTERMEDIATE, HIDDEN),
        LAYER + "mlp.linear_fc2.weight": (HIDDEN, INTERMEDIATE),
        LAYER + "mlp.experts.linear_fc1.weight3": (2 * INTERMEDIATE, HIDDEN),
        LAYER + "mlp.experts.linear_fc2.weight3": (HIDDEN, INTERMEDIATE),
        LAYER + "mlp.router.weight": (4, HIDDEN),
    }
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def shard(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """As Megatron cuts it: slime's ``all_gather_param`` puts it together again."""
    if "norm" in name or "router" in name:
        return tensor
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=int("linear_proj" in name or "linear_fc2" in name))[rank]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_are_what_is_sent(tmp_path: Path, size: int) -> None:
    source = Path(__file__).with_name("trainers") / "slime_qwen3moe.py.txt"
    own: dict[str, object] = {}
    exec(compile(source.read_text(), source, "exec"), own)
    convert = own["convert_qwen3moe_to_hf"]
    assert callable(convert)
    held = whole(torch.Generator().manual_seed(1))
    sent = {
        name: part[:VOCABULARY] if "embed" in name or "lm_head" in name else part
        for megatron, tensor in held.items()
        for name, part in convert(SIZES, megatron, tensor)
    }
    path = tmp_path / "manifest_1.json"
    for rank in range(size):
        cut = Cut(HEADS, GROUPS, HEAD, VOCABULARY, rank, size, rank, size)
        here = [(name, shard(name, tensor, rank, size)) for name, tensor in held.items()]
        write_manifest(path, megatron_tensors(here, cut), cuts=(1, 2, 4), part=(rank, size))
    found = read_parts(path)
    assert found is not None
    assert found.sent == sum_tensors(sent, cuts=(1, 2, 4))


def test_what_is_not_known_is_refused() -> None:
    cut = Cut(HEADS, GROUPS, HEAD, VOCABULARY)
    with pytest.raises(UnknownParameterError, match="rotary"):
        megatron_tensors([("decoder.layers.0.rotary.weight", torch.ones(1))], cut)
