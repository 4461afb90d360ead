# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``verify`` says of healthy engines whose loaders do more than copy.

Each case is a loader of SGLang's, named beside it, done again in NumPy: the engine is right, so
nothing may be called different, and whether enough is equal decides between the statuses 0 and 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import msgspec  # noqa: E402
from array_ranks import Arrays, bits, command, noise, save, serve, values  # noqa: E402
from published import PublishedRank  # noqa: E402

from sglang_weight_exporter.records.engine import Device  # noqa: E402


def half(array: Any, rank: int) -> Any:
    return np.split(array, 2)[rank]


class Place:
    """A checkpoint and the ranks that loaded it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ranks: list[PublishedRank] = []

    def checkpoint(self, tensors: Arrays, file: str = "model.safetensors", **config: Any) -> Path:
        save(self.path / "model" / file, tensors)
        if config:
            (self.path / "model" / "config.json").write_text(json.dumps(config))
        return self.path / "model"

    def index(self, places: Mapping[str, str]) -> None:
        text = json.dumps({"weight_map": dict(places)})
        (self.path / "model" / "model.safetensors.index.json").write_text(text)

    def serve(self, tensors: Arrays, **more: Any) -> None:
        self.ranks.append(serve(self.path / "run", tensors, **more))

    def run_on(self, product: str = "", packing: str = "") -> None:
        """Have the last rank run on that device."""
        rank = self.ranks[-1]
        rank.devices = (Device(name="cpu", product=product, packing=packing),)
        rank.write_again()

    def verify(self, *arguments: str) -> tuple[int, str]:
        return command(
            *("verify", "--runtime-dir", self.path / "run", "--recorded"),
            *(arguments or ("--checkpoint", self.path / "model")),
        )

    def assert_healthy(self, status: int, *arguments: str) -> str:
        found, text = self.verify(*arguments)
        assert " 0 different" in text, text
        assert "  different  " not in text, text
        assert found == status, text
        return text


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


LAYER = "model.layers.0."
NORM = LAYER + "input_layernorm.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def test_norms_that_get_one_more(place: Place) -> None:
    """``models/gemma.py`` adds 1 to each norm."""
    table, norm = noise(64, 32), noise(32)
    place.checkpoint({EMBEDDINGS: table, NORM: norm}, architectures=["GemmaForCausalLM"])
    more = bits(values(norm) + np.float32(1))
    place.serve({EMBEDDINGS: table, NORM: more}, architecture="GemmaForCausalLM")
    assert f"cannot be compared  {NORM}" in place.assert_healthy(0)


def test_a_square_weight_that_is_transposed(place: Place) -> None:
    """GPT-2's ``Conv1D``, ``models/gpt2.py``."""
    name, square = "transformer.h.0.attn.c_proj.weight", noise(32, 32)
    place.checkpoint({name: square, "transformer.wte.weight": square[:8]})
    transposed = np.ascontiguousarray(square.T)
    place.serve({name: transposed}, architecture="GPT2LMHeadModel")
    assert f"cannot be compared  {name}" in place.assert_healthy(2)


def test_names_with_another_prefix(place: Place) -> None:
    """SGLang's Transformers backend."""
    table = noise(64, 32)
    place.checkpoint({"gpt_neox.embed_in.weight": table}, architectures=["GPTNeoXForCausalLM"])
    place.serve({"model.gpt_neox.embed_in.weight": table}, architecture="GPTNeoXForCausalLM")
    text = place.assert_healthy(2)
    assert "no rank here holds  gpt_neox.embed_in.weight" in text


def test_fused_in_the_file_and_narrowed_apart(place: Place) -> None:
    """Phi-3 and GLM-4 with tensor parallelism: ``models/llama.py``, ``QKVParallelLinear``."""
    q, k, v, gate, up = noise(64, 64), noise(32, 64), noise(32, 64), noise(128, 64), noise(128, 64)
    qkv, gate_up = LAYER + "self_attn.qkv_proj.weight", LAYER + "mlp.gate_up_proj.weight"
    stored = {qkv: np.concatenate([q, k, v]), gate_up: np.concatenate([gate, up])}
    place.checkpoint(stored, num_attention_heads=8, num_key_value_heads=4)
    for rank in range(2):
        own = {
            qkv: np.concatenate([half(q, rank), half(k, rank), half(v, rank)]),
            gate_up: np.concatenate([half(gate, rank), half(up, rank)]),
        }
        place.serve(own, architecture="Phi3ForCausalLM", tp=rank, tp_size=2)
    place.assert_healthy(2)


