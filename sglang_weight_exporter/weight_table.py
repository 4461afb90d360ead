# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The pointer table of a model: its rows, the columns they are stored in, how two differ."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from sglang_weight_exporter.records.base import SCHEMA_VERSION, Count, Fingerprint, Record, Seconds
from sglang_weight_exporter.records.shares import ShareTable
from sglang_weight_exporter.records.weights import NAMED_CHANGES, Kind, TableChanges


class Row(NamedTuple):
    """One named tensor of a table."""

    name: str
    #: Address of the first element in the engine process.
    data_ptr: int
    #: Elements times their size: for a tensor with holes less than the memory it spans.
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    #: In elements.
    stride: tuple[int, ...]
    device: str
    kind: str
    #: The allocation behind the tensor; the same for tied tensors and views.
    storage_ptr: int
    storage_nbytes: int

    @property
    def shape_in_memory(self) -> tuple[int, ...]:
        """The shape whose elements follow one another in memory, as the fingerprint has them."""
        order = sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim])
        return tuple(self.shape[dim] for dim in order)


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill a run of memory, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


class Region(NamedTuple):
    """A contiguous run of memory inside one allocation that holds weights."""

    data_ptr: int
    nbytes: int
    device: str


#: Columns of addresses and bytes (``u64``), and columns of codes (``u32``) into the values beside
#: them. With the names they are a row.
NUMBERS = ("data_ptr", "nbytes", "storage_ptr", "storage_nbytes")
CODED = ("dtype", "shape", "stride", "device", "kind")


class WeightTable(Record, frozen=True, kw_only=True):
    """The pointer table of one role: one row a named tensor, stored as columns.

    Numeric columns are little-endian arrays: ``u64`` for addresses and bytes, ``u32`` for codes
    into the ``*_values`` beside them. Values are numbered by first appearance. ``names`` is UTF-8,
    one name a line.
    """

    schema: Count = SCHEMA_VERSION
    role: str
    captured_at: Seconds
    sha256: str
    rows: Count
    names: bytes
    data_ptr: bytes
    nbytes: bytes
    storage_ptr: bytes
    storage_nbytes: bytes
    dtype: bytes
    dtype_values: tuple[str, ...]
    shape: bytes
    shape_values: tuple[tuple[Count, ...], ...]
    stride: bytes
    stride_values: tuple[tuple[Count, ...], ...]
    device: bytes
    device_values: tuple[str, ...]
    kind: bytes
    kind_values: tuple[str, ...]
    #: Contiguous runs inside one allocation: ``u64`` addresses and bytes, ``u32`` codes into
    #: ``device_values``.
    region_ptr: bytes = b""
    region_nbytes: bytes = b""
    region_device: bytes = b""
    #: What the tensors hold, 16 bytes a row (zeros: none of this one), of all of them together (32
    #: hexadecimal digits), and how many seconds it took to know; empty where it was not taken.
    fingerprints: bytes = b""
    fingerprint: Fingerprint = ""
    fingerprint_seconds: Seconds | None = None
    #: Which shares of the model's logical tensors the rows hold, with sums over them; ``None``:
    #: they were not taken.
    shares: ShareTable | None = None


#: Stands for a tensor without bytes that could be read.
NO_FINGERPRINT = "0" * 32

#: What the SHA-256 of a table covers, in this order.
HASHED = (
    "names",
    *NUMBERS,
    *(part for column in CODED for part in (column, f"{column}_values")),
)


def table_sha256(fields: Mapping[str, Any]) -> str:
    """The fingerprint of a table's rows, hexadecimal; ``fields`` are those of `WeightTable`.

    It is of names, addresses and layouts, not of what the tensors hold. SHA-256 over each column's
    length (``u64``, little-endian) and content; the ``*_values`` as compact JSON. Role, time and
    regions are not part of it.
    """
    digest = hashlib.sha256()
    for name in HASHED:
        column = fields[name]
        content = column if isinstance(column, bytes) else msgspec.json.encode(column)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def table_rows(table: WeightTable) -> Iterator[Row]:
    """The rows of a table, in the model's order: parameters, buffers, derived weights."""
    if not table.rows:
        return iter(())
    columns: dict[str, Iterable[Any]] = {"name": table.names.decode().split("\n")}
    for column in NUMBERS:
        columns[column] = array("Q", getattr(table, column))
    for column in CODED:
        values = getattr(table, f"{column}_values")
        columns[column] = map(values.__getitem__, array("I", getattr(table, column)))
    return map(Row, *(columns[column] for column in Row._fields))


def table_fingerprints(table: WeightTable) -> dict[str, str]:
    """Name → fingerprint, 32 hexadecimal digits, of each tensor that has one."""
    digits = table.fingerprints.hex()
    names = table.names.decode().split("\n") if digits else []
    taken = {name: digits[32 * row : 32 * row + 32] for row, name in enumerate(names)}
    return {name: text for name, text in taken.items() if text != NO_FINGERPRINT}


