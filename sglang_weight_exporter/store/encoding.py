# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Records into the bytes of their files."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_weight_exporter.records.base import Record


def encode(record: Record) -> bytes:
    """A record's file content.

    A path that is no UTF-8 comes out of Python with lone surrogates, which no file format takes.
    They are written as ``\\udcff``: a name that looks odd is better than the record before it.
    """
    try:
        return msgspec.msgpack.encode(record)
    except UnicodeEncodeError:
        return msgspec.msgpack.encode(_valid(msgspec.to_builtins(record, builtin_types=(bytes,))))


def _valid(value: Any) -> Any:
    """The same with strings that UTF-8 can carry."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_valid(key): _valid(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    return value
