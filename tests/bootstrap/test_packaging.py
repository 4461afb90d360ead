# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What pip puts into site-packages, and takes out again."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from waiting import LIMIT

PROJECT = Path(__file__).parents[2]
FILES = {"sglang_weight_exporter.pth", "sglang_weight_exporter.start"}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    venv.create(tmp_path / "environment")
    return tmp_path / "environment"


def pip(environment: Path, *arguments: str) -> None:
    """Ours, at work there: putting one into each environment would take longer than the test."""
    there = str(environment / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", there, "-q", *arguments]
    subprocess.run(command, check=True, timeout=LIMIT)


def site_packages(environment: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("--editable",)], ids=["wheel", "editable"])
def test_pip_installs_and_uninstalls_the_files_that_python_reads_at_start(
    environment: Path, form: tuple[str, ...]
) -> None:
    # Without dependencies: start-up must work while they are missing, too.
    pip(environment, "install", "--no-deps", *form, str(PROJECT))
    site = site_packages(environment)
    present = {path.name for path in site.iterdir()}
    assert present >= FILES
    assert (site / "sglang_weight_exporter.start").read_text().split() == [
        "sglang_weight_exporter.bootstrap:arm"
    ]
    (entry_points,) = site.glob("sglang_weight_exporter-*.dist-info/entry_points.txt")
    group = entry_points.read_text().partition("[sglang.srt.plugins]\n")[2].splitlines()[0]
    name, _, value = group.partition(" = ")
    assert name == "sglang_weight_exporter"
    assert callable(EntryPoint(name, value, "sglang.srt.plugins").load())
    armed = subprocess.run(
        [
            environment / "bin" / "python",
            "-c",
            "import sys; print([type(finder).__name__ for finder in sys.meta_path][0])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert armed.stdout == "PostImportHook\n"
    assert armed.stderr == ""

    pip(environment, "uninstall", "-y", "sglang-weight-exporter")
    assert list(environment.rglob("*weight_exporter*")) == []
