# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What real ranks of SGLang said after each step of ``tests/hooks/changes_actor.py``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import msgspec
from engines import PREFIX, Installation
from waiting import LIMIT

from sglang_weight_exporter.records.adapters import Adapters
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import OperationCounts


class Step(msgspec.Struct):
    """What a real rank said after a request (``changes_actor.py``)."""

    #: SGLang's message where it refused.
    problem: str
    snapshot: Snapshot
    #: Name → slot, as SGLang's pool has it.
    slots: dict[str, int]

    @property
    def adapters(self) -> Adapters:
        assert self.role.adapters is not None
        return self.role.adapters

    @property
    def loads(self) -> tuple[int, int]:
        """Calls and failures."""
        counts = self.snapshot.operations.get("load_lora_adapter", OperationCounts())
        return counts.calls, counts.failures

    @property
    def role(self) -> Role:
        (role,) = self.snapshot.roles
        assert self.snapshot.hook_errors == {}
        return role


def run_scenario(newest: Installation, directory: Path, name: str) -> dict[str, Step]:
    """Its steps, in their order."""
    variables = {"RUNTIME_DIR": str(directory / "runtime"), "SERVE": "off", "FINGERPRINT": "on"}
    tests = Path(__file__).parents[1]
    environment = newest.environment(
        **{PREFIX + variable: text for variable, text in variables.items()},
        PYTHONPATH=os.pathsep.join(map(str, (tests / "shared", tests))),
    )
    with (directory / "log").open("wb") as log:
        subprocess.run(
            [newest.python, tests / "hooks" / "changes_actor.py", directory, name],
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
            timeout=LIMIT,
        )
    steps = json.loads((directory / f"{name}.json").read_text())
    assert "error" not in steps, (steps, (directory / f"{name}.log").read_text()[-6000:])
    return msgspec.convert(steps, dict[str, Step])
