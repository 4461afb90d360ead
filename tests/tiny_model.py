# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random Llama checkpoints that a real SGLang loads: tiny_model.py DIRECTORY [SEED].

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


def write(directory: Path, seed: int = 0, *, tied: bool = False, layers: int = LAYERS) -> Path:
    """Write a bfloat16 checkpoint with its tokenizer into `directory`; returns `directory`.

    656,640 bytes of parameters with the defaults. Checkpoints of two seeds differ in values only,
    so an engine that serves one can be updated to the other. With `tied` the output embedding is
    the input embedding, and the file has no `lm_head.weight`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in _shapes(tied, layers).items():
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


def safetensors_header(directory: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes) of every tensor in a checkpoint, read from its safetensors header."""
    with (directory / "model.safetensors").open("rb") as file:
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
