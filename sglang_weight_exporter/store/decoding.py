# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Records out of files that another process wrote: valid, of this version, or refused in words.

What is valid the records' own types say (``records.base``), so that whoever reads a record need not
check a number again. Of a snapshot, what is not valid is left out and the rest is kept.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from array import array
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

from sglang_weight_exporter.records.base import FEW, SCHEMA_VERSION, Record
from sglang_weight_exporter.records.memory import MemoryDump
from sglang_weight_exporter.records.shares import check_shares
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import UpdateInProgress
from sglang_weight_exporter.store.files import read_file
from sglang_weight_exporter.weight_table import CODED, NUMBERS, WeightTable

AnyRecord = TypeVar("AnyRecord", bound=Record)

#: A table of two million rows, and thousands of times what a snapshot or an event needs.
LARGEST_TABLE = 512 * 2**20
LARGEST_RECORD = 16 * 2**20

#: What the exporter process keeps for itself is smaller.
LARGEST_NOTE = 2**20

#: What msgspec raises besides its own errors: for text that is no UTF-8, and for nesting.
_INVALID = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError)


#: And what a record raises without a field that it needs.
_NOT_MENDED = (*_INVALID, TypeError)


#: msgspec prepares a type when it first meets it, and two threads that have it do so at once end
#: the process. Here each is prepared by one, and then used by all.
_preparing = threading.Lock()
_decoders: dict[Any, Any] = {}


def _decoder(of: Callable[[Any], Any], kind: Any) -> Any:
    found = _decoders.get((of, kind))
    if found is None:
        with _preparing:
            found = _decoders.setdefault((of, kind), of(kind))
    return found


def _decode(content: bytes | msgspec.Raw, kind: Any) -> Any:
    return _decoder(msgspec.msgpack.Decoder, kind).decode(content)


#: Lists of which each entry becomes series: their field, what an entry is called, and what tells
#: its series from those of the others. The same series twice is what some readers of a scrape take
#: either of, and others refuse all of.
_LISTS: dict[type[Record], tuple[tuple[str, str, Callable[[Any], Any]], ...]] = {
    Snapshot: (
        ("roles", "model", attrgetter("name")),
        ("devices", "device", attrgetter("name")),
        ("memory", "account of memory of", attrgetter("device")),
        ("hooks", "hook", attrgetter("target")),
    ),
    Role: (
        ("weights", "sum of weights", attrgetter("device", "kind", "dtype")),
        ("kv_pools", "KV pool", attrgetter("device", "pool")),
        ("lora", "pool of adapters on", attrgetter("device")),
    ),
}


class UnreadableError(Exception):
    """A file is damaged or of another version; the message names it and says what to do."""


class _Version(msgspec.Struct):
    schema: int


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a file. Raises ``OSError`` and :class:`UnreadableError`."""
    limit = LARGEST_TABLE if issubclass(kind, WeightTable | MemoryDump) else LARGEST_RECORD
    return decode(read_file(path, limit), kind, path)


def decode(content: bytes, kind: type[AnyRecord], path: Path) -> AnyRecord:
    """A record from a file's content. Raises :class:`UnreadableError`."""
    try:
        record: AnyRecord = _decode(content, kind)
        _check_version(getattr(record, "schema", SCHEMA_VERSION), path)
        if isinstance(record, WeightTable):
            _check_table(record)
        return record
    except _INVALID as error:
        with contextlib.suppress(*_INVALID):
            _check_version(_decode(content, _Version).schema, path)
        raise UnreadableError(
            f"{path} is damaged ({error}), so it is left out. "
            f"The next update of its rank writes it anew."
        ) from error


def read_snapshot(path: Path, on_left_out: Callable[[str], None] | None = None) -> Snapshot:
    """The snapshot in a file. Raises ``OSError`` and :class:`UnreadableError`."""
    return decode_snapshot(read_file(path, LARGEST_RECORD), path, on_left_out)


def decode_snapshot(
    content: bytes, path: Path, on_left_out: Callable[[str], None] | None = None
) -> Snapshot:
    """A snapshot with what of it is valid. Raises :class:`UnreadableError`.

    A field that may be ``None`` is, where its value is not valid; another one takes the record
    along that it is in: at most a role. Of what comes twice the first counts.
    ``on_left_out`` gets a sentence for each.
    """
    left_out: list[str] = []
    try:
        snapshot = decode(content, Snapshot, path)
    except UnreadableError as error:
        try:
            values = _decode(content, Any)
            with _preparing:
                snapshot = _mended(values, Snapshot, "", left_out)
        except _NOT_MENDED:
            raise error from error.__cause__
        _check_version(snapshot.schema, path)
    snapshot = _without_doubles(snapshot, "", left_out)
    for what in left_out:
        if on_left_out is not None:
            on_left_out(
                f"{path} is damaged{what}, which is left out. "
                f"The next update of its rank writes it anew."
            )
    return snapshot


