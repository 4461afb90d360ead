# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a checkpoint's files: what torch wrote is what is read, without torch."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import json  # noqa: E402
import os  # noqa: E402
import struct  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import tiny_model  # noqa: E402
from safetensors_files import write  # noqa: E402

from sglang_weight_exporter import fingerprint  # noqa: E402
from sglang_weight_exporter.verification.checkpoint import DTYPES, Checkpoint, CheckpointError  # noqa: E402
from sglang_weight_exporter.verification.checkpoint_layout import (  # noqa: E402
    ServedTensor,
    UnverifiableError,
    bytes_of,
    derive,
    expected_fingerprints,
)


def test_every_dtype_that_torch_can_save(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    safetensors = pytest.importorskip("safetensors.torch", reason="comes with SGLang")
    from sglang_weight_exporter.trainer import fingerprint_tensors

    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (3 * 65536 + 48,), dtype=torch.uint8, generator=generator)
    tensors = {}
    for bits, name in DTYPES.values():
        if name != "bool" and hasattr(torch, name):
            tensors[name] = noise.clone().view(getattr(torch, name)).view(3, -1)
        assert bits % 8 == 0
    tensors |= {"bool": noise > 128, "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    tensors["odd"] = noise[:70_001].clone()
    unknown = []
    for name in list(tensors):
        try:
            safetensors.save_file({name: tensors[name]}, tmp_path / "one.safetensors")
        except (KeyError, RuntimeError, ValueError):
            unknown.append(name)
            del tensors[name]
    (tmp_path / "one.safetensors").unlink()
    assert len(tensors) > 15, unknown
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.fingerprints() == {
        name: tensor.fingerprint for name, tensor in fingerprint_tensors(tensors).items()
    }
    assert {name: one.dtype for name, one in checkpoint.tensors.items()} == {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()
    }


def test_shards_of_an_index_and_stray_files_beside_them(tmp_path: Path) -> None:
    parts = {"a": ("U8", [3], b"abc"), "b": ("F32", [2], bytes(8))}
    write(tmp_path / "model-1.safetensors", {"a": parts["a"]})
    write(tmp_path / "model-2.safetensors", {"b": parts["b"]})
    write(tmp_path / "stray.safetensors", {"a": ("U8", [3], b"xyz")})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.copies == {"a": ["model-1.safetensors", "stray.safetensors"]}
    assert checkpoint.fingerprints()["a"] == fingerprint.of_bytes(b"xyz")  # As it is loaded last.
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(tmp_path).fingerprints() == {
        name: fingerprint.of_bytes(content) for name, (_, _, content) in parts.items()
    }
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-2\.safetensors, which .* not have"):
        Checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors files"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    path = write(tmp_path / "model.safetensors", {"a": ("F32", [4], bytes(16))})
    content = path.read_bytes()
    for broken, message in (
        (content[:-1], "was cut off"),
        (b"PK\3\4" * 20, "no safetensors file"),
        (b"", "no safetensors file"),
        (content[:8] + b"x" + content[9:], "cannot be read"),
        (content.replace(b"[4]", b"[5]"), "do not fit"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_model.write(tmp_path_factory.mktemp("tiny"), 5))


def matrix(checkpoint: Checkpoint, name: str) -> Any:
    return checkpoint.bytes_of(name)[:].view(np.uint16).reshape(checkpoint.tensors[name].shape)


LAYER = "model.layers.1."


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_each_rank_holds(checkpoint: Checkpoint, size: int) -> None:
    """As numpy would cut it: four query heads and two key-value heads of 32 rows."""

    def rows(name: str, count: int, rank: int) -> Any:
        return np.split(matrix(checkpoint, LAYER + name), count)[rank]

    for rank in range(size):
        kv, kv_rank = min(size, 2), rank * min(size, 2) // size
        expected = {
            "self_attn.qkv_proj.weight": np.concatenate(
                [
                    rows("self_attn.q_proj.weight", size, rank),
                    rows("self_attn.k_proj.weight", kv, kv_rank),
                    rows("self_attn.v_proj.weight", kv, kv_rank),
                ]
            ),
            "mlp.gate_up_proj.weight": np.concatenate(
                [rows(f"mlp.{part}.weight", size, rank) for part in ("gate_proj", "up_proj")]
            ),
            "mlp.down_proj.weight": np.split(
                matrix(checkpoint, LAYER + "mlp.down_proj.weight"), size, axis=1
            )[rank],
            "input_layernorm.weight": matrix(checkpoint, LAYER + "input_layernorm.weight"),
        }
        served = [
            ServedTensor(LAYER + name, "bfloat16", value.shape) for name, value in expected.items()
        ]
        found = expected_fingerprints(served, checkpoint, tp_rank=rank, tp_size=size)
        assert not found.unverifiable
        assert found.fingerprints == {
            LAYER + name: fingerprint.of_bytes(one.tobytes()) for name, one in expected.items()
        }
        assert found.whole == {
            LAYER + name for name in expected if size == 1 or "layernorm" in name
        }


def test_a_padded_vocabulary_and_a_tied_output(tmp_path: Path) -> None:
    table = np.arange(100 * 4, dtype=np.uint16).reshape(100, 4)
    name = "model.embed_tokens.weight"
    write(tmp_path / "model.safetensors", {name: ("BF16", [100, 4], table.tobytes())})
    checkpoint = Checkpoint(tmp_path)
    padded = np.concatenate([table, np.zeros((28, 4), dtype=np.uint16)])
    for size in (1, 2, 4):
        for rank in range(size):
            for served in (name, "lm_head.weight"):
                derived = derive(
                    ServedTensor(served, "bfloat16", (128 // size, 4)),
                    checkpoint.tensors,
                    tp_rank=rank,
                    tp_size=size,
                    config={},
                )
                own = np.split(padded, size)[rank]
                assert bytes_of(derived, checkpoint)[:].tobytes() == own.tobytes()


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "reason"),
    [
        (LAYER + "self_attn.qkv_proj.weight", "float16", (256, 128), "engine holds float16"),
        (LAYER + "self_attn.qkv_proj.weight", "bfloat16", (255, 128), "no rank's share"),
        (LAYER + "self_attn.qkv_proj.bias", "bfloat16", (256,), "has no .*q_proj.bias"),
        (LAYER + "mlp.gate_up_proj.weight", "bfloat16", (128, 512), "of its parts"),
        (LAYER + "mlp.down_proj.weight", "bfloat16", (64, 128), "its shape is"),
        (LAYER + "mlp.experts.w13_weight", "bfloat16", (8, 64, 64), "experts are stacked"),
        (LAYER + "self_attn.w_kc", "bfloat16", (8, 64), "no rule makes it"),
    ],
)
def test_what_cannot_be_said_is_said(
    checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(UnverifiableError, match=reason):
        derive(
            ServedTensor(name, dtype, shape), checkpoint.tensors, tp_rank=0, tp_size=2, config={}
        )


def test_reading_needs_neither_torch_nor_safetensors(checkpoint: Checkpoint) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from sglang_weight_exporter.verification.checkpoint import Checkpoint; "
        "assert Checkpoint(Path(sys.argv[1])).fingerprints();"
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint.path)], check=True)


