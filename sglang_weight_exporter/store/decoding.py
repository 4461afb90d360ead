# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Records out of files that another process wrote: valid, of this version, or refused in words.

Valid is more than what the types say, because a value that cannot be sent costs more than its
series: one NaN or one histogram without its last count ends a scrape of all ranks. Numbers are
checked here, so that whoever reads a record need not.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sglang_weight_exporter.records.base import SCHEMA_VERSION, Record
from sglang_weight_exporter.records.memory import MemoryDump
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram, Update, UpdateCounts
from sglang_weight_exporter.records.weights import TableRef
from sglang_weight_exporter.store.files import read_file
from sglang_weight_exporter.weight_table import CODED, NUMBERS, WeightTable

AnyRecord = TypeVar("AnyRecord", bound=Record)

#: A table of two million rows, and thousands of times what a snapshot or an event needs.
LARGEST_TABLE = 512 * 2**20
LARGEST_RECORD = 16 * 2**20

#: What the exporter process keeps for itself is smaller.
LARGEST_NOTE = 2**20

#: What a file can hold with its sign. Counters of bytes pass 2**53 (9 petabytes) in days of updates
#: of a terabyte a minute; what is larger than that is sent as a float.
_LARGEST_INTEGER = 2**63 - 1
#: Times and durations are sent as nanoseconds; this is the year 2262.
_LARGEST_SECONDS = 2**63 / 1e9

_COUNTS = len(DURATION_BUCKETS) + 1
_TRACE_ID = re.compile(r"([0-9a-f]{32})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"([0-9a-f]{32})?")
_FILE = re.compile(r"[\w.-]*")

#: What msgspec raises besides its own errors: for text that is no UTF-8, and for nesting.
_INVALID = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError)


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
        _check_version(content, path)
        return _valid(content, kind)
    except _INVALID as error:
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
    """A snapshot with those of its roles that are valid. Raises :class:`UnreadableError`.

    ``on_left_out`` is told of each role that is not.
    """
    try:
        return decode(content, Snapshot, path)
    except UnreadableError as error:
        try:
            rest, complaints = _without_damaged_roles(content, path)
        except (*_INVALID, KeyError):
            raise error from error.__cause__
        snapshot = decode(rest, Snapshot, path)
        for complaint in complaints:
            if on_left_out is not None:
                on_left_out(complaint)
        return snapshot


def _without_damaged_roles(content: bytes, path: Path) -> tuple[bytes, list[str]]:
    """The content again with its valid roles alone, and a sentence for each other one."""
    fields = _decode(content, dict[str, msgspec.Raw])
    roles, complaints = [], []
    for index, raw in enumerate(_decode(fields["roles"], list[msgspec.Raw])):
        try:
            _valid(raw, Role)
        except _INVALID as error:
            complaints.append(
                f"{path} is damaged in its model {index + 1} ({error}), which is left out. "
                f"The next update of its rank writes it anew."
            )
        else:
            roles.append(raw)
    return msgspec.msgpack.encode({**fields, "roles": roles}), complaints


def read_json(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """What the exporter process noted in a file. Raises ``OSError`` and
    :class:`UnreadableError`."""
    content = read_file(path, LARGEST_NOTE)
    try:
        record: AnyRecord = _decoder(msgspec.json.Decoder, kind).decode(content)
        if problem := _problem(record):
            raise ValueError(f"{kind.__name__}{problem}")
        return record
    except _INVALID as error:
        raise UnreadableError(f"{path} is damaged ({error}).") from error


def _check_version(content: bytes, path: Path) -> None:
    version = _decode(content, _Version).schema
    if version != SCHEMA_VERSION:
        raise UnreadableError(
            f"{path} was written by another version of sglang-weight-exporter (schema "
            f"{version}, this one reads {SCHEMA_VERSION}), so its rank is left out. Install "
            f"the same version beside SGLang and where the exporter process runs."
        )


def _valid(content: bytes | msgspec.Raw, kind: type[AnyRecord]) -> AnyRecord:
    record: AnyRecord = _decode(content, kind)
    problem = _problem(record)
    if problem:
        raise ValueError(f"{kind.__name__}{problem}")
    if isinstance(record, WeightTable):
        _check_table(record)
    return record


def _problem(value: Any) -> str:
    """Where in a value something has the right type and cannot be true, and what; else empty."""
    if isinstance(value, str | bytes | bool):
        return ""
    if isinstance(value, int):
        return "" if 0 <= value <= _LARGEST_INTEGER else f" is {value}"
    if isinstance(value, float):
        # NaN is in no range.
        return "" if 0.0 <= value < _LARGEST_SECONDS else f" is {value}"
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Record):
        if problem := _problem_of_record(value):
            return problem
        parts = ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, Mapping):
        parts = ((f"[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, tuple):
        parts = (("", each) for each in value)
    for where, part in parts:
        if problem := _problem(part):
            return where + problem
    return ""


def _problem_of_record(record: Record) -> str:
    """What only the fields of one kind of record can have."""
    if isinstance(record, Histogram):
        counts = len(record.counts)
        if counts != _COUNTS:
            return f".counts has {counts} entries and not {_COUNTS}"
        # OTLP has 64 bits for their sum.
        return "" if sum(record.counts) <= 2**53 else ".counts are more than can be"
    if isinstance(record, Update | UpdateCounts) and not _TRACE_ID.fullmatch(record.trace_id):
        return f".trace_id is {record.trace_id!r}"
    if isinstance(record, TableRef):
        # Both become parts of paths.
        if not _FILE.fullmatch(record.file):
            return f".file is {record.file!r}"
        if not _SHA256.fullmatch(record.sha256):
            return f".sha256 is {record.sha256!r}"
    fingerprint = record.fingerprint if isinstance(record, TableRef | WeightTable) else ""
    return "" if _FINGERPRINT.fullmatch(fingerprint) else f".fingerprint is {fingerprint!r}"


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
