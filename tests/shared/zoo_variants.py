# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a name of the zoo has behind its plus: adapters, quantization, a draft beside the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo_models import write_adapter

ADAPTED = ("q_proj", "v_proj")
LORA = "--enable-lora --max-lora-rank 8 --max-loras-per-batch 2 --lora-target-modules "
LORA += " ".join(ADAPTED)
DRAFT = "--speculative-algorithm EAGLE --speculative-num-steps 2 --speculative-eagle-topk 1"
DRAFT += " --speculative-num-draft-tokens 3 --speculative-draft-attention-backend triton"
DRAFT += " --speculative-draft-model-path {own}"
#: Inputs of a layer that have a scale together: what Marlin's kernels take, and divides all sizes.
GROUP = 64
#: Of four bits in 32.
PACKED = 8

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    flags: str = ""
    #: Makes its tensors and its configuration of the model's.
    change: Callable[[Tensors, dict[str, Any]], Tensors] | None = None
    #: What is looked at; a draft may have a checkpoint of its own beside the target's.
    role: str = "target"
    draft: bool = False
    adapted: bool = False


def awq(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """As AutoAWQ writes it: outputs are packed (``AWQMarlinLinearScheme.create_weights``)."""
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return _quantized(tensors, lambda rows, columns: {"qweight": (columns, rows // PACKED)})


def gptq(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """As GPTQModel writes it: inputs are packed (``GPTQMarlinLinearScheme.create_weights``)."""
    import torch

    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    found = _quantized(tensors, lambda rows, columns: {"qweight": (columns // PACKED, rows)})
    for name in [each for each in found if each.endswith(".qweight")]:
        columns = found[name].shape[0] * PACKED
        groups = torch.arange(columns, dtype=torch.int32) // GROUP
        found[name.removesuffix("qweight") + "g_idx"] = groups
    return found


def _quantized(
    tensors: Tensors, packed: Callable[[int, int], dict[str, tuple[int, int]]]
) -> Tensors:
    """Random numbers in place of what projections have."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        if not re.search(r"(_proj|\.w[123])\.weight$", name):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        shapes = {**packed(rows, columns), "qzeros": (columns // GROUP, rows // PACKED)}
        front = name.removesuffix("weight")
        for part, shape in shapes.items():
            found[front + part] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
        scales = torch.rand(columns // GROUP, rows) / 100
        found[front + "scales"] = scales.to(tensor.dtype)
    return found


def mtp(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """A layer that predicts one token more, as DeepSeek-V3 (``DeepseekV3ForCausalLMNextN``) and
    MiMo (``MiMoMTP``) have it in their checkpoints."""
    import torch

    config["num_nextn_predict_layers"] = 1
    hidden = config["hidden_size"]
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    if config["architectures"] == ["MiMoForCausalLM"]:
        own, square = "model.mtp_layers.0.", "input_proj.weight"
        norms = "token_layernorm.weight", "hidden_layernorm.weight", "final_layernorm.weight"
    else:
        own, square = f"model.layers.{config['num_hidden_layers']}.", "eh_proj.weight"
        norms = "enorm.weight", "hnorm.weight", "shared_head.norm.weight"
    shapes = {own + square: (hidden, 2 * hidden), **{own + norm: (hidden,) for norm in norms}}
    shapes |= {
        own + name.removeprefix(last): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    kinds = {name.replace(last, own): tensor.dtype for name, tensor in tensors.items()}
    added = {
        name: torch.randn(shape).mul_(0.02).to(kinds.get(name, torch.bfloat16))
        for name, shape in shapes.items()
    }
    if square == "eh_proj.weight":
        added[own + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        added[own + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return {**tensors, **added}


def eagle(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The draft's own: a layer without a norm before it, and no embeddings
    (``LlamaForCausalLMEagle``)."""
    import torch

    config |= {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    hidden = config["hidden_size"]
    found = {
        name.removeprefix("model."): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    found["fc.weight"] = torch.randn(hidden, 2 * hidden).mul_(0.02).to(torch.bfloat16)
    found["fc.bias"] = torch.randn(hidden).to(torch.bfloat16)
    return found


VARIANTS = {
    "": Variant(),
    "lora": Variant(LORA, adapted=True),
    "awq": Variant(change=awq),
    "gptq": Variant(change=gptq),
    "mtp": Variant(DRAFT, change=mtp, role="draft"),
    "eagle": Variant(DRAFT, change=eagle, role="draft", draft=True),
}
#: A CPU says why it does not load those that are quantized.
VARIED = (
    *("llama+eagle", "mimo+mtp", "deepseek_v3+mtp"),
    *("llama+awq", "qwen3_moe+awq", "llama+gptq", "qwen3_moe+gptq"),
)


def variant_of(name: str) -> Variant:
    """Any other is a quantization of SGLang's, made as the checkpoint is loaded."""
    return VARIANTS.get(name) or Variant(f"--quantization {name}")


def change(variant: Variant, checkpoint: Path, to: Path) -> None:
    """Writes what the variant makes of a checkpoint, and what is beside it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if variant.adapted:
        write_adapter(checkpoint, checkpoint.parent / "adapter", ADAPTED)
    if variant.change is None:
        return
    config = json.loads((checkpoint / "config.json").read_text())
    with safe_open(str(checkpoint / "model.safetensors"), "pt") as file:
        # Copies: the file that they lie in is written anew.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors = variant.change(tensors, config)
    to.mkdir(exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