def test_a_convolution_that_is_cut_part_by_part(place: Place) -> None:
    """Qwen3-Next: ``mamba_v2_sharded_weight_loader`` of ``layers/attention/mamba/mamba.py``."""
    name = LAYER + "linear_attn.conv1d.weight"
    parts = noise(16, 1, 4), noise(16, 1, 4), noise(32, 1, 4)
    place.checkpoint({name: np.concatenate(parts)}, architectures=["Qwen3NextForCausalLM"])
    for rank in range(2):
        own = np.concatenate([half(part, rank) for part in parts])
        place.serve({name: own}, architecture="Qwen3NextForCausalLM", tp=rank, tp_size=2)
    place.assert_healthy(2)


def test_rows_that_are_put_in_another_order(place: Place) -> None:
    """Llama 4: ``permute_qk_weight_for_rotary`` of ``models/mllama4.py``."""
    q, k, v = noise(64, 64), noise(32, 64), noise(32, 64)
    prefix = "language_model.model.layers.0.self_attn."
    stored = {
        prefix + f"{part}_proj.weight": held for part, held in zip("qkv", (q, k, v), strict=True)
    }
    place.checkpoint(stored, architectures=["Llama4ForConditionalGeneration"])

    def permuted(held: Any, heads: int) -> Any:
        return held.reshape(heads, -1, 2, 64).transpose(0, 2, 1, 3).reshape(held.shape)

    own = {prefix + "qkv_proj.weight": np.concatenate([permuted(q, 8), permuted(k, 4), v])}
    place.serve(own, architecture="Llama4ForConditionalGeneration")
    place.assert_healthy(2)


def test_norms_that_are_scaled(place: Place) -> None:
    """LongCat: ``models/longcat_flash.py``, with ``mla_scale_q_lora``."""
    name, norm = LAYER + "self_attn.0.q_a_layernorm.weight", noise(64)
    place.checkpoint({name: norm}, architectures=["LongcatFlashForCausalLM"])
    own = {name: bits(values(norm) * np.float32(2))}
    place.serve(own, architecture="LongcatFlashForCausalLM")
    place.assert_healthy(2)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
def test_tied_embeddings_with_an_output_in_the_file(place: Place, architecture: str) -> None:
    """SGLang passes over the file's (``models/qwen2.py``: ``tie_word_embeddings``)."""
    table = noise(64, 32)
    stored = {EMBEDDINGS: table, "lm_head.weight": noise(64, 32)}
    place.checkpoint(stored, architectures=[architecture], tie_word_embeddings=True)
    own = {EMBEDDINGS: table, "lm_head.weight": table}
    place.serve(own, architecture=architecture)
    assert "2 equal" in place.assert_healthy(0)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {}),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, {}),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, {}),
        ({"text_config": {"compression_config": {"quant_method": "compressed-tensors"}}}, {}),
        ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}),
        ({}, {"quantize_config.json": {"bits": 4}}),
    ],
)
def test_quantization_wherever_it_is_said(
    place: Place, config: dict[str, Any], more: dict[str, Any]
) -> None:
    """The places that ``get_quant_config`` of ``model_loader/weight_utils.py`` looks at. Scales are
    made anew as they are loaded, for one."""
    table, scale = noise(64, 32), np.ones(1, dtype=np.float32)
    name = LAYER + "mlp.down_proj.weight_scale"
    path = place.checkpoint(
        {EMBEDDINGS: table, name: scale}, architectures=["LlamaForCausalLM"], **config
    )
    for file, content in more.items():
        (path / file).write_text(json.dumps(content))
    place.serve({EMBEDDINGS: table, name: scale * 2}, architecture="LlamaForCausalLM")
    assert "1 equal" in place.assert_healthy(0)


