# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whose memory an address is: of which tensor and, where a rank has left its memory, of which pool
or graph."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from sglang_weight_exporter.cli.choice import rank_name
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Row


def address(text: str) -> int:
    """As CUDA and a table print it: hexadecimal, with or without 0x."""
    try:
        found = int(text, 16)
    except ValueError:
        found = -1
    if not 0 <= found < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as 0x7f30c2000000")
    return found


def print_owners(wanted: int, ranks: Iterable[tuple[Table, Sequence[MemoryOwner] | None]]) -> int:
    """For each table what is there, and what other owners of the rank's memory are, where it has
    left it (``None``: it has not). Exit status 0 where something was found, 1 where nothing was."""
    found = False
    for table, owners in ranks:
        print_line(
            f"engine {table.engine.name}  {rank_name(table.ranks)}  {table.role.name}  "
            f"process {table.pid}"
        )
        lines = [*_tensors(wanted, table.rows()), *_others(wanted, owners or ())]
        found = found or bool(lines)
        for line in lines or _nothing(wanted, list(table.rows()), owners):
            print_line(f"  {line}")
    return 0 if found else 1


def _tensors(wanted: int, rows: Iterable[Row]) -> list[str]:
    """A view's memory is that of its storage from its first byte on."""
    return [
        f"{row.name}  byte {wanted - row.data_ptr:,} of {row.nbytes:,}, {row.dtype} "
        f"{'x'.join(map(str, row.shape)) or 'scalar'}, {row.kind}"
        for row in rows
        if row.data_ptr <= wanted < max(row.data_ptr + row.nbytes, _end(row))
    ]


def _end(row: Row) -> int:
    """Behind its last element."""
    if not row.shape or 0 in row.shape:
        return row.data_ptr + row.nbytes
    elements = 1
    for size in row.shape:
        elements *= size
    last = sum((size - 1) * step for size, step in zip(row.shape, row.stride, strict=True))
    return row.data_ptr + (last + 1) * (row.nbytes // elements)


def _others(wanted: int, owners: Iterable[MemoryOwner]) -> list[str]:
    return [
        f"{owner.name}  byte {wanted - owner.address:,} of {owner.nbytes:,}, {owner.part}"
        for owner in owners
        if owner.address <= wanted < owner.address + owner.nbytes
        and owner.part not in {"weights", "derived_weights"}
    ]


def _nothing(wanted: int, rows: Sequence[Row], owners: Sequence[MemoryOwner] | None) -> list[str]:
    lines = ["no tensor of the table is there"]
    before = max((row for row in rows if row.data_ptr <= wanted), key=_end, default=None)
    if before is not None:
        lines.append(f"{wanted - _end(before):,} bytes behind {before.name}")
    behind = min(
        (row for row in rows if row.data_ptr > wanted), key=lambda row: row.data_ptr, default=None
    )
    if behind is not None:
        lines.append(f"{behind.data_ptr - wanted:,} bytes before {behind.name}")
    if owners is None:
        lines.append(
            "KV pools, adapters and graphs are known once the rank has left its memory: "
            "`sglang-weight-exporter snapshot --ask`"
        )
    return lines
