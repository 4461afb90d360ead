# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A runtime directory, ranks in it, and the command that reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import PREFIX, clean_environment
from published import Command, PublishedRank
from waiting import LIMIT


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def rank(runtime_dir: Path) -> Iterator[PublishedRank]:
    """A rank with one table."""
    made = PublishedRank(runtime_dir)
    made.publish()
    yield made
    made.store.close()


@pytest.fixture
def command(runtime_dir: Path) -> Command:
    """Runs `python -m sglang_weight_exporter` on the runtime directory."""

    def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "sglang_weight_exporter", *map(str, arguments)],
            env=clean_environment(**{PREFIX + "RUNTIME_DIR": str(runtime_dir)}, **environ),
            cwd=os.fspath(runtime_dir.parent),
            capture_output=True,
            timeout=LIMIT,
        )

    return run
