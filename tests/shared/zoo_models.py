# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of many architectures, from transformers' configurations.

Two seeds, two checkpoints of one shape. Norms are random too: a norm of ones hides a loader that
does something to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **HEADS,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "moe_intermediate_size": 64}
SHARED = {**MOE, "shared_expert_intermediate_size": 64}
HEAD = {"head_dim": 32}
ALL_HEADS = {"num_key_value_heads": 4}
SCALED = {**HEAD, "query_pre_attn_scalar": 32}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Model:
    """A configuration class of transformers and what it is given besides `SIZES`."""

    configuration: str
    settings: dict[str, Any] = field(default_factory=dict)
    #: What SGLang reads in ``config.json`` and transformers does not write there.
    added: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "apertus": Model("ApertusConfig"),
    "arcee": Model("ArceeConfig"),
    "bamba": Model("BambaConfig"),
    "cohere": Model("CohereConfig"),
    "cohere2": Model("Cohere2Config", HEAD),
    "dbrx": Model("DbrxConfig"),
    "deepseek_v3": Model(
        "DeepseekV3Config",
        {
            **ALL_HEADS,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
        {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "ernie4_5": Model("Ernie4_5Config", HEAD),
    "exaone4": Model("Exaone4Config", {"sliding_window": 64}, {"sliding_window_pattern": "LLLG"}),
    "falcon_h1": Model("FalconH1Config"),
    "gemma": Model("GemmaConfig", HEAD),
    "gemma2": Model("Gemma2Config", {**SCALED, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma3": Model("Gemma3TextConfig", {**SCALED, "sliding_window": 64}),
    "glm": Model("GlmConfig", HEAD),
    "glm4": Model("Glm4Config", HEAD),
    "gpt2": Model("GPT2Config", {**ALL_HEADS, "n_embd": 128, "n_layer": 2, "n_head": 4}),
    "gpt_neox": Model("GPTNeoXConfig", ALL_HEADS),
    "gpt_oss": Model("GptOssConfig", {**HEAD, **LOCAL_EXPERTS}, {"swiglu_limit": 7.0}),
    "granite": Model("GraniteConfig"),
    "granitemoe": Model("GraniteMoeConfig", LOCAL_EXPERTS),
    "hunyuan": Model("HunYuanDenseV1Config", {**HEAD, "use_qk_norm": True}),
    "jetmoe": Model("JetMoeConfig", ALL_HEADS),
    "lfm2": Model("Lfm2Config"),
    "llama": Model("LlamaConfig"),
    "llama_tied": Model("LlamaConfig", TIED),
    "mimo": Model("Qwen2Config", {}, {"architectures": ["MiMoForCausalLM"]}),
    "mistral": Model("MistralConfig"),
    "mixtral": Model("MixtralConfig", LOCAL_EXPERTS),
    "nemotron": Model("NemotronConfig"),
    "olmo": Model("OlmoConfig", ALL_HEADS),
    "olmo2": Model("Olmo2Config"),
    "olmoe": Model("OlmoeConfig", {**ALL_HEADS, **EXPERTS}),
    "opt": Model("OPTConfig", {**ALL_HEADS, "ffn_dim": 256, "word_embed_proj_dim": 128}),
    "persimmon": Model("PersimmonConfig", ALL_HEADS),
    # Of four times the hidden size, whatever the configuration says (``PhiMLP``).
    "phi": Model("PhiConfig", {**ALL_HEADS, "intermediate_size": 512}),
    "phi3": Model("Phi3Config"),
    "qwen2": Model("Qwen2Config"),
    "qwen2_moe": Model("Qwen2MoeConfig", SHARED),
    "qwen2_tied": Model("Qwen2Config", TIED),
    "qwen3": Model("Qwen3Config", HEAD),
    "qwen3_moe": Model("Qwen3MoeConfig", {**HEAD, **MOE, "decoder_sparse_step": 1}),
    "qwen3_next": Model(
        "Qwen3NextConfig",
        {
            **HEAD,
            **SHARED,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        {"full_attention_interval": 2},
    ),
    "seed_oss": Model("SeedOssConfig", HEAD),
    "smollm3": Model("SmolLM3Config"),
    "stablelm": Model("StableLmConfig"),
    "starcoder2": Model("Starcoder2Config"),
}


#: Of which an adapter is put in and taken out. It is of projections that are apart in the file.
WITH_ADAPTERS = ("gemma", "granite", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def write(model: Model, directory: Path, seed: int) -> None:
    """Needs torch and transformers."""
    import torch
    import transformers

    kind = getattr(transformers, model.configuration)
    settings = {**SIZES, "torch_dtype": "bfloat16", **model.settings}
    try:
        config = kind(**settings)
    except TypeError:  # Another family's names for the same.
        for name in {"num_key_value_heads", "intermediate_size"} - model.settings.keys():
            del settings[name]
        config = kind(**settings)
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, float("bias" not in name), 0.1)
    made.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **model.added}))


def write_adapter(
    checkpoint: Path, directory: Path, projections: Sequence[str], *, rank: int = 8
) -> None:
    """A LoRA adapter of these projections of a checkpoint, as PEFT writes it. Needs safetensors."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    parts = {}
    with safe_open(str(checkpoint / "model.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118 -- it is no mapping
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in projections and module != name:
                rows, columns = file.get_slice(name).get_shape()
                prefix = f"base_model.model.{module}.lora_"
                parts[prefix + "A.weight"] = torch.randn(rank, columns, dtype=torch.bfloat16)
                parts[prefix + "B.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16)
    if not parts:
        raise ValueError(f"it has no {' and no '.join(projections)}")
    directory.mkdir(exist_ok=True)
    save_file(parts, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": list(projections),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
