# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for engines over all GPUs of a machine, and what a rank has to hold of each.

The expected bytes come from the files' headers and from how the model is cut: of every tensor the
part that SGLang's layer of that name takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import tiny_model

Shapes = dict[str, tuple[int, ...]]

#: Rows and columns of a block that shares one scale, as DeepSeek-V3's checkpoints have them.
BLOCK = 128
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Model:
    """What is written into ``config.json``, and the shapes of its tensors."""

    config: Mapping[str, Any]
    shapes: Shapes

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def experts(self) -> int:
        return int(self.config.get("n_routed_experts", 0))

    def cut(self, **sizes: int) -> Cut:
        return Cut(layers=self.layers, experts=self.experts, **sizes)


def dense(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> Model:
    """Llama's shape, with half as many key-value heads, or eight."""
    head = 32 if hidden < 512 else 128
    kv_heads = min(8, heads // 2)
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        shapes |= _llama_layer(
            f"model.layers.{layer}.", hidden, intermediate, heads, kv_heads, head
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
    }
    return Model(config, shapes)


def _llama_layer(
    prefix: str, hidden: int, intermediate: int, heads: int, kv_heads: int, head: int
) -> Shapes:
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
        prefix + "self_attn.q_proj.weight": (heads * head, hidden),
        prefix + "self_attn.k_proj.weight": (kv_heads * head, hidden),
        prefix + "self_attn.v_proj.weight": (kv_heads * head, hidden),
        prefix + "self_attn.o_proj.weight": (hidden, heads * head),
        prefix + "mlp.gate_proj.weight": (intermediate, hidden),
        prefix + "mlp.up_proj.weight": (intermediate, hidden),
        prefix + "mlp.down_proj.weight": (hidden, intermediate),
    }


def draft_of(target: Model) -> Model:
    """A target's draft of one layer, which loads whole: its own embeddings and head."""
    shapes = {
        name: shape
        for name, shape in target.shapes.items()
        if ".layers." not in name or ".layers.0." in name
    }
    return Model({**target.config, "num_hidden_layers": 1}, shapes)


def eagle_of(target: Model) -> Model:
    """An EAGLE draft of one layer; embeddings and head are the target's."""
    config = {**target.config, "num_hidden_layers": 1, "architectures": ["LlamaForCausalLMEagle"]}
    hidden = int(target.config["hidden_size"])
    shapes: Shapes = {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)}
    prefix = "model.layers.0."
    for name, shape in target.shapes.items():
        if name.startswith(prefix) and "input_layernorm" not in name:
            shapes[name.removeprefix("model.")] = shape
    return Model(config, shapes)


