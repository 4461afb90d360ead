# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The program of the release part `soak`, in seconds: that it runs, not whether anything grows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from engines import clean_environment

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_ranks_update_and_are_scraped_whole() -> None:
    done = subprocess.run(
        [sys.executable, SOAK, "3", "60"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "one rank with 60 updates (failures 0)" in done.stdout, done.stdout + done.stderr
    assert " 0 not complete" in done.stdout, done.stdout
