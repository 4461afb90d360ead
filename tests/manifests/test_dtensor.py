# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""DTensors of two processes, as FSDP and tensor parallelism place them: each writes its part, and
the parts are the whole. Over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import torch

from sglang_weight_exporter import sum_tensors
from sglang_weight_exporter.verification.manifest import read_parts

SHAPES = {"even": (48, 16), "uneven": (7, 16), "short": (1, 8), "bias": (32,), "experts": (4, 6, 8)}
PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from sglang_weight_exporter import FingerprintError, sum_tensors, write_manifest

directory, rank = sys.argv[1], int(sys.argv[2])
store = dist.FileStore(directory + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.load(directory + "/whole.pt")
placements = {
    "rows": lambda tensor: Shard(0),
    "columns": lambda tensor: Shard(tensor.dim() - 1),
    "copies": lambda tensor: Replicate(),
    "inner": lambda tensor: Shard(tensor.dim() // 2),
}
for name, placed in placements.items():
    held = {
        key: distribute_tensor(tensor, mesh, [placed(tensor)]) for key, tensor in whole.items()
    }
    path = f"{directory}/manifest_{name}.json"
    write_manifest(path, held, cuts=(1, 2), weight_version=name, part=(rank, 2))
dist.barrier()
dist.destroy_process_group()
"""


def test_parts_of_dtensors_are_the_whole(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(1)
    whole = {name: torch.randn(shape, generator=noise) for name, shape in SHAPES.items()}
    torch.save(whole, tmp_path / "whole.pt")
    package = Path(sys.modules["sglang_weight_exporter"].__path__[0]).parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(rank)],
            env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors
    expected = sum_tensors(whole, cuts=(1, 2))
    for name in ("rows", "columns", "copies", "inner"):
        found = read_parts(tmp_path / f"manifest_{name}.json")
        assert found is not None, name
        assert found.weight_version == name
        assert found.sent == dict(sorted(expected.items())), name
