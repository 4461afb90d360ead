# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal: names come from checkpoints and requests, and may hold anything."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

#: What a terminal obeys (C0 but for tab and line feed, DEL, C1), and what reorders or breaks a line
#: for its reader.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

#: Names that a text lists of each kind.
NAMED = 20


def printable(text: str) -> str:
    """Characters that a terminal obeys as their escapes: ``\\x1b`` for the one of that code."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_line(text: str) -> None:
    """Print it as one line: a name in it cannot begin another one."""
    print(text.replace("\n", "\\n"))


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1:,} more" if names[1:] else "")


def print_names(before: str, names: Sequence[str], count: int | None = None) -> None:
    """The first of some names, a line each. ``count``: of all, where these are not."""
    count = len(names) if count is None else count
    for name in names[:NAMED]:
        print_line(f"{before}  {name}")
    if count > NAMED:
        print_line(f"{before}  and {count - NAMED:,} more")


def print_reasons(before: str, reasons: Mapping[str, str]) -> None:
    """Why something is so of some names, a line each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, of in names.items():
        print_line(f"{before}  {first_of(of)}: {reason}")


class PrintableText:
    """A text stream whose lines are printable; all else is the stream's own. Bytes that are written
    to ``buffer`` stay as they are."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):  # In a locale of few letters too.
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
