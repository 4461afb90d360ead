# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that SGLang's models keep beside their parameters: DeepSeek's and MiniCPM3's own classes,
of the oldest and the newest release of CI, loaded by their own loaders."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import PREFIX, Installation
from ports import free_port
from waiting import LIMIT

MODELS = ("minicpm3", "deepseek_v2")


@pytest.fixture(scope="module")
def measured(
    newest: Installation,
    checkpoints: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("derived") / "found.json"
    script = Path(__file__).with_name("derived_weights.py")
    ran = subprocess.run(
        [newest.python, script, checkpoints[0], str(free_port()), output],
        env=newest.environment(**{PREFIX + "DISABLED": "1"}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("model", MODELS)
def test_what_the_loader_binds_is_a_derived_weight(measured: dict[str, Any], model: str) -> None:
    found = measured[model]
    assert len(found["bound"]) == 4  # Two layers, keys and values.
    assert found["derived"] == found["bound"]


@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_all_unique_storages(measured: dict[str, Any], model: str) -> None:
    found = measured[model]
    assert found["nbytes"] == found["unique"]
    assert found["nbytes"] > sum(nbytes for _, nbytes in found["bound"].values()) > 0


def test_after_a_reload_those_count_as_moved_that_the_loader_has_bound_anew(
    measured: dict[str, Any],
) -> None:
    before, after = measured["deepseek_v2"]["bound"], measured["deepseek_v2"]["bound again"]
    anew = sorted(name for name, (address, _) in after.items() if before[name][0] != address)
    assert measured["deepseek_v2"]["moved"] == anew
