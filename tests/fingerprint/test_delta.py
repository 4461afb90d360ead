# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A delta's checksums beside the checkpoint that was patched with it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

from array_ranks import command, noise, save, serve  # noqa: E402

from sglang_weight_exporter.verification.checkpoint import (  # noqa: E402
    Checkpoint,
    CheckpointError,
)
from sglang_weight_exporter.verification.delta import read_delta  # noqa: E402

HELD = {"model.norm.weight": noise(16), "model.layers.0.mlp.up_proj.weight": noise(32, 16)}
NORM, UP = HELD


def write_delta(directory: Path, checksums: dict[str, str], kind: str) -> Path:
    """As slime 624b824 writes it: compressed differences as bytes, checksums in the metadata."""
    directory.mkdir()
    entries: dict[str, Any] = {"__metadata__": checksums}
    for number, name in enumerate(checksums):
        entries[name] = {"dtype": "U8", "shape": [4], "data_offsets": [4 * number, 4 * number + 4]}
    header = json.dumps(entries).encode()
    file = "model-00000-of-00001.safetensors"
    content = len(header).to_bytes(8, "little") + header + bytes(4 * len(checksums))
    (directory / file).write_bytes(content)
    metadata = {
        "version": "000003",
        "base_version": "000002",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": kind,
    }
    index = {"metadata": metadata, "weight_map": dict.fromkeys(checksums, file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def adler(array: Any) -> str:
    return f"{zlib.adler32(array.tobytes()):08x}"


def test_a_tensor_that_was_not_patched_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model" / "model.safetensors", HELD)
    right = {name: adler(array) for name, array in HELD.items()}
    wrong = {**right, UP: adler(noise(32, 16)), "gone.weight": "00000001"}
    checkpoint = Checkpoint(tmp_path / "model")
    assert read_delta(write_delta(tmp_path / "3", right, "adler32")).differing(checkpoint) == ()
    delta = read_delta(write_delta(tmp_path / "4", wrong, "adler32"))
    assert delta.differing(checkpoint) == (UP, "gone.weight")


def test_the_command_says_it_before_all_else(tmp_path: Path) -> None:
    save(tmp_path / "model" / "model.safetensors", HELD)
    rank = serve(tmp_path / "run", HELD)
    words: list[str | Path] = [
        "verify",
        "--runtime-dir",
        tmp_path / "run",
        "--recorded",
        "--checkpoint",
    ]
    words += [tmp_path / "model", "--delta"]
    right = write_delta(tmp_path / "3", {UP: adler(HELD[UP])}, "adler32")
    status, text = command(*words, right)
    assert (status, text.splitlines()[0]) == (
        0,
        "delta 000003: 1 of 1 tensors of the checkpoint have its checksums (adler32)",
    ), text
    status, text = command(*words, write_delta(tmp_path / "4", {UP: "00000001"}, "adler32"))
    assert status == 1, text
    assert f"other bytes than the delta made  {UP}" in text
    status, text = command(*words, write_delta(tmp_path / "5", {UP: "0"}, "sha7"))
    assert status == 2, text
    assert "its checksums are of the kind sha7, which is not known" in text
    rank.store.withdraw()


@pytest.mark.parametrize(("kind", "module"), [("xxh3-128", "xxhash"), ("blake3", "blake3")])
def test_kinds_that_need_a_package(tmp_path: Path, kind: str, module: str) -> None:
    """slime's ``_new_hasher`` takes them so."""
    save(tmp_path / "model" / "model.safetensors", HELD)
    delta = read_delta(write_delta(tmp_path / "3", {UP: "0"}, kind))
    if importlib.util.find_spec(module) is None:
        assert delta.obstacle == f"its checksums are {kind}, and {module} is not installed here"
        return
    taken = getattr(importlib.import_module(module), kind.replace("-", "_"))()
    taken.update(HELD[UP].tobytes())
    delta = read_delta(write_delta(tmp_path / "4", {UP: taken.hexdigest()}, kind))
    assert not delta.obstacle
    assert delta.differing(Checkpoint(tmp_path / "model")) == ()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"metadata": {}, "weight_map": {"a": "../b"}}'])
def test_what_is_no_delta_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_delta(tmp_path)
