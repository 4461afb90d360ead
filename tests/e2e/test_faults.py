# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine whose runtime directory takes no writes for a while.

What fails at each point of an update is tested with stand-ins (``tests/hooks/test_faults.py``).
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, eventually


@contextlib.contextmanager
def no_writes(directory: Path) -> Iterator[None]:
    """Nothing can be made or removed in it, as after an error of the disk."""
    directories = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    tried = subprocess.run(
        ["chattr", "+i", *directories], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"needs root and immutable directories: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *directories], check=True)


def test_a_reload_that_could_not_be_written_is_counted_when_it_can(
    old_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    def updates() -> float:
        return old_engine.scrape().sum("sglang_weight_updates_total", source="disk")

    before = updates()
    with no_writes(old_engine.runtime_dir):
        status, answer = old_engine.update_weights_from_disk(checkpoints[1])
        assert (status, answer["success"]) == (200, True)
        # The truth or nothing: the rank says nothing while it cannot say what holds.
        assert old_engine.scrape().series("sglang_weight_updates_total") == []
    # Back by itself: nothing else happens in this engine.
    eventually(lambda: updates() == before + 1, 60, what="the reload is counted")
    assert old_engine.update_weights_from_disk(checkpoints[0])[1]["success"] is True
    eventually(lambda: updates() == before + 2, 30, what="and the next one")
    log = old_engine.log()
    assert log.count("SGLang is not affected; what could not be read is missing") <= 3
