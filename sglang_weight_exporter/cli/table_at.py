# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whose memory an address is: of which tensor and, where a rank has left its memory or has ended,
of which pool or graph."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sglang_weight_exporter.cli.choice import rank_name
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.records.black_box import BlackBox, Segment
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.ended import EndedRank
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Row, table_rows


@dataclass(frozen=True)
class Place:
    """What is known of the memory of one model of a rank. ``owners``: of more than its tensors;
    ``None``: nothing."""

    engine: Engine
    ranks: Ranks
    role: str
    pid: int
    rows: Sequence[Row]
    owners: Sequence[MemoryOwner] | None = None
    segments: Sequence[Segment] = ()
    ended: bool = False

    @classmethod
    def of_table(
        cls, table: Table, owners: Sequence[MemoryOwner] | None, box: BlackBox | None
    ) -> Place:
        """Of a rank that lives."""
        return cls(
            engine=table.engine,
            ranks=table.ranks,
            role=table.role.name,
            pid=table.pid,
            rows=list(table.rows()),
            owners=box.owners if owners is None and box is not None else owners,
            segments=() if box is None else box.segments,
        )


def ended_places(ended: EndedRank) -> Iterator[Place]:
    """Of a rank that has ended, as it left them."""
    known, box = ended.known, ended.box
    roles = () if ended.snapshot is None else ended.snapshot.roles
    tables: dict[str, Sequence[Row]] = {} if roles else {"": ()}
    for role in roles:
        tables[role.name] = ()
        if role.table is not None:
            with contextlib.suppress(OSError, UnreadableError):
                tables[role.name] = list(table_rows(ended.directory.table(role.table.file)))
    for name, rows in tables.items():
        yield Place(
            engine=known.engine,
            ranks=known.ranks,
            role=name,
            pid=known.pid,
            rows=rows,
            owners=None if box is None else box.owners,
            segments=() if box is None else box.segments,
            ended=True,
        )


def address(text: str) -> int:
    """As CUDA and a table print it: hexadecimal, with or without 0x."""
    try:
        found = int(text, 16)
    except ValueError:
        found = -1
    if not 0 <= found < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as 0x7f30c2000000")
    return found


def print_owners(wanted: int, places: Iterable[Place]) -> int:
    """What is there, for each model of each rank that lives, and for those that have ended where
    they had anything there. Exit status 0 where something was found, 1 where nothing was."""
    found, ended = False, 0
    for place in places:
        lines = [*_tensors(wanted, place.rows), *_others(wanted, place.owners or ())]
        found = found or bool(lines)
        lines = lines or _in_segment(wanted, place)
        if place.ended and not lines:
            ended += 1
            continue
        print_line(
            f"engine {place.engine.name}  {rank_name(place.ranks)}  {place.role}  "
            f"process {place.pid}{', which has ended' if place.ended else ''}"
        )
        for line in lines or _nothing(wanted, place):
            print_line(f"  {line}")
    if ended:
        print_line(f"Of {ended:,} tables of ranks that have ended it is in none.")
    return 0 if found else 1


def _in_segment(wanted: int, place: Place) -> list[str]:
    """torch had it, as far as is known for a tensor that no capture has found."""
    return [
        f"byte {wanted - segment.address:,} of a segment of torch's allocator "
        f"({segment.nbytes:,} bytes): "
        + (
            "of CUDA graphs"
            if segment.of_graphs
            else "of no tensor that is known, so an activation, a buffer, or freed"
        )
        for segment in place.segments
        if segment.address <= wanted < segment.address + segment.nbytes
    ]


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


def _nothing(wanted: int, place: Place) -> list[str]:
    rows, owners = place.rows, place.owners
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