def test_scales_that_were_never_loaded_are_no_success(place: Place) -> None:
    """Half of what the rank holds is what ``torch.empty`` left there."""
    name = LAYER + "mlp.down_proj.weight_scale_inv"
    stored = {EMBEDDINGS: noise(16, 16), name: noise(32, 16)}
    place.checkpoint(stored, quantization_config={"quant_method": "fp8"})
    place.serve({**stored, name: noise(32, 16)}, quantization="fp8")
    assert f"cannot be compared  {name}" in place.assert_healthy(2)


# --- files beside one another ---------------------------------------------------------------------

WHOLE = {EMBEDDINGS: noise(64, 16), NORM: noise(16)}


def test_an_index_that_names_a_tensor_that_its_file_lacks(place: Place) -> None:
    """SGLang asks the index for files alone: ``filter_duplicate_safetensors_files``."""
    place.checkpoint(WHOLE)
    place.index(dict.fromkeys([*WHOLE, "mtp.fc.weight"], "model.safetensors"))
    place.serve(WHOLE)
    text = place.assert_healthy(0)
    assert "The index names mtp.fc.weight, which no file has." in text


def test_an_index_that_chooses_among_duplicates(place: Place) -> None:
    """SGLang loads each file whole, one after another, whatever the index has of it."""
    stale = noise(16)
    place.checkpoint(WHOLE, "a.safetensors")
    place.checkpoint({NORM: stale, "ple.weight": noise(4, 4)}, "b.safetensors")
    place.index({**dict.fromkeys(WHOLE, "a.safetensors"), "ple.weight": "b.safetensors"})
    place.serve({**WHOLE, NORM: stale}, architecture="LlamaForCausalLM")
    text = place.assert_healthy(0)
    assert "it is in a.safetensors and in b.safetensors" in text


def test_shards_that_sglang_saved(place: Place) -> None:
    """``--load-format sharded_state``: ``ShardedStateLoader.DEFAULT_PATTERN``."""
    name = LAYER + "mlp.down_proj.weight"
    for rank in range(2):
        own = {name: noise(16, 8), NORM: WHOLE[NORM]}
        place.checkpoint(own, f"model-rank-{rank}-part-0.safetensors")
        place.serve(own, tp=rank, tp_size=2)
    assert place.assert_healthy(0).count("2 equal") == 2
    status, text = place.verify("--checkpoint", str(place.path / "model"), "--rank", "1")
    assert (status, text.count("2 equal")) == (0, 1), text
    status, text = command("manifest", place.path / "model")
    assert status == 2
    assert "parts of ranks" in text


@pytest.mark.parametrize("index", [False, True])
def test_the_makers_own_format_beside_transformers(place: Place, index: bool) -> None:
    """Mistral's: SGLang takes ``model.safetensors``."""
    place.checkpoint(WHOLE)
    place.checkpoint({**WHOLE, NORM: noise(16)}, "consolidated.safetensors")
    if index:
        place.index(dict.fromkeys(WHOLE, "model.safetensors"))
    place.serve(WHOLE)
    place.assert_healthy(0)


def test_a_draft_beside_the_index(place: Place) -> None:
    """``maybe_add_mtp_safetensors`` of ``model_loader/weight_utils.py``."""
    name = "model.layers.1.eh_proj.weight"
    own = {name: noise(16, 32)}
    place.checkpoint(WHOLE)
    place.checkpoint(own, "mtp.safetensors")
    place.index(dict.fromkeys(WHOLE, "model.safetensors"))
    place.serve(own, role="draft")
    place.assert_healthy(0, "--checkpoint", str(place.path / "model"), "--role", "draft")


# --- how much was compared ------------------------------------------------------------------------


