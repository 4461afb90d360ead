# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Manifests, and what a comparison says."""

from __future__ import annotations

import pytest
from waiting import LIMIT

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_model

import sglang_weight_exporter
from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.verification.checkpoint import Checkpoint
from sglang_weight_exporter.verification.checkpoint_layout import (
    ServedTensor,
    expected_fingerprints,
)
from sglang_weight_exporter.verification.comparison import compare, compare_replicas
from sglang_weight_exporter.verification.manifest import (
    ManifestError,
    ManifestTensor,
    encode,
    read_manifest,
    write_manifest,
)

A, B, C = (fingerprint.of_bytes(data) for data in (b"a", b"b", b"c"))


def tensor(text: str) -> ManifestTensor:
    return ManifestTensor(fingerprint=text, dtype="bfloat16", shape=(2, 3))


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    written = write_manifest(path, {"b": tensor(B), "a": tensor(A)}, weight_version="7")
    assert read_manifest(path) == written
    assert json.loads(path.read_bytes()) == {
        "schema_version": 1,
        "definition": 2,
        "weight_version": "7",
        "shard": None,
        "reference": None,
        "fingerprint": fingerprint.of_rank({"a": A, "b": B}),
        "tensors": {
            name: {"fingerprint": text, "dtype": "bfloat16", "shape": [2, 3]}
            for name, text in (("a", A), ("b", B))
        },
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "is no manifest"),
        (b"\x00", "is no manifest"),
        (b'{"tensors": {}, "fingerprint": "", "definition": 1}', "definition 1"),
        (b'{"tensors": {}, "fingerprint": "", "schema_version": 9}', "schema 9"),
    ],
)
def test_another_file_or_version_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(path)


def test_tensors_of_a_trainer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    from sglang_weight_exporter.trainer import fingerprint_tensors

    state = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    buckets = iter([[("w", state["w"])], [("b", state["b"])]])
    taken: dict[str, ManifestTensor] = {}
    for bucket in buckets:
        taken |= fingerprint_tensors(bucket)
    assert taken == fingerprint_tensors(state)
    assert taken["w"] == ManifestTensor(
        fingerprint=fingerprint.of_bytes(state["w"].numpy().tobytes()),
        dtype="float32",
        shape=(2, 3),
    )
    assert fingerprint_tensors({"t": state["w"].t()}) == fingerprint_tensors(
        {"t": state["w"].t().contiguous()}
    )


SIZES = {"same": 4, "other": 2, "new": 1, "doubted": 1, "a": 3, "b": 1, "c": 1}


def test_equal_different_and_unknown() -> None:
    served = {"same": A, "other": B, "new": C, "doubted": B}
    expected = {"same": A, "other": C, "doubted": C, "elsewhere": C}
    result = compare(
        served,
        expected,
        SIZES,
        unverifiable={"new": "why"},
        doubted={"doubted": "who knows", "same": "who knows"},
    )
    assert result.equal == ("same",)
    assert result.differing == ("other",)
    assert result.unverifiable == {"new": "why", "doubted": "who knows"}
    assert (result.equal_bytes, result.all_bytes) == (4, 8)


@pytest.mark.parametrize(
    ("served", "expected", "required", "enough"),
    [
        ({"a": A}, {"a": A}, 1.0, True),
        ({"a": A, "b": B}, {"a": A}, 0.75, True),
        ({"a": A, "b": B}, {"a": A}, 0.76, False),
        ({"a": A}, {"b": A}, 0.0, False),
        ({}, {"b": A}, 0.0, False),
    ],
)
def test_enough_is_a_share_of_the_bytes_and_more_than_nothing(
    served: dict[str, str], expected: dict[str, str], required: float, enough: bool
) -> None:
    assert compare(served, expected, SIZES).is_enough(required) == enough


