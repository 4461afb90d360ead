# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One way to wait, with one limit that all tests share.

What a test waits for is an event. The limit only ends a hang: it is many times what the slowest
event needs on a slow machine that does something else besides, and no test is faster or slower
for it. Whatever writes a log says so here, and a wait that ran out shows the end of each.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

#: Seconds. An engine that starts beside others on a machine of two cores needs the most.
LIMIT = 600.0

#: Of each log, so that a message of several stays readable.
SHOWN = 3000

_logs: dict[Path, None] = {}


def watch(log: Path) -> Path:
    """Show the end of this log where a wait runs out."""
    _logs[log] = None
    return log


def forget(log: Path) -> None:
    """Its writer has ended as it should."""
    _logs.pop(log, None)


def ends_of_logs(*logs: Path) -> str:
    """The end of these logs, or of all that are watched."""
    ends = []
    for log in logs or _logs:
        if log.exists():
            end = log.read_text(errors="replace")[-SHOWN:]
            ends.append(f"The end of {log}:\n{end}" if end else f"Nothing in {log}")
    return "\n".join(["", *ends])


def eventually(check: Callable[[], Result], *, every: float = 0.1, what: str = "") -> Result:
    """Call `check` until it neither raises AssertionError or OSError nor returns a false value.

    Returns its result. Raises AssertionError after `LIMIT`, with the last reason and the ends of
    all logs.
    """
    deadline = time.monotonic() + LIMIT
    reason: object = "nothing"
    while True:
        try:
            result = check()
            if result:
                return result
            reason = result
        except (AssertionError, OSError, http.client.HTTPException) as error:
            reason = error
        if time.monotonic() > deadline:
            said = f"{what or check} not within {LIMIT:g} s; last: {reason!r}"
            raise AssertionError(said + ends_of_logs())
        time.sleep(every)