def test_names_that_the_engine_does_not_have(place: Place, tmp_path: Path) -> None:
    """A trainer's names: SGLang answers success and skips what it does not know."""
    trained = {"model.norm.weight": noise(16)}
    trained |= {f"blocks.{number}.attn1.to_q.weight": noise(16, 16) for number in range(112)}
    served = {name.replace("attn1.", ""): held for name, held in trained.items()}
    manifest = tmp_path / "manifest.json"
    assert command("manifest", place.checkpoint(trained), "-o", manifest) == (0, "")
    place.serve(served)
    text = place.assert_healthy(2, "--manifest", str(manifest))
    assert "32 of 57,376 bytes are equal (0.1%)" in text
    assert "no rank here holds  blocks.0.attn1.to_q.weight and 111 more" in text
    place.assert_healthy(0, "--manifest", str(manifest), "--require", "0.0001")


@pytest.mark.parametrize(("required", "status"), [("0.99", 2), ("0.75", 0), ("0", 0), ("1", 2)])
def test_how_much_has_to_be_equal(place: Place, required: str, status: int) -> None:
    place.checkpoint({EMBEDDINGS: noise(64, 16), "lm_head.weight": (head := noise(192, 16))})
    place.serve({EMBEDDINGS: noise(64, 16), "lm_head.weight": head})
    model = str(place.path / "model")
    text = place.assert_healthy(status, "--checkpoint", model, "--require", required)
    assert ("--require asks for" in text) == (status == 2)


@pytest.mark.parametrize("required", ["-0.1", "99", "nan", "all"])
def test_a_share_that_is_none_is_refused(place: Place, required: str) -> None:
    status, text = place.verify("--require", required)
    assert status == 2
    assert "--require" in text


def test_one_rank_with_too_little_is_too_little(place: Place) -> None:
    place.checkpoint(WHOLE)
    place.serve(WHOLE)
    place.serve({**WHOLE, EMBEDDINGS: noise(64, 16)}, engine="30001")
    place.assert_healthy(2)


@pytest.mark.parametrize("words", [("--engine", "7"), ("--rank", "tp=3"), ("--role", "draft")])
def test_a_choice_of_nothing_is_said(place: Place, words: tuple[str, str]) -> None:
    place.checkpoint(WHOLE)
    place.serve(WHOLE)
    status, text = place.verify("--checkpoint", str(place.path / "model"), *words)
    assert status == 2
    assert "There are these:\n  --engine 30000 --rank tp=0" in text


def test_names_that_would_move_the_cursor(place: Place) -> None:
    name = "model.\x1b[2J.weight"
    place.checkpoint({name: noise(4), NORM: WHOLE[NORM]})
    place.serve({name: noise(4), NORM: WHOLE[NORM]})
    text = place.assert_healthy(0)
    assert "\x1b" not in text
    assert r"model.\x1b[2J.weight" in text


# --- what is different ----------------------------------------------------------------------------


def test_a_confirmed_architecture_with_other_bytes(place: Place) -> None:
    """The zoo has seen what 0.5.23 makes of Llama on a CPU, so other bytes are a difference there,
    and nowhere else."""
    table, norm = noise(64, 32), noise(32)
    place.checkpoint({EMBEDDINGS: table, NORM: norm}, architectures=["LlamaForCausalLM"])
    place.serve({EMBEDDINGS: table, NORM: noise(32)}, architecture="LlamaForCausalLM")
    status, text = place.verify()
    assert status == 1, text
    assert f"different  {NORM}" in text
    place.run_on(packing="AMX")
    assert f"cannot be compared  {NORM}" in place.assert_healthy(0)


def test_what_quantization_leaves_as_it_is(place: Place) -> None:
    """Of fp8 weights norms and embeddings are the file's; the zoo has seen it on an H200."""
    scale = LAYER + "mlp.down_proj.weight_scale"
    stored = {EMBEDDINGS: noise(64, 32), NORM: noise(32), scale: noise(1)}
    place.checkpoint(stored, quantization_config={"quant_method": "fp8"})
    served = {**stored, NORM: noise(32), scale: noise(1)}
    place.serve(served, architecture="LlamaForCausalLM", quantization="fp8")
    place.run_on("NVIDIA H200")
    status, text = place.verify()
    assert status == 1, text
    assert f"different  {NORM}" in text
    assert f"cannot be compared  {scale}" in text