def test_replicas_must_have_the_same_names() -> None:
    assert not compare_replicas({"a": A, "b": B}, {"b": B, "a": A}, SIZES).differing
    result = compare_replicas({"a": A, "b": B}, {"a": A, "c": B}, SIZES)
    assert (result.equal, result.differing) == (("a",), ("b", "c"))


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root, renaming a file to /dev/stdout or /dev/null would remove the device."""
    pipe, link, target = (tmp_path / name for name in ("pipe", "link", "target"))
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    written = write_manifest(pipe, {"a": tensor(A)})
    assert reader.communicate(timeout=LIMIT)[0] == encode(written)
    assert pipe.is_fifo()
    link.symlink_to(target)
    write_manifest(link, {"a": tensor(A)})
    assert link.is_symlink()
    assert read_manifest(target) == written
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe", "link", "target"}


def test_what_a_writer_of_the_same_pid_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container a trainer that was killed has its pid again when it comes back."""
    path = tmp_path / "manifest.json"
    (tmp_path / f".manifest.json.{os.getpid()}").write_bytes(b"half")
    written = write_manifest(path, {"a": tensor(A)})
    assert read_manifest(path) == written


LAYER = "model.layers.0."
PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def test_tensors_of_a_trainer_as_sglang_fuses_them() -> None:
    """Rows one after the other; what lacks a part, or has parts that do not fit, is as it was."""
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    from sglang_weight_exporter.trainer import fingerprint_tensors

    noise = torch.Generator().manual_seed(1)
    state = {
        f"{LAYER}{part}.{suffix}": torch.randn(*shape, generator=noise)
        for number, part in enumerate(name for names in PARTS.values() for name in names)
        for suffix, shape in (("weight", (number + 2, 4)), ("bias", (number + 2,)))
    }
    state |= {f"{LAYER}mlp.down_proj.weight": torch.ones(3), "up_proj.weight": torch.ones(2)}
    state |= {f"1.{part}.weight": torch.ones(2, 3) for part in ("q_proj", "k_proj")}
    state |= {"2.gate_proj.weight": torch.ones(2, 3), "2.up_proj.weight": torch.ones(2, 4)}
    taken = fingerprint_tensors(state, fused=True)
    expected = fingerprint_tensors(state)
    for fused, parts in PARTS.items():
        for suffix in ("weight", "bias"):
            names = [f"{LAYER}{part}.{suffix}" for part in parts]
            held = b"".join(state[name].numpy().tobytes() for name in names)
            expected[f"{LAYER}{fused}.{suffix}"] = ManifestTensor(
                fingerprint=fingerprint.of_bytes(held),
                dtype="float32",
                shape=(sum(len(state[name]) for name in names), *state[names[0]].shape[1:]),
            )
            for name in names:
                del expected[name]
    assert taken == expected


def test_a_checkpoint_as_sglang_fuses_it(tmp_path: Path) -> None:
    """It is what ``verify --checkpoint`` expects of an engine without tensor parallelism."""
    checkpoint = tiny_model.write(tmp_path / "model", 5)
    path = tmp_path / "manifest.json"
    words = [sys.executable, "-m", "sglang_weight_exporter", "manifest", "--fused"]
    subprocess.run([*words, checkpoint, "-o", path], check=True, timeout=LIMIT)
    tensors = read_manifest(path).tensors
    assert len(tensors) == 6 * tiny_model.LAYERS + 3
    served = [ServedTensor(name, held.dtype, held.shape) for name, held in tensors.items()]
    expected = expected_fingerprints(served, Checkpoint(checkpoint), tp_rank=0, tp_size=1)
    assert not expected.unverifiable
    assert expected.fingerprints == {name: held.fingerprint for name, held in tensors.items()}


def test_errors_can_be_caught_by_the_names_that_the_package_offers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    with pytest.raises(sglang_weight_exporter.FingerprintError):
        sglang_weight_exporter.fingerprint_tensors({"w": torch.empty(3, device="meta")})
    (tmp_path / "no.json").write_bytes(b"{}")
    with pytest.raises(sglang_weight_exporter.ManifestError):
        sglang_weight_exporter.read_manifest(tmp_path / "no.json")
