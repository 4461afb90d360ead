# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""File systems that can be filled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def disk(path: Path, size: str, *, in_place: bool = False) -> Iterator[Path]:
    """A file system of this size (as mount(8) writes it), in memory: mounted here where root may,
    else in namespaces of its own, which need no rights and are looked into through /proc.
    ``in_place``: over a directory that is there, which only root can."""
    if not in_place:
        path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    if os.getuid() == 0 and subprocess.run(mount, check=False).returncode == 0:
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)
        return
    if in_place:
        _cannot_mount()
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    script = ["sh", "-c", '"$@" && echo mounted && cat', "sh"]
    with subprocess.Popen(
        [*isolated, *script, *mount], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"mounted\n":
                _cannot_mount()
            yield Path(f"/proc/{holder.pid}/root{path}")
        finally:
            holder.stdin.close()  # At which it ends, and the file system with it.


def _cannot_mount() -> None:
    message = (
        "needs a file system that can be filled, and may not mount one: run it as root with the "
        "right to mount (CAP_SYS_ADMIN), or where users may have namespaces of their own"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def fill(path: Path) -> Path:
    """Take what the file system has left; returns the file to remove."""
    filler = path / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return filler
