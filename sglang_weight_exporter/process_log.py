# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process's log on its way through a pipe into the log of an engine.

The exporter writes a line of JSON for each record, and never waits: the engine may be stopped
(SIGSTOP, a debugger) while the pipe is full. The engine reads records whole, a traceback in one
piece. How much is said is decided where it is said, so that a flood costs the engine nothing.
"""

from __future__ import annotations

import json
import logging
import os
import select
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

#: What the kernel writes into a pipe whole or not at all (pipe(7)).
LONGEST_LINE = select.PIPE_BUF

#: A complaint is said so often at once, then at most each so many seconds.
BURST = 5
SECONDS_BETWEEN = 60.0

#: Lines that are no records, such as what the interpreter says of a crash, in one piece of at most
#: so many.
RAW_LINES = 100

_GOODBYE = '{"goodbye": true}'


class Message(NamedTuple):
    """What the exporter process said."""

    level: int
    text: str


@dataclass
class _Allowance:
    left: float = BURST
    since: float = 0.0
    withheld: int = 0


class RateLimitFilter(logging.Filter):
    """Lets what is said over and over through a few times, and says how often it was withheld.

    Records are alike when they come from the same place in the code.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._allowances: dict[tuple[str, int], _Allowance] = defaultdict(_Allowance)

    def filter(self, record: logging.LogRecord) -> bool:
        allowance = self._allowances[record.pathname, record.lineno]
        now = self._clock()
        earned = (now - allowance.since) / SECONDS_BETWEEN
        allowance.left = min(allowance.left + earned, BURST)
        allowance.since = now
        if allowance.left < 1:
            allowance.withheld += 1
            return False
        allowance.left -= 1
        if allowance.withheld:
            record.msg = (
                f"{record.getMessage()} ({allowance.withheld} more like this were not logged.)"
            )
            record.args = None
            allowance.withheld = 0
        return True


class PipeHandler(logging.Handler):
    """Writes records for :func:`read_messages` at the other end, or drops them."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0
        os.set_blocking(descriptor, False)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self._dropped:
            text = f"{text} ({self._dropped} messages before this one were not read in time.)"
        line = _line(record.levelno, text)
        try:
            os.write(self._descriptor, line)
        except OSError:  # Full, or the engine is gone.
            self._dropped += 1
        else:
            self._dropped = 0

    def say_goodbye(self) -> None:
        """This process ends by itself. One that was killed does not say so, and is replaced."""
        try:
            os.write(self._descriptor, f"{_GOODBYE}\n".encode())
        except OSError:
            return


def _line(level: int, text: str) -> bytes:
    line = b""
    # A traceback ends with what matters. A character is six bytes of JSON at most.
    for kept in (len(text), LONGEST_LINE // 2, LONGEST_LINE // 8):
        if kept < len(text):
            text = f"{text[: kept // 2]} … {text[-kept // 2 :]}"
        line = json.dumps({"level": level, "text": text}).encode() + b"\n"
        if len(line) <= LONGEST_LINE:
            break
    return line


def read_messages(lines: Iterable[str]) -> Iterator[Message | None]:
    """What came through the pipe, piece by piece; ``None`` for the goodbye."""
    raw: list[str] = []
    for line in lines:
        message = _message(line)
        if message is None and line.strip() != _GOODBYE:
            if len(raw) < RAW_LINES:
                raw.append(line)
            continue
        if raw:
            yield Message(logging.WARNING, "".join(raw).rstrip())
            raw = []
        yield message
    if raw:
        yield Message(logging.WARNING, "".join(raw).rstrip())


def _message(line: str) -> Message | None:
    try:
        content = json.loads(line)
        return Message(int(content["level"]), str(content["text"]))
    except (ValueError, TypeError, KeyError):
        return None
