# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own models that keep weights as plain attributes, tiny and on the CPU, in whatever
release this runs beside: derived_weights.py MODEL_FOR_SETTINGS PORT OUTPUT

Writes for each model what its attributes hold, by SGLang's names for them, and what is captured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from build_pools import publish

from sglang_weight_exporter.capture.references import Registrations
from sglang_weight_exporter.capture.weights import WeightCapture, capture_weights
from sglang_weight_exporter.weight_table import compare_tables, table_rows

REGISTRATIONS = Registrations()

#: What SGLang's loaders bind to `self_attn` beside its parameters.
ATTRIBUTES = ("w_kc", "w_vc", "w_scale", "w_scale_k", "w_scale_v")

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 0,
}


#: Without scaling SGLang has no rotary embedding of DeepSeek's for the CPU.
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 1.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}


def minicpm3() -> torch.nn.Module:
    from sglang.srt.models.minicpm3 import MiniCPM3ForCausalLM
    from transformers import PretrainedConfig

    return MiniCPM3ForCausalLM(
        PretrainedConfig(
            **SIZES,
            architectures=["MiniCPM3ForCausalLM"],
            scale_emb=1,
            scale_depth=1.0,
            dim_model_base=128,
            num_experts=0,
        )
    )


def deepseek_v2() -> torch.nn.Module:
    from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM
    from transformers import PretrainedConfig

    return DeepseekV2ForCausalLM(
        PretrainedConfig(
            **{
                key: value
                for key, value in SIZES.items()
                if not key.startswith("rope_s") and key != "rope_parameters"
            },
            architectures=["DeepseekV2ForCausalLM"],
            rope_scaling=YARN,
            rope_parameters={"rope_theta": 10000.0, **YARN},
            n_routed_experts=0,
            n_shared_experts=None,
            num_experts_per_tok=1,
            moe_layer_freq=1,
            first_k_dense_replace=2,
            moe_intermediate_size=64,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            routed_scaling_factor=1.0,
            norm_topk_prob=False,
            scoring_func="softmax",
            ep_size=1,
        )
    )


def set_up(port: str) -> None:
    from sglang.srt import distributed

    distributed.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    distributed.initialize_model_parallel()


def load(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """As SGLang's loader calls it, with a checkpoint's names."""
    generator = torch.Generator().manual_seed(seed)
    model.load_weights(
        (name, torch.randn(shape, generator=generator).to(torch.bfloat16))
        for name, shape in shapes.items()
    )


def bound(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """What SGLang has bound to its attention layers: name → address and bytes of its storage."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for attribute in ATTRIBUTES:
            value = getattr(layer.self_attn, attribute, None)
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                name = f"model.layers.{index}.self_attn.{attribute}"
                found[name] = (storage.data_ptr(), storage.nbytes())
    return found


def captured(model: torch.nn.Module, previous: WeightCapture | None = None) -> WeightCapture:
    return capture_weights(
        model, role="target", captured_at=0.0, previous=previous, registrations=REGISTRATIONS
    )


def measure(build: Callable[[], torch.nn.Module], *, reloads: bool) -> dict[str, Any]:
    model = build()
    # A checkpoint's names are the parameters', but for those that SGLang fuses.
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows, *columns = parameter.shape
        if "gate_up_proj" in name:
            for half in ("gate_proj", "up_proj"):
                shapes[name.replace("gate_up_proj", half)] = (rows // 2, *columns)
        elif "fused_qkv_a_proj_with_mqa" in name:
            q_rows = SIZES["q_lora_rank"]
            for part, size in (("q_a_proj", q_rows), ("kv_a_proj_with_mqa", rows - q_rows)):
                shapes[name.replace("fused_qkv_a_proj_with_mqa", part)] = (size, *columns)
        else:
            shapes[name] = tuple(parameter.shape)
    load(model, shapes, 0)
    first = captured(model)
    found: dict[str, Any] = {
        "bound": bound(model),
        "derived": {
            row.name: (row.storage_ptr, row.storage_nbytes)
            for row in table_rows(first.table)
            if row.kind == "derived"
        },
        "nbytes": sum(usage.nbytes for usage in first.usage),
        "unique": sum(unique_storages(model).values()),
    }
    if reloads:
        kept = [layer.self_attn.w_kc for layer in model.model.layers]
        load(model, shapes, 1)
        again = captured(model, first)
        changes = compare_tables(first.table, again.table)
        found["bound again"] = bound(model)
        found["moved"] = sorted(changes.names.get("moved", ()))
        del kept
    return found


def unique_storages(model: torch.nn.Module) -> dict[int, int]:
    """Every storage that a parameter, a buffer or one of SGLang's attributes lies in."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return storages | dict(bound(model).values())


if __name__ == "__main__":
    publish(sys.argv[1])
    set_up(sys.argv[2])
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(False), torch.no_grad():
        result = {
            # It deletes what it derives from, and so takes no second checkpoint.
            "minicpm3": measure(minicpm3, reloads=False),
            "deepseek_v2": measure(deepseek_v2, reloads=True),
        }
    Path(sys.argv[3]).write_text(json.dumps(result))
