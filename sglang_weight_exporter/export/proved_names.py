# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is noted beside a rank of its loader: patterns of names whose tensors were equal to what a
trainer sent, at some update.

It outlives this process, and commands read it: they say of an update what the exporter says.
"""

from __future__ import annotations

import contextlib

import msgspec

from sglang_weight_exporter.records.base import Record
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.reader import RankDirectory

_FILE = "proved"


class _Proved(Record, frozen=True, kw_only=True):
    """The file ``proved`` in a rank's directory, of its target."""

    names: tuple[str, ...] = ()


def proved_names(directory: RankDirectory) -> frozenset[str]:
    """What cannot be read is as if it was never written."""
    try:
        return frozenset(directory.noted(_FILE, _Proved).names)
    except (OSError, UnreadableError):
        return frozenset()


def note_proved_names(directory: RankDirectory, names: frozenset[str]) -> None:
    """Beside those that are there. On a full disk the next comparison does it."""
    there = proved_names(directory)
    if not names <= there:
        proved = _Proved(names=tuple(sorted(names | there)))
        with contextlib.suppress(OSError):
            directory.note(_FILE, msgspec.json.encode(proved))
