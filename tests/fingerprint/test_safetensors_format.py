# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Files that pretend to be safetensors: refused as the library refuses them, and as fast."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError


def tensor(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "U8") -> Any:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


A, B = tensor(0, 4), tensor(4, 8)

GOOD = {
    "two tensors": ({"a": A, "b": B}, bytes(8)),
    "in another order": ({"b": B, "a": A}, bytes(8)),
    "an empty tensor": ({"a": A, "e": tensor(4, 4, [0, 3]), "b": B}, bytes(8)),
    "no tensors": ({}, b""),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": A}, bytes(4)),
}
BAD = {
    "overlap": ({"a": A, "b": tensor(2, 6)}, bytes(6)),
    "the same bytes twice": ({"a": A, "b": A}, bytes(4)),
    "a hole": ({"a": A, "b": tensor(6, 10)}, bytes(10)),
    "a hole in front": ({"b": B}, bytes(8)),
    "bytes behind": ({"a": A, "b": B}, bytes(9)),
    "a name twice": (
        b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(B).encode()),
        bytes(8),
    ),
    "cut off": ({"a": A, "b": B}, bytes(7)),
    "a shape that overflows": ({"a": tensor(0, 0, [2**40, 2**40, 0])}, b""),
    "a dimension of true": ({"a": tensor(0, 1, [True])}, bytes(1)),
    "a fraction": ({"a": tensor(0, 4, [4.0])}, bytes(4)),
}


def by_the_library(path: Path) -> bool:
    safetensors = pytest.importorskip("safetensors", reason="comes with SGLang")
    try:
        safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_read(tmp_path: Path, name: str) -> None:
    header, data = GOOD[name]
    path = file(tmp_path / "model.safetensors", header, data)
    assert set(Checkpoint(path).tensors) == set(header) - {"__metadata__"}


@pytest.mark.parametrize("name", BAD)
def test_others_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    path = file(tmp_path / "model.safetensors", *BAD[name])
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(path)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_the_library_says_the_same(tmp_path: Path, name: str) -> None:
    path = file(tmp_path / "model.safetensors", *(GOOD | BAD)[name])
    assert by_the_library(path) == (name in GOOD)


def test_a_shape_of_many_dimensions_takes_no_time(tmp_path: Path) -> None:
    """A product of 200,000 large numbers takes a minute."""
    path = file(tmp_path / "model.safetensors", {"a": tensor(0, 0, [2**60] * 200_000)}, b"")
    began = time.process_time()
    with pytest.raises(CheckpointError):
        Checkpoint(path)
    assert time.process_time() - began < 5
