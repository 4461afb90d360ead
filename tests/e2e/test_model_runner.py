# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A program that makes a ModelRunner of its own, with no server, scheduler or plugin: SGLang's
`benchmark.one_batch`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import tiny_model
from engines import PREFIX, Installation
from waiting import LIMIT

from sglang_weight_exporter.store.reader import rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

pytestmark = pytest.mark.release("launches")

TOKENS, PAGE, BFLOAT16 = 4096, 1, 2


def test_a_model_runner_on_its_own_is_a_rank(newest: Installation, tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "model")
    command = [str(newest.python), "-m", "sglang.benchmark.one_batch", "--correctness-test"]
    finished = subprocess.run(
        [*command, "--model-path", str(model), *newest.server_flags()],
        env=newest.environment(
            **{PREFIX + "RUNTIME_DIR": str(tmp_path / "runtime"), PREFIX + "SERVE": "off"}
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    (directory,) = rank_directories(RuntimeDir.open(tmp_path / "runtime", os.environ))
    assert not directory.is_alive()
    snapshot = directory.snapshot()
    assert snapshot.hook_errors == {}
    (role,) = snapshot.roles
    header = tiny_model.safetensors_header(model)
    (parameters,) = [part for part in role.weights or () if part.kind == "parameter"]
    assert parameters.nbytes == sum(nbytes for _, nbytes in header.values())
    (pool,) = role.kv_pools or ()
    token = 2 * tiny_model.LAYERS * tiny_model.KV_HEADS * tiny_model.HEAD_DIM * BFLOAT16
    assert (pool.tokens, pool.nbytes) == (TOKENS, (TOKENS + PAGE) * token)
    assert role.loaded_at is not None
