# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Update functions of slime and verl, as they are, against an engine on a GPU: slime's trainer is
on another GPU and sends over NCCL, verl's is on the engine's and shares its tensors by CUDA IPC."""

from __future__ import annotations

import pytest
from gpu_engines import GpuEngine, GpuEngines, nvidia_smi
from manifests.test_trainers import follow


@pytest.mark.parametrize(("trainer", "gpu"), [("slime", 1), ("verl", 0)])
def test_a_trainers_own_steps(
    manifest_engine: GpuEngine, gpu_engines: GpuEngines, trainer: str, gpu: int
) -> None:
    if len(nvidia_smi()) <= gpu:
        pytest.skip(f"needs {gpu + 1} NVIDIA GPUs, found {len(nvidia_smi())}")
    checkpoint = gpu_engines.checkpoints["b"]
    follow(trainer, manifest_engine.engine, checkpoint, 1, CUDA_VISIBLE_DEVICES=str(gpu))
