# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""File systems that can be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of this size (as mount(8) writes it), in memory."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root and `mount`, for a file system that can be filled")
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("needs a machine that lets root mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Take what the file system has left; returns the file to remove."""
    filler = path / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return filler