def mixture(
    hidden: int, expert: int, experts: int, layers: int, heads: int, vocabulary: int, *, fp8: bool
) -> Model:
    """DeepSeek-V3's shape: multi-head latent attention, one dense layer, one shared expert."""
    large = hidden >= 512
    groups = max(1, experts // 8)
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, max(2, experts // 4)),
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": max(512, hidden // 4) if large else 64,
        "kv_lora_rank": 512 if large else 32,
        "qk_nope_head_dim": 128 if large else 32,
        "qk_rope_head_dim": 64 if large else 16,
        "v_head_dim": 128 if large else 32,
        "num_nextn_predict_layers": 0,
        "rope_theta": 10000,
    }
    shapes = _mixture_shapes(config)
    if not fp8:
        return Model(config, shapes)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    scales = {
        name + SCALE: (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
        for name, shape in shapes.items()
        if name.endswith(("_proj.weight", "_with_mqa.weight"))
    }
    return Model(config, {**shapes, **scales})


def _mixture_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, heads, vocabulary = (
        config[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")
    )
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (
        config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            attention + "q_a_proj.weight": (q_lora, hidden),
            attention + "q_a_layernorm.weight": (q_lora,),
            attention + "q_b_proj.weight": (heads * (nope + rope), q_lora),
            attention + "kv_a_proj_with_mqa.weight": (kv_lora + rope, hidden),
            attention + "kv_a_layernorm.weight": (kv_lora,),
            attention + "kv_b_proj.weight": (heads * (nope + value), kv_lora),
            attention + "o_proj.weight": (hidden, heads * value),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= _mlp(mlp, hidden, config["intermediate_size"])
            continue
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        shapes |= {
            mlp + "gate.weight": (experts, hidden),
            mlp + "gate.e_score_correction_bias": (experts,),
        }
        for owner in ("shared_experts", *(f"experts.{number}" for number in range(experts))):
            shapes |= _mlp(f"{mlp}{owner}.", hidden, inner)
    return shapes


def _mlp(prefix: str, hidden: int, intermediate: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (intermediate, hidden),
        prefix + "up_proj.weight": (intermediate, hidden),
        prefix + "down_proj.weight": (hidden, intermediate),
    }


# --- files --------------------------------------------------------------------------------------


def write(model: Model, directory: Path, seed: int, device: str) -> Path:
    """Random weights, made on the device, a file a layer. Needs torch."""
    tiny_model.write(directory)
    (directory / "model.safetensors").unlink()
    common = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**common, **model.config}, indent=1))
    files: dict[str, Shapes] = {}
    for name, shape in model.shapes.items():
        layer = _layer(name)
        file = "rest" if layer is None else f"layer-{layer:03}"
        files.setdefault(f"model-{file}.safetensors", {})[name] = shape
    with ThreadPoolExecutor(4) as pool:
        written = [
            pool.submit(_write_file, directory / file, model, shapes, 1000 * seed + number, device)
            for number, (file, shapes) in enumerate(files.items())
        ]
        for each in written:
            each.result()
    index = {name: file for file, shapes in files.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return directory


def _write_file(path: Path, model: Model, shapes: Shapes, seed: int, device: str) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device=device).manual_seed(seed)
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith(SCALE):
            tensors[name] = noise.abs().add_(0.5).mul_(2e-4)
        elif name + SCALE in model.shapes:
            tensors[name] = noise.mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = noise.mul_(0.01)
        elif "norm" in name:
            tensors[name] = noise.mul_(0.1).add_(1.0).to(torch.bfloat16)
        else:
            tensors[name] = noise.mul_(0.02).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def header(directory: Path) -> dict[str, int]:
    """Name → bytes of every tensor of a checkpoint, from its files' headers."""
    return {
        name: size
        for path in sorted(directory.glob("*.safetensors"))
        for name, (_, size) in tiny_model.safetensors_header(directory, path.name).items()
    }


# --- shares -------------------------------------------------------------------------------------

#: What every rank of a stage has whole: norms, and SGLang's ``ReplicatedLinear`` and routers
#: (``models/deepseek_v2.py``); ``fc`` of an EAGLE draft (``models/llama_eagle.py``).
_WHOLE = re.compile(r"norm|\.mlp\.gate\.|kv_a_proj_with_mqa|q_a_proj|^fc\.")


@dataclass(frozen=True)
class Cut:
    """Into how many parts a model is cut, as SGLang's settings say."""

    layers: int
    experts: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1
    #: Replicas of attention inside the tensor-parallel group (``--enable-dp-attention``).
    dp: int = 1
    #: Experts that EPLB keeps twice.
    redundant: int = 0

    def share(self, tensors: Mapping[str, int], stage: int = 0) -> int:
        """Bytes that each rank of a pipeline stage has to hold."""
        total = sum(self._part(name, stage) * nbytes for name, nbytes in tensors.items())
        assert Fraction(total).denominator == 1, f"{self} divides a tensor unevenly"
        return int(total)

    def _part(self, name: str, stage: int) -> Fraction:
        # SGLang's Llama makes its head on every stage (``models/llama.py``), DeepSeek on the last.
        everywhere = name == "lm_head.weight" and not self.experts
        if stage != self._stage(name) and not everywhere:
            return Fraction(0)
        if _WHOLE.search(name):
            return Fraction(1)
        if ".experts." in name:
            # Each of the rank's slots has one expert, cut among the ranks that have it together.
            slots = Fraction(self.experts + self.redundant, self.experts)
            return slots / self.ep / (self.tp // self.ep)
        if "self_attn" in name or "embed_tokens" in name:
            return Fraction(1, self.tp // self.dp)
        return Fraction(1, self.tp)

    def _stage(self, name: str) -> int:
        """Of a pipeline whose stages have the same number of layers (``get_pp_indices``)."""
        layer = _layer(name)
        if layer is None:
            return 0 if "embed_tokens" in name else self.pp - 1
        return layer * self.pp // self.layers


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if found is None else int(found[1])
