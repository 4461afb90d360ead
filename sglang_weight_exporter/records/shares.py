# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which shares of the model's logical tensors the rows of a table hold, by the layers' classes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sglang_weight_exporter.records.base import Count, Record

#: Raised when a reader of the previous version could misread the columns.
SHARES_SCHEMA = 1

#: The number, in a part, of an expert that all tokens share.
SHARED_EXPERT = "shared"

#: Along what a logical tensor is cut: not at all, by rows, by columns.
AXES = ("whole", "rows", "columns")


class Share(NamedTuple):
    """Part of a row that is one share of one logical tensor.

    Rows and columns are those of ``fingerprint.sums``: columns are words of eight bytes.
    """

    #: Number of the row in its table.
    row: int
    #: Which of the logical tensors that the row is made of: ``q``, ``k``, ``v``; ``0``, ``1``, …
    #: of others that are merged; ``E.w1``, ``E.w2``, ``E.w3`` of an expert by its number in the
    #: model, or ``shared``. Empty: the row has the logical tensor's name.
    part: str
    #: Bytes from the beginning of the row's tensor.
    offset: int
    #: How many rows and columns it has, and which are the first in the logical tensor.
    rows: int
    columns: int
    first_row: int
    first_column: int
    axis: str = "whole"
    #: Rows or columns of the logical tensor along the axis, as the layer has it.
    total: int = 0

    @property
    def is_whole(self) -> bool:
        """All of a logical tensor that is divided where there are more ranks. Which experts a rank
        has depends on how many there are, so one of them is not."""
        if self.axis == "whole":
            return True
        size = self.rows if self.axis == "rows" else self.columns
        return size == self.total and "." not in self.part


_NUMBERS = ("row", "offset", "rows", "columns", "first_row", "first_column", "total")
_CODED = ("part", "axis")


class ShareTable(Record, frozen=True, kw_only=True):
    """The shares of a table, as columns: ``u64`` numbers, ``u32`` codes into the values beside
    them, 16 bytes of sums each (none: they were not taken)."""

    schema: Count = SHARES_SCHEMA
    #: Of the sums.
    definition: Count
    count: Count
    row: bytes = b""
    offset: bytes = b""
    rows: bytes = b""
    columns: bytes = b""
    first_row: bytes = b""
    first_column: bytes = b""
    total: bytes = b""
    part: bytes = b""
    part_values: tuple[str, ...] = ()
    axis: bytes = b""
    axis_values: tuple[str, ...] = ()
    sums: bytes = b""
    #: Rows (``u64``) that no layer class explains, and codes of why.
    unexplained: bytes = b""
    reason: bytes = b""
    reason_values: tuple[str, ...] = ()


def share_table(
    shares: Sequence[Share], unexplained: Sequence[tuple[int, str]], *, definition: int
) -> ShareTable:
    """The columns of shares, and of rows that have none with why."""
    fields: dict[str, object] = {
        name: array("Q", [getattr(share, name) for share in shares]).tobytes() for name in _NUMBERS
    }
    for name in _CODED:
        fields[name], fields[f"{name}_values"] = _coded([getattr(share, name) for share in shares])
    reason, reason_values = _coded([why for _, why in unexplained])
    return ShareTable(
        definition=definition,
        count=len(shares),
        unexplained=array("Q", [row for row, _ in unexplained]).tobytes(),
        reason=reason,
        reason_values=reason_values,
        **fields,  # type: ignore[arg-type]
    )


def _coded(values: Sequence[str]) -> tuple[bytes, tuple[str, ...]]:
    codes: dict[str, int] = {}
    numbers = [codes.setdefault(value, len(codes)) for value in values]
    return array("I", numbers).tobytes(), tuple(codes)


def shares_of(table: ShareTable) -> Iterator[Share]:
    """In the order in which they were captured."""
    columns = {name: array("Q", getattr(table, name)) for name in _NUMBERS}
    coded = {
        name: map(getattr(table, f"{name}_values").__getitem__, array("I", getattr(table, name)))
        for name in _CODED
    }
    return map(Share, *({**columns, **coded}[name] for name in Share._fields))


def sums_of(table: ShareTable) -> list[str]:
    """32 hexadecimal digits each; empty where they were not taken."""
    digits = table.sums.hex()
    return [digits[at : at + 32] for at in range(0, len(digits), 32)]


def reasons_of(table: ShareTable) -> dict[int, str]:
    """Row → why no share of it is known."""
    values = map(table.reason_values.__getitem__, array("I", table.reason))
    return dict(zip(array("Q", table.unexplained), values, strict=True))


def check_shares(table: ShareTable, rows: int) -> None:
    """Columns are equally long, codes have values, rows are there. Raises ValueError."""
    for names, form, size in ((_NUMBERS, "Q", 8), (_CODED, "I", 4)):
        for name in names:
            if len(getattr(table, name)) != size * table.count:
                raise ValueError(f"the column {name} of {table.count} shares has another length")
            numbers = array(form, getattr(table, name))
            most = {"row": rows}.get(name)
            if name in _CODED:
                most = len(getattr(table, f"{name}_values"))
            if most is not None and numbers and max(numbers) >= most:
                raise ValueError(f"the column {name} of shares has a number without a value")
    count = len(table.unexplained) // 8
    if len(table.unexplained) % 8 or len(table.reason) != 4 * count:
        raise ValueError("the columns of rows without a share have different lengths")
    if count and max(array("I", table.reason)) >= len(table.reason_values):
        raise ValueError("the column reason of shares has a code without a value")
    if len(table.sums) not in {0, 16 * table.count}:
        raise ValueError(f"{len(table.sums)} bytes of sums for {table.count} shares")
