# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""JSON that is none, or is something else, is refused in a sentence and never in a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from array_ranks import command, noise, save, serve
from published import PublishedRank

NAME = "model.layers.0.self_attn.qkv_proj.weight"
PARTS = [f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkv"]

ODD = {
    "nothing": b"",
    "half": b'{"a": ',
    "a number": b"7",
    "null": b"null",
    "a list": b"[1, 2]",
    "text": b'"text"',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "half a character": b'{"\\ud800": "\\ud800"}',
    "not a number": b'{"num_attention_heads": NaN, "a": -Infinity}',
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "a large number": b'{"weight_map": 1%s}' % (b"0" * 10_000),
    "other kinds": b'{"weight_map": {"a": 1}, "text_config": 7, "tensors": {"a": []}}',
    "lists in their place": b'{"weight_map": [], "text_config": [], "tensors": [[]]}',
    "numbers as text": b'{"num_attention_heads": "8", "num_key_value_heads": "2"}',
}

FILES = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two ranks that have fused the tensors of a checkpoint: its settings are asked for."""
    parts = [noise(rows, 16) for rows in (64, 32, 32)]
    save(tmp_path / "model" / "model.safetensors", dict(zip(PARTS, parts, strict=True)))
    halves = [np.split(each, 2)[0] for each in parts]
    alive.append(serve(tmp_path / "run", {NAME: np.concatenate(halves)}, tp_size=2))
    return tmp_path / "model"


#: A rank that nobody holds has ended.
alive: list[PublishedRank] = []


def answers(*arguments: str | Path) -> tuple[int, str]:
    """An exception of the command would come out here."""
    status, text = command(*arguments)
    assert "Traceback" not in text
    assert text.strip() or not status
    return status, text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", ODD)
def test_beside_a_checkpoint(file: str, content: str, model: Path, tmp_path: Path) -> None:
    (model / file).write_bytes(ODD[content])
    run = tmp_path / "run"
    status, text = answers(
        "verify", "--runtime-dir", run, "--recorded", "--checkpoint", model, "--require", "0"
    )
    # What is JSON and says nothing of the tensors may be passed over; nothing differs for it.
    assert status in {0, 2}, text
    assert status == 0 or file in text
    status, text = answers("manifest", model, "--output", tmp_path / "written.json")
    assert status in {0, 2}, text


@pytest.mark.parametrize("content", ODD)
def test_in_the_place_of_a_manifest_or_a_table(content: str, model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.json"
    odd.write_bytes(ODD[content])
    run = tmp_path / "run"
    for arguments in (
        ("verify", "--runtime-dir", run, "--recorded", "--manifest", odd),
        ("table", "--runtime-dir", run, "--diff", odd),
        ("table", "--from-trace", odd),
        ("snapshot", "--runtime-dir", run, odd, "--output", tmp_path / "out"),
    ):
        status, text = answers(*arguments)
        assert status == 2, (arguments, text)
        assert str(odd) in text
