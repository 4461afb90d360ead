# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files by hand: whole, in pieces, and as nobody should write them."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file by hand."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        at = len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
