# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints that a real SGLang loads: tiny_model.py DIRECTORY [SEED].

Only the standard library: the same files load in every SGLang release, whatever transformers and
tokenizers it brings, and writing one takes a quarter of a second instead of an import of torch.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 128, 256, 2, 4, 2, 32
VISION_HIDDEN, VISION_INTERMEDIATE, VISION_LAYERS, VISION_HEADS = 64, 128, 2, 2
VISION_PATCH, VISION_TEMPORAL, VISION_MERGE = 14, 2, 2


def _shapes(tied: bool, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of a Qwen2.5-VL vision tower, as its checkpoints name them."""
    patch = (3, VISION_TEMPORAL, VISION_PATCH, VISION_PATCH)
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (VISION_HIDDEN, *patch)}
    for layer in range(VISION_LAYERS):
        prefix = f"visual.blocks.{layer}."
        shapes |= {
            prefix + "norm1.weight": (VISION_HIDDEN,),
            prefix + "norm2.weight": (VISION_HIDDEN,),
            prefix + "attn.qkv.weight": (3 * VISION_HIDDEN, VISION_HIDDEN),
            prefix + "attn.qkv.bias": (3 * VISION_HIDDEN,),
            prefix + "attn.proj.weight": (VISION_HIDDEN, VISION_HIDDEN),
            prefix + "attn.proj.bias": (VISION_HIDDEN,),
            prefix + "mlp.gate_proj.weight": (VISION_INTERMEDIATE, VISION_HIDDEN),
            prefix + "mlp.gate_proj.bias": (VISION_INTERMEDIATE,),
            prefix + "mlp.up_proj.weight": (VISION_INTERMEDIATE, VISION_HIDDEN),
            prefix + "mlp.up_proj.bias": (VISION_INTERMEDIATE,),
            prefix + "mlp.down_proj.weight": (VISION_HIDDEN, VISION_INTERMEDIATE),
            prefix + "mlp.down_proj.bias": (VISION_HIDDEN,),
        }
    merged = VISION_HIDDEN * VISION_MERGE**2
    return {
        **shapes,
        "visual.merger.ln_q.weight": (VISION_HIDDEN,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (HIDDEN, merged),
        "visual.merger.mlp.2.bias": (HIDDEN,),
    }


def write(directory: Path, seed: int = 0, *, tied: bool = False, layers: int = LAYERS) -> Path:
    """Write a bfloat16 checkpoint with its tokenizer into `directory`; returns `directory`.

    656,640 bytes of parameters with the defaults. Checkpoints of two seeds differ in values only,
    so an engine that serves one can be updated to the other. With `tied` the output embedding is
    the input embedding, and the file has no `lm_head.weight`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory, _shapes(tied, layers), seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
    }
    # One token a printable ASCII character.
    special = {"<s>": 0, "</s>": 1, "<unk>": 2}
    characters = {chr(code): token for token, code in enumerate(range(32, 127), start=3)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": text, "special": True, **flags}
            for text, token in special.items()
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": ""},
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {"type": "WordLevel", "vocab": special | characters, "unk_token": "<unk>"},
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    for name, content in {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (directory / name).write_text(json.dumps(content, indent=1))
    return directory


def write_vision(directory: Path, seed: int = 0) -> Path:
    """Write what an encoder server loads of a Qwen2.5-VL: the vision tower and all configurations.

    514,688 bytes of parameters. A server with a language model would miss that model's weights.
    """
    write(directory, seed)
    _write_tensors(directory, _vision_shapes(), seed)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "vision_token_id": 6,
        "image_token_id": 7,
        "video_token_id": 8,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_INTERMEDIATE,
            "num_heads": VISION_HEADS,
            "in_channels": 3,
            "out_hidden_size": HIDDEN,
            "patch_size": VISION_PATCH,
            "spatial_patch_size": VISION_PATCH,
            "spatial_merge_size": VISION_MERGE,
            "temporal_patch_size": VISION_TEMPORAL,
            "window_size": 112,
            "fullatt_block_indexes": [VISION_LAYERS - 1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": VISION_PATCH,
        "temporal_patch_size": VISION_TEMPORAL,
        "merge_size": VISION_MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for name, content in {"config.json": config, "preprocessor_config.json": processor}.items():
        (directory / name).write_text(json.dumps(content, indent=1))
    return directory


def _write_tensors(directory: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    generator = random.Random(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in shapes.items():
        start, count = len(data), 1
        for size in shape:
            count *= size
        if name.endswith("norm.weight"):
            values = [1.0] * count
        else:
            values = [generator.gauss(0.0, 0.02) for _ in range(count)]
        # The upper half of a little-endian float32 is the same number in bfloat16, truncated.
        single = struct.pack(f"<{count}f", *values)
        half = bytearray(2 * count)
        half[0::2], half[1::2] = single[2::4], single[3::4]
        data += half
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, len(data)]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def safetensors_header(
    directory: Path, name: str = "model.safetensors"
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes) of every tensor in a checkpoint, read from its safetensors header."""
    with (directory / name).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


if __name__ == "__main__":
    written = write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(sum(size for _, size in safetensors_header(written).values()))