def modified_tensors(before: WeightTable, after: WeightTable) -> dict[str, Kind]:
    """Name → kind of the tensors of both tables that hold other bytes now. Empty where one of the
    two has no fingerprints: nothing is known then."""
    if before.fingerprint == after.fingerprint or not (before.fingerprint and after.fingerprint):
        return {}
    then, now = table_fingerprints(before), table_fingerprints(after)
    kinds = map(after.kind_values.__getitem__, array("I", after.kind))
    return {
        name: cast("Kind", kind)
        for name, kind in zip(after.names.decode().split("\n"), kinds, strict=True)
        if name in now and then.get(name, now[name]) != now[name]
    }


def with_names(table: WeightTable, chosen: Callable[[str], bool]) -> WeightTable:
    """The table with only the rows whose name is chosen; its SHA-256 is its own, the fingerprint of
    the rank stays."""
    found = [(number, row) for number, row in enumerate(table_rows(table)) if chosen(row.name)]
    if len(found) == table.rows:
        return table
    made = table_of_rows([row for _, row in found], role=table.role, captured_at=table.captured_at)
    content = table.fingerprints
    return msgspec.structs.replace(
        made,
        fingerprints=b"".join(content[16 * number : 16 * number + 16] for number, _ in found),
        fingerprint=table.fingerprint,
        fingerprint_seconds=table.fingerprint_seconds,
    )


def without_fingerprints(table: WeightTable) -> WeightTable:
    return msgspec.structs.replace(
        table, fingerprints=b"", fingerprint="", fingerprint_seconds=None, shares=None
    )


def table_of_rows(rows: Sequence[Row], *, role: str, captured_at: float) -> WeightTable:
    """The table that has these rows, with its fingerprint and without regions."""
    fields: dict[str, Any] = {
        "rows": len(rows),
        "names": "\n".join(row.name for row in rows).encode(),
    }
    for column in NUMBERS:
        fields[column] = array("Q", [getattr(row, column) for row in rows]).tobytes()
    for column in CODED:
        codes: dict[Any, int] = {}
        numbers = [codes.setdefault(getattr(row, column), len(codes)) for row in rows]
        fields[column] = array("I", numbers).tobytes()
        fields[f"{column}_values"] = tuple(codes)
    sha256 = table_sha256(fields)
    return WeightTable(role=role, captured_at=captured_at, sha256=sha256, **fields)


def table_regions(table: WeightTable) -> Iterator[Region]:
    """The regions of a table, by device and address."""
    return map(
        Region,
        array("Q", table.region_ptr),
        array("Q", table.region_nbytes),
        map(table.device_values.__getitem__, array("I", table.region_device)),
    )


def compare_tables(before: WeightTable | None, after: WeightTable | None) -> TableChanges:
    """What changed. CUDA graphs keep addresses, so an update in place should change nothing.

    Empty where one of the two could not be read: nothing is known then.
    """
    if before is None or after is None or before.sha256 == after.sha256:
        return TableChanges()
    if (before.names, before.device, before.device_values) != (
        after.names,
        after.device,
        after.device_values,
    ):
        return compare_rows(table_rows(before), table_rows(after))
    # The engine waits for this one: columns are compared, and no row is made.
    rows = {
        "moved": _differing(before.data_ptr, after.data_ptr),
        "resized": _differing(before.nbytes, after.nbytes),
    }
    names = after.names.decode().split("\n") if any(rows.values()) else []
    return TableChanges(
        names={
            change: tuple(names[row] for row in found[:NAMED_CHANGES])
            for change, found in rows.items()
            if found
        },
        **{change: len(found) for change, found in rows.items()},
    )


def _differing(before: bytes, after: bytes) -> list[int]:
    if before == after:
        return []
    pairs = zip(array("Q", before), array("Q", after), strict=True)
    return [row for row, (old, new) in enumerate(pairs) if old != new]


def compare_rows(
    before: Iterable[Row], after: Iterable[Row], *, named: int = NAMED_CHANGES
) -> TableChanges:
    """What changed between two tables; of each kind of change ``named`` names are kept.

    A tensor on another device is not also moved; a resized one may be both.
    """
    old = {row.name: row for row in before}
    new = {row.name: row for row in after}
    names: dict[str, list[str]] = {
        "moved": [],
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "resized": [],
        "device": [],
    }
    for name, now in new.items():
        then = old.get(name)
        if then is None:
            continue
        if now.device != then.device:
            names["device"].append(name)
        elif now.data_ptr != then.data_ptr:
            names["moved"].append(name)
        if now.nbytes != then.nbytes:
            names["resized"].append(name)
    return TableChanges(
        names={change: tuple(found[:named]) for change, found in names.items() if found},
        **{change: len(found) for change, found in names.items()},
    )
