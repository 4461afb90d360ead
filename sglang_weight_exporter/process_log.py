# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process's log on its way through a pipe into the log of an engine.

The exporter writes a line of JSON for each record, and never waits: the engine may be stopped
(SIGSTOP, a debugger) while the pipe is full. The engine reads records whole, a traceback in one
piece. How much is said is decided where it is said, so that a flood costs the engine nothing.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

#: What the kernel writes into a pipe whole or not at all (pipe(7)).
LONGEST_LINE = select.PIPE_BUF

#: A complaint is said so often at once, then at most each so many seconds.
BURST = 5
SECONDS_BETWEEN = 60.0

#: Lines that are no records, such as what the interpreter says of a crash, in one piece of at most
#: so many.
RAW_LINES = 100

#: What stands in the place of a secret.
HIDDEN = "<hidden>"

#: Variables that hold a secret as a whole: SGLang's, Hugging Face's and clouds' among them.
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|(?:^|_)TOKEN(?:_|$)|API_?KEY|ACCESS_?KEY|CREDENTIAL|AUTHORIZATION",
    re.I,
)
#: Shorter ones would hide parts of ordinary words.
_SHORTEST_SECRET = 6

#: ``//user:password@``, ``?key=value``, ``authorization: …`` and ``Bearer …``, whosever they are.
_USER = re.compile(r"(?<=//)[^/\s@'\"]+@")
_QUERY = re.compile(r"\?[\w.~%-]+=(?:<hidden>|[^\s'\"<>)])*")
_CREDENTIALS = re.compile(
    r"(?i)\b((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]+\s+)?|(?:bearer|basic)\s+)"
    r"(?!<hidden>)[^\s'\",;]+"
)
#: What a terminal obeys.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_GOODBYE = '{"goodbye": true}'


class Message(NamedTuple):
    """What the exporter process said."""

    level: int
    text: str


class Secrets:
    """What must not be in a log: headers and passwords that the environment holds, whoever says
    them, and the same of others where their form shows them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        found: set[str] = set()
        for name, value in environ.items():
            if name.upper().endswith("_HEADERS"):
                for entry in value.split(","):
                    # In the wrong form they are secret too: `Authorization: Bearer …`.
                    found |= {entry, re.split("[=:]", entry, maxsplit=1)[-1]}
            elif _SECRET_NAME.search(name):
                found.add(value)
            if "://" in value or name.upper().endswith(("ENDPOINT", "PROXY")):
                place, _, query = value.partition("?")
                found |= {field.partition("=")[2] for field in query.split("&")}
                user, _, host = place.rpartition("://")[2].rpartition("@")
                _, colon, port = host.partition("/")[0].rpartition(":")
                # A port that is no number is a password whose host was left away.
                found |= {user, user.partition(":")[2], "" if port.isdigit() else colon and port}
        # Longest first, so that no part is left of one that holds another.
        known = {form.strip() for secret in found for form in _forms(secret)}
        kept = sorted((each for each in known if len(each) >= _SHORTEST_SECRET), key=len)
        self._known = re.compile("|".join(map(re.escape, reversed(kept)))) if kept else None

    def hide(self, text: str) -> str:
        """The text without them, and without characters that a terminal obeys."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _USER.sub(f"{HIDDEN}@", text)
        text = _QUERY.sub(f"?{HIDDEN}", text)
        text = _CREDENTIALS.sub(rf"\1{HIDDEN}", text)
        return _COMMANDS.sub("\ufffd", text)


def _forms(secret: str) -> set[str]:
    """What a secret may look like in what somebody says."""
    plain = unquote(secret)
    words = {word for word in plain.split() if word.lower() not in {"bearer", "basic", "token"}}
    forms = {secret, plain, *words}
    for word in words:
        try:  # The user and password of `Basic …`.
            decoded = base64.b64decode(word, validate=True).decode()
            forms |= {decoded, decoded.partition(":")[2]}
        except ValueError:
            continue
    for form in list(forms):
        forms |= {quote(form), quote(form, safe=""), json.dumps(form)[1:-1], repr(form)[1:-1]}
        forms.add(base64.b64encode(form.encode(errors="replace")).decode())
    return forms


class HidingFormatter(logging.Formatter):
    """The one place that each record passes on its way out, its traceback included."""

    def __init__(self, fmt: str, secrets: Secrets) -> None:
        super().__init__(fmt)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return self._secrets.hide(super().format(record))


def log_uncaught() -> None:
    """Have what ends a thread or the process logged, and not printed past the log."""
    logger = logging.getLogger("sglang_weight_exporter")

    def of_process(kind: Any, error: Any, traceback: Any) -> None:
        logger.critical("The exporter ends because of an error.", exc_info=(kind, error, traceback))

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        logger.critical(
            "A thread of the exporter ends because of an error.", exc_info=arguments.exc_value
        )

    sys.excepthook = of_process
    threading.excepthook = of_thread


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