def _without_doubles(record: AnyRecord, where: str, left_out: list[str]) -> AnyRecord:
    """Without entries of a list that come twice."""
    changed: dict[str, Any] = {}
    for field, what, distinct in _LISTS.get(type(record), ()):
        entries: tuple[Any, ...] = getattr(record, field) or ()
        if not entries:
            continue
        found: dict[Any, Any] = {}
        for entry in entries:
            if (key := distinct(entry)) in found:
                left_out.append(f" by a second {what} {_name(key)!r}{where}")
            else:
                found[key] = entry
        if type(entries[0]) in _LISTS:
            inside = f" in its {what} "
            found = {
                key: _without_doubles(entry, inside + repr(key), left_out)
                for key, entry in found.items()
            }
        kept = tuple(found.values())
        if len(kept) < len(entries) or any(map(operator.is_not, kept, entries)):
            changed[field] = kept
    return msgspec.structs.replace(record, **changed) if changed else record


def _name(key: object) -> str:
    return " ".join(key) if isinstance(key, tuple) else str(key)


def _mended(value: Any, kind: Any, where: str, left_out: list[str]) -> Any:
    """Plain values as what a type annotation says, without what is not valid. Raises what msgspec
    raises where nothing can be left out."""
    try:
        return msgspec.convert(value, kind)
    except _INVALID as error:
        origin, inner = get_origin(kind), get_args(kind)
        if origin in {Union, UnionType} and NoneType in inner:
            (some,) = (each for each in inner if each is not NoneType)
            try:
                return _mended(value, some, where, left_out)
            except _NOT_MENDED:
                if some is UpdateInProgress:
                    raise  # Without it nobody would know that the table may be a mixture.
                left_out.append(f" in {where} ({error})")
                return None
        if origin is Annotated and inner[1] is FEW and len(value) <= (FEW.max_length or 0):
            return _mended(value, inner[0], where, left_out)
        if origin is tuple and isinstance(value, list):
            return _mended_tuple(value, inner[0], where, left_out)
        if origin is dict and isinstance(value, dict):
            return {
                msgspec.convert(key, inner[0]): _mended(
                    each, inner[1], f"{where}[{key!r}]", left_out
                )
                for key, each in value.items()
            }
        if not (isinstance(kind, type) and issubclass(kind, Record) and isinstance(value, dict)):
            raise
        fields = {
            field.name: _mended(value[field.name], field.type, f"{where}.{field.name}", left_out)
            for field in msgspec.structs.fields(kind)
            if field.name in value
        }
        return kind(**fields)


def _mended_tuple(values: list[Any], kind: Any, where: str, left_out: list[str]) -> tuple[Any, ...]:
    kept = []
    for number, value in enumerate(values):
        place = f"its model {number + 1}" if kind is Role else f"{where}[{number}]"
        try:
            kept.append(_mended(value, kind, place, left_out))
        except _NOT_MENDED as error:
            if kind is not Role:
                raise
            left_out.append(f" in {place} ({error})")
    return tuple(kept)


def read_json(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """What the exporter process noted in a file. Raises ``OSError`` and
    :class:`UnreadableError`."""
    content = read_file(path, LARGEST_NOTE)
    try:
        record: AnyRecord = _decoder(msgspec.json.Decoder, kind).decode(content)
        return record
    except _INVALID as error:
        raise UnreadableError(f"{path} is damaged ({error}).") from error


def _check_version(version: int, path: Path) -> None:
    if version != SCHEMA_VERSION:
        raise UnreadableError(
            f"{path} was written by another version of sglang-weight-exporter (schema "
            f"{version}, this one reads {SCHEMA_VERSION}), so its rank is left out. Install "
            f"the same version beside SGLang and where the exporter process runs."
        )


def _check_table(table: WeightTable) -> None:
    """Columns are equally long and their codes have values."""
    names = table.names.decode().count("\n") + 1 if table.rows else 0
    if names != table.rows:
        raise ValueError(f"the table has {names} names of {table.rows} rows")
    for column in NUMBERS:
        _check_column(column, getattr(table, column), "Q", table.rows)
    for column in CODED:
        values = getattr(table, f"{column}_values")
        _check_column(column, getattr(table, column), "I", table.rows, codes_of=values)
    if len(table.fingerprints) not in {0, 16 * table.rows}:
        raise ValueError(f"{len(table.fingerprints)} bytes of fingerprints for {table.rows} rows")
    if table.shares is not None:
        check_shares(table.shares, table.rows)
    regions = len(table.region_ptr) // 8
    _check_column("region_ptr", table.region_ptr, "Q", regions)
    _check_column("region_nbytes", table.region_nbytes, "Q", regions)
    _check_column("region_device", table.region_device, "I", regions, codes_of=table.device_values)


def _check_column(
    name: str, column: bytes, form: str, rows: int, *, codes_of: tuple[Any, ...] | None = None
) -> None:
    numbers = array(form)
    if len(column) != rows * numbers.itemsize:
        raise ValueError(f"the column {name} has {len(column)} bytes for {rows} rows")
    if codes_of is not None and rows:
        numbers.frombytes(column)
        if max(numbers) >= len(codes_of):
            raise ValueError(f"the column {name} has a code without a value")