@pytest.mark.parametrize(
    "more",
    [
        {"release": "0.5.9999"},
        {"architecture": "NobodyForCausalLM"},
        {"quantization": "fp8"},
        {"architecture": "GemmaForCausalLM"},
    ],
)
def test_what_nobody_has_confirmed_is_not_different(place: Place, more: dict[str, str]) -> None:
    table, norm = noise(64, 32), noise(32)
    place.checkpoint({EMBEDDINGS: table, NORM: norm})
    place.serve(
        {EMBEDDINGS: table, NORM: noise(32)}, **{"architecture": "LlamaForCausalLM", **more}
    )
    place.assert_healthy(0)


def test_memory_with_several_names_is_compared_and_counted_once(place: Place) -> None:
    """Layers that SGLang wraps for adapters: ``BaseLayerWithLoRA`` of ``lora/layers.py``."""
    weight, other = noise(64, 64), noise(8, 64)
    name = LAYER + "self_attn.o_proj."
    place.checkpoint({name + "weight": weight}, architectures=["LlamaForCausalLM"])
    wrapped = {name + "weight": weight, name + "base_layer.weight": weight}
    place.serve({**wrapped, "slots": other}, architecture="LlamaForCausalLM")
    text = place.assert_healthy(0, "--checkpoint", str(place.path / "model"), "--require", "0.8")
    assert "2 equal, 0 different, 1 that cannot be compared" in text
    assert f"{weight.nbytes:,} of {weight.nbytes + other.nbytes:,} bytes are equal" in text
    manifest = place.path / "manifest.json"
    assert command("manifest", place.path / "model", "-o", manifest)[0] == 0
    place.assert_healthy(0, "--manifest", str(manifest), "--require", "0.8")


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"enable_eplb": "True"}, {}])
def test_experts_that_each_engine_places_by_its_own_load(
    place: Place, settings: dict[str, str]
) -> None:
    experts = LAYER + "mlp.experts.w13_weight"
    for engine in ("30000", "30001"):
        place.serve({NORM: WHOLE[NORM], experts: noise(1, 4)}, engine=engine)
        rank = place.ranks[-1]
        rank.engine = msgspec.structs.replace(rank.engine, load_settings=settings)
        rank.write_again()
    status, text = place.verify("--require", "0.5")
    assert status == (0 if settings else 1), text
    assert ("EPLB places experts" in text) == bool(settings)


@pytest.mark.parametrize("settings", [{"enable_eplb": "True"}, {}])
def test_such_experts_beside_a_manifest_of_another_host(
    place: Place, tmp_path: Path, settings: dict[str, str]
) -> None:
    experts, manifest = LAYER + "mlp.experts.w13_weight", tmp_path / "manifest.json"
    for _ in range(2):
        place.serve({NORM: WHOLE[NORM], experts: noise(1, 4)})
        rank = place.ranks[-1]
        rank.engine = msgspec.structs.replace(rank.engine, load_settings=settings)
        rank.write_again()
        if not manifest.exists():
            chosen = ("--runtime-dir", place.path / "run", "--rank", "0")
            assert command("manifest", *chosen, "-o", manifest) == (0, "")
            rank.store.close()
    status, text = place.verify("--manifest", str(manifest))
    assert status == (0 if settings else 1), text
    assert ("EPLB places experts" in text) == bool(settings)
    assert ("different  " in text) != bool(settings)


def test_engines_that_pack_weights_in_their_own_way_are_no_replicas(place: Place) -> None:
    """Prefill and decode engines with other back ends for experts."""
    for backend in ("triton", "cutlass"):
        place.serve({NORM: noise(16)}, engine=backend)
        rank = place.ranks[-1]
        settings = {"moe_runner_backend": backend}
        rank.engine = msgspec.structs.replace(rank.engine, load_settings=settings)
        rank.write_again()
    status, text = place.verify("--require", "0")
    assert status == 2, text
    assert "There are no two ranks here that should hold the same" in text
