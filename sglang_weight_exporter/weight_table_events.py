# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The pointer table as events of spans: tables to attributes, and attributes back to tables.

A table is cut into chunks of rows. Each is the attributes of one event, and events fill spans up to
a size that collectors take. The attributes are plain dictionaries; whoever sends or finds spans
knows OpenTelemetry, and nothing here does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from sglang_weight_exporter.weight_table import Row, WeightTable, table_of_rows, table_rows

#: Limits of one event and of one span, in rows and events.
EVENT_ROWS = 2_000
SPAN_EVENTS = 100


class Limits(NamedTuple):
    """Bytes, as protobuf, of one event, and of one span, which is a message of its own.

    A collector's gRPC receiver takes messages of 4 MiB, uncompressed.
    """

    event: int = 500_000
    span: int = 3_000_000


DEFAULT_LIMITS = Limits()

TABLE_EVENT = "sglang.weights.table"

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int]
Attributes = dict[str, AttributeValue]

#: Columns that an event carries as codes into ``COLUMN.values``.
_CODED = ("dtype", "shape", "device")


class TableEventsError(Exception):
    """Events are not the table that was sent; the message is a sentence without its subject, which
    is the span that the table belongs to."""


class MissingRowsError(TableEventsError):
    """Events are missing or damaged: other spans may have them."""


