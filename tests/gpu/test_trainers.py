# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Update functions of slime and verl, as they are, against an engine on a GPU: slime's trainer
sends over NCCL from the engine's GPU and from another, verl's shares its tensors by CUDA IPC."""

from __future__ import annotations

import pytest
from gpu_engines import GpuEngine, GpuEngines, nvidia_smi
from manifests.test_trainers import follow

#: NCCL takes two processes on one GPU only where they are on two hosts, as far as it knows.
ELSEWHERE = {"NCCL_HOSTID": "trainer"}


@pytest.mark.parametrize(("trainer", "gpu"), [("slime", 0), ("slime", 1), ("verl", 0)])
def test_a_trainers_own_steps(
    manifest_engine: GpuEngine, gpu_engines: GpuEngines, trainer: str, gpu: int
) -> None:
    if len(nvidia_smi()) <= gpu:
        pytest.skip(f"needs {gpu + 1} NVIDIA GPUs, found {len(nvidia_smi())}")
    variables = {"CUDA_VISIBLE_DEVICES": str(gpu)} | ({} if gpu else ELSEWHERE)
    follow(trainer, manifest_engine.engine, gpu_engines.checkpoints["b"], 1, **variables)
