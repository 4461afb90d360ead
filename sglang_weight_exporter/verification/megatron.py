# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Shards of Megatron's GPT models under Hugging Face's names, which is what trainers send.

Megatron interleaves query, key and value heads by group, and each rank has its part of the gate
before its part of the up projection. Both are blocks of what is sent. Where torch is, its tensors
are cut; here nothing needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Cut(NamedTuple):
    """How the parameters of a process are cut, and the sizes of the model's attention."""

    heads: int
    #: Key-value heads (Megatron's query groups).
    kv_heads: int
    head_size: int
    vocabulary: int
    rank: int = 0
    size: int = 1
    #: The same of experts (``expert_tensor_parallel``).
    expert_rank: int = 0
    expert_size: int = 1
    #: The first layer and expert of this process.
    first_layer: int = 0
    first_expert: int = 0


class Block(NamedTuple):
    """A tensor that is sent, and where in it this process's part begins."""

    name: str
    local: Any
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class UnknownParameterError(Exception):
    """No rule says what a parameter is sent as."""


_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
#: Inside of a layer, of what each process has whole.
_WHOLE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.)?(?P<linear>linear_fc[12])\.weight"
    r"(?P<grouped>\d+)?"
)


def hugging_face(name: str, tensor: Any, cut: Cut) -> Iterator[Block]:
    """What a parameter of a Megatron-Core GPT is sent as. Raises UnknownParameterError."""
    name = re.sub(r"^(module\.)+", "", name)
    if name in _TOP:
        yield _of_top(name, tensor, cut)
        return
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        raise UnknownParameterError(f"{name} is no parameter of a GPT of Megatron's.")
    prefix, rest = f"model.layers.{cut.first_layer + int(layer[1])}.", layer[2]
    expert = _EXPERT.fullmatch(rest)
    if rest in _WHOLE:
        yield _whole(prefix + _WHOLE[rest], tensor)
    elif rest in {"self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"}:
        yield from _qkv(prefix, rest.rpartition(".")[2], tensor, cut)
    elif rest == "self_attention.linear_proj.weight":
        yield _columns(f"{prefix}self_attn.o_proj.weight", tensor, cut.rank, cut.size)
    elif expert is not None and (expert["local"] or expert["grouped"]):
        number = cut.first_expert + int(expert["local"] or expert["grouped"])
        place = f"{prefix}mlp.experts.{number}."
        yield from _mlp(place, expert["linear"], tensor, cut.expert_rank, cut.expert_size)
    elif rest in {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}:
        yield from _mlp(f"{prefix}mlp.", rest.split(".")[1], tensor, cut.rank, cut.size)
    elif rest.startswith("mlp.shared_experts.linear_fc"):
        place = f"{prefix}mlp.shared_expert."
        yield from _mlp(place, rest.split(".")[2], tensor, cut.rank, cut.size)
    else:
        raise UnknownParameterError(f"What {name} is sent as is not known.")


def _whole(name: str, tensor: Any) -> Block:
    return Block(name, tensor, tuple(tensor.shape), (0,) * len(tensor.shape))


def _of_top(name: str, tensor: Any, cut: Cut) -> Block:
    if name.startswith("decoder"):
        return _whole(_TOP[name], tensor)
    first = cut.rank * tensor.shape[0]  # Megatron fills the vocabulary up; that is not sent.
    own = max(0, min(tensor.shape[0], cut.vocabulary - first))
    shape = (cut.vocabulary, tensor.shape[1])
    return Block(_TOP[name], tensor[:own], shape, (min(first, cut.vocabulary), 0))


def _rows(name: str, tensor: Any, rank: int, size: int) -> Block:
    own, *others = tensor.shape
    return Block(name, tensor, (own * size, *others), (own * rank, *[0] * len(others)))


def _columns(name: str, tensor: Any, rank: int, size: int) -> Block:
    rows, own = tensor.shape
    return Block(name, tensor, (rows, own * size), (0, own * rank))


def _qkv(prefix: str, kind: str, tensor: Any, cut: Cut) -> Iterator[Block]:
    """By group: its query heads, its key head, its value head."""
    others = tuple(tensor.shape[1:])
    queries = cut.heads // cut.kv_heads
    grouped = tensor.reshape(-1, queries + 2, cut.head_size, *others)
    for name, first, after in (
        ("q", 0, queries),
        ("k", queries, queries + 1),
        ("v", queries + 1, queries + 2),
    ):
        own = grouped[:, first:after].reshape(-1, *others)
        yield _rows(f"{prefix}self_attn.{name}_proj.{kind}", own, cut.rank, cut.size)


def _mlp(prefix: str, linear: str, tensor: Any, rank: int, size: int) -> Iterator[Block]:
    if linear == "linear_fc2":
        yield _columns(f"{prefix}down_proj.weight", tensor, rank, size)
        return
    half = tensor.shape[0] // 2
    yield _rows(f"{prefix}gate_proj.weight", tensor[:half], rank, size)
    yield _rows(f"{prefix}up_proj.weight", tensor[half:], rank, size)
