# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Thousands of updates leave exact counts, and no more descriptors, files and objects than a few.

A hundred thousand of a stand-in, and ten thousand of a real rank, are a part of the release.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Installation
from standins import Rank, Request, answer

ENDURANCE = pytest.mark.release("soak")

#: As DeepSeek-V3's weights in bfloat16: 1.34 TB, as far as `nbytes` says, in two bytes of memory.
TENSOR = torch.empty(1, dtype=torch.bfloat16).expand(671_000_000_000)


class Left:
    """What a process and a directory have."""

    def __init__(self, directory: Path) -> None:
        gc.collect()
        self.descriptors = len(list(Path("/proc/self/fd").iterdir()))
        self.objects = len(gc.get_objects())
        self.threads = len(list(Path("/proc/self/task").iterdir()))
        self.files = sum(len(files) for _, _, files in os.walk(directory))
        self.nbytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def update_many(rank: Rank, runner: Any, rounds: int) -> None:
    """Each round: a session of two buckets, a checkpoint, a request that SGLang refuses."""
    updater, scheduler = runner.weight_updater, rank.scheduler(runner)
    refusing = rank.scheduler(runner, refuses="no session")
    for _ in range(rounds):
        updater.begin_weight_update()
        for _ in range(2):
            updater.update_weights_from_tensor([("w", TENSOR)])
        updater.end_weight_update(run_post_load=False)
        scheduler.update_weights_from_disk(Request())
        refusing.update_weights_from_tensor(Request())


@pytest.mark.parametrize("rounds", [300, pytest.param(50_000, marks=ENDURANCE)])
def test_counts_are_exact_and_nothing_is_left_behind(tmp_path: Path, rounds: int) -> None:
    rank = Rank(tmp_path / "runtime")
    runner = rank.runner(answers={"disk": answer(True, "Success")})
    runner.alloc_memory_pool()
    first = 1_100  # More than the queue of events holds.
    update_many(rank, runner, first // 3)
    before = Left(rank.directory)
    update_many(rank, runner, rounds)
    after = Left(rank.directory)
    made = first // 3 + rounds
    assert rank.totals() == {"tensor": (made, made, 2 * made), "disk": (made, 0, made)}
    assert rank.role().updates["tensor"].nbytes == made * 2 * TENSOR.nbytes
    assert rank.role().in_progress is None
    assert sum(rank.role().updates["disk"].duration.counts) == made
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    # The queue of events is full at some time, and no fuller after that.
    assert after.files <= 1_010
    assert after.nbytes < 4 * 2**20
    assert after.objects - before.objects < 3 * (after.files - before.files) + 200
    assert rank.installation.errors == {}


@ENDURANCE
def test_a_real_rank_updates_ten_thousand_times(
    newest: Installation, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    script = Path(__file__).with_name("many_updates.py")
    directory = tmp_path / "runtime"
    subprocess.run(
        [newest.python, script, out, *checkpoints, "10000"],
        env=newest.environment(
            SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR=str(directory), SGLANG_WEIGHT_EXPORTER_SERVE="off"
        ),
        check=True,
        timeout=3600,
    )
    left = json.loads(out.read_text())
    assert left["updates"] == {"tensor": 5_000, "disk": 5_000}
    assert left["failures"] == 0
    assert left["errors"] == {}
    # As after the first hundred.
    assert left["descriptors"][1] == left["descriptors"][0]
    assert left["resident"][1] - left["resident"][0] < 64 * 2**20
    assert left["files"] <= 1_010
