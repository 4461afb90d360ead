# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Loads and updates import nothing: an import reads files, which a rank may have no descriptors
for, and takes milliseconds that its requests wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import standins

#: Prints what was imported since the hooks were there, in a process that has torch, as a rank has.
SCRIPT = """
import sys
from pathlib import Path
from standins import Rank, Request
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter

rank = Rank(Path(sys.argv[1]), fingerprinter=Fingerprinter())
before = set(sys.modules)
runner = rank.runner()
runner.alloc_memory_pool()
for _ in range(2):
    rank.scheduler(runner).update_weights_from_disk(Request())
print(rank.role().updates["disk"].updates, sorted(set(sys.modules) - before))
"""


def test_loads_and_updates_import_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(standins.__file__).parent)}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "runtime")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split(maxsplit=1)[0] == "2"
    assert ran.stdout.split(maxsplit=1)[1].strip() == "[]", ran.stderr