# --- a checkpoint that is being written -----------------------------------------------------------


def rewrite_while_it_is_read(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program writes the file anew, in place, when its tensors begin to be read."""
    original = fingerprint.of_arrays

    def of_arrays(arrays: Any) -> Any:
        with path.open("r+b") as file:
            file.truncate(len(content))
            file.write(content)
        os.utime(path, ns=(1, 1))
        return original(arrays)

    monkeypatch.setattr(fingerprint, "of_arrays", of_arrays)


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_a_file_that_is_written_while_it_is_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """Of a memory map, what is cut off ends the process that reads it."""
    path = write(tmp_path / "model.safetensors", {"a": ("U8", [300_000], bytes(300_000))})
    content = path.read_bytes()
    checkpoint = Checkpoint(path)
    rewrite_while_it_is_read(path, content[: int(len(content) * kept)], monkeypatch)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*written while it was read"):
        checkpoint.fingerprints()
    checkpoint = Checkpoint(write(path, {"a": ("U8", [300_000], bytes(300_000))}))
    with pytest.raises(CheckpointError, match="written while it was read"):
        expected_fingerprints(
            [ServedTensor("a", "uint8", (300_000,))], checkpoint, tp_rank=0, tp_size=1
        )


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": ("U8", [3], b"old")})
    checkpoint = Checkpoint(path)
    write(tmp_path / "other", {"b": ("U8", [4], b"new!")}).replace(path)
    assert checkpoint.fingerprints() == {"a": fingerprint.of_bytes(b"old")}


def test_tensors_that_an_index_names_and_no_file_has(tmp_path: Path) -> None:
    write(tmp_path / "model-1.safetensors", {"a": ("U8", [3], b"abc")})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(tmp_path).absent == ("b",)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "a/../../x"])
def test_an_index_does_not_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "outside.safetensors", {"a": ("U8", [3], b"abc")})
    directory = tmp_path / "model"
    directory.mkdir()
    index = {"weight_map": {"a": name.format(tmp_path)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leads out of"):
        Checkpoint(directory)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    write(tmp_path / "model-1.safetensors", {"a": ("U8", [3], b"abc")})
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no index of safetensors files"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [3], "data_offsets": [0.0, 3.0]},
        {"dtype": "U8", "shape": [3], "data_offsets": [-3, 0]},
        {"dtype": "U8", "shape": [3.0], "data_offsets": [0, 3]},
        {"dtype": "U8", "shape": ["3"], "data_offsets": [0, 3]},
        {"dtype": "U8", "shape": [-1, -3], "data_offsets": [0, 3]},
        {"dtype": "U8", "shape": [3], "data_offsets": [0]},
        {"dtype": "U8", "shape": None, "data_offsets": [0, 3]},
        {"dtype": ["U8"], "shape": [3], "data_offsets": [0, 3]},
        [],
    ],
)
def test_a_header_that_nobody_should_write(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"abc")
    with pytest.raises(CheckpointError):
        Checkpoint(path).fingerprints()


def test_a_checkpoint_without_tensors_and_names_of_any_kind(tmp_path: Path) -> None:
    assert Checkpoint(write(tmp_path / "none.safetensors", {})).fingerprints() == {}
    names = ["a/b", "größe", "權重", "a\nb", ""]
    tensors = {name: ("U8", [1], bytes([row])) for row, name in enumerate(names)}
    assert Checkpoint(write(tmp_path / "some.safetensors", tensors)).fingerprints() == {
        name: fingerprint.of_bytes(bytes([row])) for row, name in enumerate(names)
    }
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(write(tmp_path / "no.safetensors", {"\udc80": ("U8", [1], b"a")}))


def test_a_share_of_columns_over_many_pieces(tmp_path: Path) -> None:
    """Each is read as the rows that it lies in."""
    content = np.random.default_rng(1).integers(0, 2**16, (700, 3, 1000), dtype=np.uint16)
    write(tmp_path / "model.safetensors", {"w": ("BF16", [700, 3, 1000], content.tobytes())})
    for rank in range(4):
        own = np.ascontiguousarray(np.split(content, 4, axis=2)[rank])
        served = [ServedTensor("w", "bfloat16", own.shape)]
        found = expected_fingerprints(served, Checkpoint(tmp_path), tp_rank=rank, tp_size=4)
        assert found.fingerprints == {"w": fingerprint.of_bytes(own.tobytes())}


def test_each_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a share of rows the bytes of these rows, of a share of columns the rows around them."""
    shape = [2048, 4096]
    write(tmp_path / "model.safetensors", {"w": ("BF16", shape, bytes(16 << 20))})
    checkpoint = Checkpoint(tmp_path)
    asked = 0
    original = os.pread

    def pread(descriptor: int, nbytes: int, offset: int) -> bytes:
        nonlocal asked
        asked += nbytes
        return original(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    for own, most in (((2048, 4096), 16 << 20), ((512, 4096), 4 << 20), ((2048, 1024), 17 << 20)):
        asked = 0
        served = [ServedTensor("w", "bfloat16", own)]
        expected_fingerprints(served, checkpoint, tp_rank=1, tp_size=4)
        assert 0 < asked <= most


def test_a_tensor_of_more_than_two_gigabytes_in_memory_and_in_its_file(tmp_path: Path) -> None:
    """Places and sizes beyond 31 bits; all but its ends is a hole in the file and untouched
    memory."""
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    from sglang_weight_exporter.trainer import fingerprint_tensors

    size = (1 << 31) + 70_003
    path = write(tmp_path / "model.safetensors", {"w": ("U8", [0], b"")})
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    tensor = torch.zeros(size, dtype=torch.uint8)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + size)
        for at, value in ((0, 3), (1 << 31, 5), (size - 1, 7)):
            tensor[at] = value
            file.seek(8 + len(header) + at)
            file.write(bytes([value]))
    of_file = Checkpoint(path).fingerprints()["w"]
    assert fingerprint_tensors({"w": tensor})["w"].fingerprint == of_file
