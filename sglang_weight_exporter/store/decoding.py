# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Records out of files that another process wrote: valid, of this version, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from sglang_weight_exporter.records import SCHEMA_VERSION, Record
from sglang_weight_exporter.store.files import read_file

AnyRecord = TypeVar("AnyRecord", bound=Record)

#: A table of two million rows; a snapshot and an event are far smaller.
LARGEST_FILE = 512 * 2**20


class UnreadableError(Exception):
    """A file is damaged or of another version; the message names it and says what to do."""


class _Version(msgspec.Struct):
    schema: int


def decode(content: bytes, kind: type[AnyRecord], path: Path) -> AnyRecord:
    """A record from a file's content. Raises :class:`UnreadableError`."""
    try:
        version = msgspec.msgpack.decode(content, type=_Version).schema
        if version != SCHEMA_VERSION:
            raise UnreadableError(
                f"{path} was written by another version of sglang-weight-exporter (schema "
                f"{version}, this one reads {SCHEMA_VERSION}), so its rank is left out. Install "
                f"the same version beside SGLang and where the exporter process runs."
            )
        return msgspec.msgpack.decode(content, type=kind)
    # Besides its own errors, the decoder raises these for text that is no UTF-8 and for nesting.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UnreadableError(
            f"{path} is damaged ({error}), so it is left out. "
            f"The next update of its rank writes it anew."
        ) from error


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a file. Raises ``OSError`` and :class:`UnreadableError`."""
    return decode(read_file(path, LARGEST_FILE), kind, path)