def encode_table(
    table: WeightTable, *, captured_at: float, limits: Limits = DEFAULT_LIMITS, reserved: int = 0
) -> list[list[Attributes]]:
    """Attributes of the events that carry a table, by span; none for a table without rows.

    ``captured_at``: when the table was last seen to be this one, in Unix seconds. ``reserved``:
    bytes that a span has besides its events; the first may have no room for an event.
    """
    room = max(limits.span - reserved, limits.span // 2)
    chunks = list(_chunks(table, min(limits.event, room)))
    return [
        [
            {
                **({"fingerprint": chunk.fingerprints} if chunk.fingerprints else {}),
                **_columns(chunk.rows),
                **({"table.fingerprint": table.fingerprint} if chunk.fingerprints else {}),
                "schema_version": table.schema,
                "role": table.role,
                "table.sha256": table.sha256,
                "table.rows": table.rows,
                "table.captured_at": captured_at,
                "chunk.index": index,
                "chunk.count": len(chunks),
                "row.offset": chunk.offset,
                "row.count": len(chunk.rows),
            }
            for index, chunk in span
        ]
        for span in _packed(chunks, limits.span, reserved)
    ]


def decode_table(
    events: Sequence[Mapping[str, Any]],
    *,
    role: str,
    rows: int,
    sha256: str,
    chunks: int | None = None,
) -> WeightTable:
    """The table of this many rows and this SHA-256, without regions; with fingerprints of what the
    tensors hold where all its events have them. The SHA-256 does not cover those.

    ``events``: attributes of its events, in any order; one that was sent twice may be there twice.
    ``chunks``: how many events there should be, for the message. Raises :class:`TableEventsError`.
    """
    rows_of: dict[int, list[Row]] = {}
    fingerprints: dict[int, bytes] = {}
    damaged: list[tuple[object, str]] = []
    for event in events:
        offset = event.get("row.offset")
        try:
            start = int(event["row.offset"])
            if start not in rows_of:
                fingerprints[start] = _fingerprints_of(event)
                rows_of[start] = _rows_of(event)
        except (
            KeyError,
            ValueError,
            IndexError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            damaged.append((offset, f"chunk {event.get('chunk.index', '?')} is damaged ({error})"))
    problems = [text for offset, text in damaged if offset not in rows_of]
    end = 0
    for start in sorted(rows_of):
        if start > end:
            problems.append(_gap(end, start))
        end = max(end, start + len(rows_of[start]))
    if end < rows:
        problems.append(_gap(end, rows))
    if problems:
        count = chunks or (events[0].get("chunk.count", "?") if events else "?")
        raise MissingRowsError(
            f"has {rows:,} rows of a table in {count} chunks, of which {len(rows_of)} "
            f"are here: {'; '.join(problems)}."
        )
    found = [row for start in sorted(rows_of) for row in rows_of[start]]
    changed = f"has all {rows:,} rows of its table, and they are not the ones that were sent: "
    try:
        captured_at = float(events[0].get("table.captured_at", 0)) if events else 0.0
        table = table_of_rows(found, role=role, captured_at=captured_at)
    except (TypeError, ValueError, OverflowError) as error:
        raise TableEventsError(f"{changed}a value is none that a table has ({error}).") from error
    if table.sha256 != sha256:
        raise TableEventsError(
            f"{changed}their SHA-256 is {table.sha256} and should be {sha256}. Something on the "
            "way changed or cut values."
        )
    content = b"".join(fingerprints[start] for start in sorted(rows_of))
    if not found or len(content) != 16 * rows:
        return table
    return msgspec.structs.replace(
        table, fingerprints=content, fingerprint=str(events[0].get("table.fingerprint", ""))
    )


# Encoding.


@dataclass(frozen=True)
class _Chunk:
    """Rows that go into one span event, and an upper bound of its bytes as protobuf."""

    offset: int
    rows: Sequence[Row]
    nbytes: int
    #: What each row's tensor holds, 32 hexadecimal digits; empty where it was not taken.
    fingerprints: Sequence[str] = ()


#: Upper bound of an event's keys, counts and fingerprint.
_CHUNK_BYTES = 1_000
#: What a link to another span takes as protobuf.
_LINK_BYTES = 40
#: What a row's fingerprint takes as protobuf.
_FINGERPRINT_BYTES = 36


def _chunks(table: WeightTable, limit: int) -> Iterator[_Chunk]:
    digits = table.fingerprints.hex()
    offset, rows, size = 0, list[Row](), _CHUNK_BYTES
    shapes: set[tuple[int, ...]] = set()

    def made() -> _Chunk:
        places = range(offset, offset + len(rows)) if digits else ()
        return _Chunk(offset, rows, size, [digits[32 * at : 32 * at + 32] for at in places])

    for row in table_rows(table):
        needed = _row_bytes(row) + (_FINGERPRINT_BYTES if digits else 0)
        if rows and (len(rows) == EVENT_ROWS or size + needed + 22 * len(row.shape) > limit):
            yield made()
            offset, rows, size = offset + len(rows), [], _CHUNK_BYTES
            shapes.clear()
        rows.append(row)
        size += needed
        if row.shape not in shapes:
            shapes.add(row.shape)
            size += 4 + 22 * len(row.shape)
    if rows:
        yield made()


def _row_bytes(row: Row) -> int:
    """Upper bound of what a row takes as protobuf, without its shape, which is sent once.

    An element of an array takes 4 bytes more than its text, and 3 more than a number, which takes
    a byte for 7 bits.
    """
    texts = (
        row.name.encode(),
        hex(row.data_ptr),
        hex(row.storage_ptr),
        _text(row.stride),
        row.kind,
    )
    numbers = (row.nbytes, row.storage_nbytes)
    return (
        sum(len(text) + (4 if len(text) < 128 else 7) for text in texts)
        + sum(3 + (number.bit_length() + 6) // 7 for number in numbers)
        + 3 * 5  # Codes of dtype, shape and device.
        + 2  # A number of 0 takes a byte too.
    )


def _columns(rows: Sequence[Row]) -> Attributes:
    """Parallel arrays, one a column. What repeats is coded: an array of numbers that say which
    of ``.values`` a row has. The essential columns come last, because OpenTelemetry's limits drop
    the first."""
    attributes: Attributes = {}
    coded = {
        "dtype": [row.dtype for row in rows],
        "shape": [_text(row.shape) for row in rows],
        "device": [row.device for row in rows],
    }
    for column in _CODED:
        values, codes = coded[column], dict[str, int]()
        attributes[column] = [codes.setdefault(value, len(codes)) for value in values]
        attributes[f"{column}.values"] = list(codes)
    return {
        **attributes,
        "stride": [_text(row.stride) for row in rows],
        "kind": [row.kind for row in rows],
        "storage_nbytes": [row.storage_nbytes for row in rows],
        # As text: an integer above 2^63-1 would be lost, and viewers round above 2^53.
        "storage_ptr": [hex(row.storage_ptr) for row in rows],
        "nbytes": [row.nbytes for row in rows],
        "data_ptr": [hex(row.data_ptr) for row in rows],
        "name": [row.name for row in rows],
    }


def _text(value: Sequence[int]) -> str:
    """A shape or stride as text, because an attribute holds no array of arrays."""
    return ",".join(map(str, value))


def _packed(
    chunks: Sequence[_Chunk], limit: int, reserved: int
) -> Iterator[list[tuple[int, _Chunk]]]:
    """Chunks with their index, by span."""
    total = sum(chunk.nbytes for chunk in chunks)
    # The first one names the others.
    size = reserved + _LINK_BYTES * (2 * total // limit)
    span: list[tuple[int, _Chunk]] = []
    is_first = True
    for index, chunk in enumerate(chunks):
        full = len(span) >= SPAN_EVENTS or size + chunk.nbytes > limit
        if full and (span or is_first):
            yield span
            span, size, is_first = [], reserved, False
        span.append((index, chunk))
        size += chunk.nbytes
    if span:
        yield span


# Decoding.


def _gap(start: int, end: int) -> str:
    return f"rows {start:,} to {end - 1:,} are missing"


def _rows_of(chunk: Mapping[str, Any]) -> list[Row]:
    """The rows of an event. Raises ``ValueError`` and the like where they are damaged."""
    count = int(chunk["row.count"])
    columns: dict[str, list[Any]] = {}
    for column in Row._fields:
        if column not in chunk:
            raise ValueError(f"the column {column} is missing")
        values = _array(chunk[column])
        if len(values) != count:
            raise ValueError(f"the column {column} has {len(values)} of {count} values")
        if column in _CODED:
            known = _array(chunk[f"{column}.values"])
            values = [known[int(code)] for code in values]
        columns[column] = values
    return [
        Row(
            name=str(columns["name"][row]),
            data_ptr=int(columns["data_ptr"][row], 16),
            nbytes=int(columns["nbytes"][row]),
            dtype=str(columns["dtype"][row]),
            shape=_dimensions(columns["shape"][row]),
            stride=_dimensions(columns["stride"][row]),
            device=str(columns["device"][row]),
            kind=str(columns["kind"][row]),
            storage_ptr=int(columns["storage_ptr"][row], 16),
            storage_nbytes=int(columns["storage_nbytes"][row]),
        )
        for row in range(count)
    ]


def _fingerprints_of(chunk: Mapping[str, Any]) -> bytes:
    """16 bytes a row, or none. Raises ``ValueError`` and the like where they are damaged."""
    if "fingerprint" not in chunk:
        return b""
    texts = [str(text) for text in _array(chunk["fingerprint"])]
    if len(texts) != int(chunk["row.count"]) or any(len(text) != 32 for text in texts):
        raise ValueError("the column fingerprint is not what was sent")
    return bytes.fromhex("".join(texts))


def _array(value: Any) -> list[Any]:
    # Jaeger keeps an array as the text of a JSON array.
    return json.loads(value) if isinstance(value, str) else list(value)


def _dimensions(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split(",") if part)
