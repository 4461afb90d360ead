# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang lacks on the CPU before an engine with a draft model makes its first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Copies keys and values within a pool, as SGLang's kernel for GPUs does.
PLUGIN = """
import ctypes

import torch


def define():
    global library
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(
        "copy_all_layer_kv_cache_cpu(Tensor bases, Tensor strides, Tensor to, Tensor of) -> ()"
    )
    library.impl("copy_all_layer_kv_cache_cpu", copy, "CPU")


def copy(bases, strides, to, of):
    for base, stride in zip(bases.tolist(), strides.tolist()):
        for target, source in zip(to.tolist(), of.tolist()):
            ctypes.memmove(base + target * stride, base + source * stride, stride)
"""


def write(directory: Path) -> Path:
    """A package that SGLang finds through its entry point, for `PYTHONPATH`."""
    facts = directory / "copy_kv_cache-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: copy-kv-cache\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ncopy_kv_cache = copy_kv_cache:define\n"
    )
    (directory / "copy_kv_cache.py").write_text(PLUGIN)
    return directory


def define() -> None:
    """In this process."""
    names: dict[str, Any] = {}
    exec(PLUGIN, names)
    names["define"]()
