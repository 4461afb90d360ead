# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang lacks on the CPU before an engine rebalances its experts (`--enable-eplb`).

Its Python for mixtures of experts on a CPU (``moe_forward_native``) does not know an expert that is
another rank's (-1, which it scatters to). ``EPLBManager.rebalance`` waits for torch's accelerator,
which is a GPU in any build for CUDA, and for which it empties caches that a CPU has not.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN = """
import gc

import torch
from sglang.srt.layers.moe import fused_moe_native
from torch.nn.functional import linear, silu


def define():
    module = torch.get_device_module
    torch.get_device_module = lambda device="cpu": module(device)
    torch.cpu.empty_cache = gc.collect
    torch.cpu.is_current_stream_capturing = lambda: False
    fused_moe_native.moe_forward_native = experts_of_this_rank


def experts_of_this_rank(layer, x, topk_output, moe_runner_config):
    weights, experts, _ = topk_output
    found = torch.zeros_like(x)
    for slot in range(layer.w13_weight.shape[0]):
        gate, up = linear(x, layer.w13_weight[slot]).chunk(2, dim=-1)
        share = (weights * (experts == slot)).sum(1, keepdim=True)
        found += share.to(x.dtype) * linear(silu(gate) * up, layer.w2_weight[slot])
    return found
"""


def write(directory: Path) -> Path:
    """A package that SGLang finds through its entry point, for `PYTHONPATH`."""
    facts = directory / "rebalance_experts-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rebalance-experts\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nrebalance_experts = rebalance_experts:define\n"
    )
    (directory / "rebalance_experts.py").write_text(PLUGIN)
    return directory
