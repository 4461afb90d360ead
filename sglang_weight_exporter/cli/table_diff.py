# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What changed in a pointer table: since the last update, or since a file was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from sglang_weight_exporter.cli import formats
from sglang_weight_exporter.cli.choice import CommandError, rank_name
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.records.weights import CHANGES
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Row, compare_rows

_CHANGES = ("moved", *CHANGES)


class _Tensor(msgspec.Struct):
    """A row as ``--format json`` has it; members that it has besides are passed over."""

    name: str
    data_ptr: str
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    kind: str
    storage_ptr: str
    storage_nbytes: int

    def row(self) -> Row:
        values = msgspec.structs.asdict(self)
        for pointer in ("data_ptr", "storage_ptr"):
            values[pointer] = int(values[pointer], 16)
        return Row(**values)


class SavedTable(msgspec.Struct):
    """A table of a file, and whose it is."""

    tensors: list[_Tensor]
    role: str = ""
    tp_rank: int | None = None
    pp_rank: int | None = None
    dp_rank: int | None = None


class _File(msgspec.Struct):
    tables: list[SavedTable]


def load(path: Path) -> list[tuple[SavedTable, list[Row]]]:
    """Tables of a file that ``--format json`` wrote."""
    try:
        tables = msgspec.json.decode(path.read_bytes(), type=_File).tables
        return [(table, [tensor.row() for tensor in table.tensors]) for table in tables]
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CommandError(
            f"{path} is not what `table --format json` writes ({error}), so it cannot be compared."
        ) from error


def only(tables: list[tuple[SavedTable, list[Row]]], name: str) -> list[Row]:
    if len(tables) != 1:
        raise CommandError(
            f"{name} has {len(tables)} tables, and two files are compared table with table. "
            f"Write it with --engine, --rank and --role."
        )
    return tables[0][1]


def matching(tables: list[tuple[SavedTable, list[Row]]], table: Table, name: str) -> list[Row]:
    """The rows of the same role and ranks, whatever the engine was called."""
    whose = formats.identity(table)
    keys = ("role", "tp_rank", "pp_rank", "dp_rank")
    found = [
        rows for saved, rows in tables if all(getattr(saved, key) == whose[key] for key in keys)
    ]
    if len(found) != 1:
        raise CommandError(
            f"{name} has {len(found)} tables of the {table.role.name} model of "
            f"{rank_name(table.ranks)}, so there is nothing to compare with."
        )
    return found[0]


def print_differences(before: Sequence[Row], after: Sequence[Row]) -> int:
    """As lines, a change each. Returns the exit status of diff(1): 1 if there are any."""
    changes = compare_rows(before, after, named=len(before) + len(after))
    old = {row.name: row for row in before}
    new = {row.name: row for row in after}
    for change in _CHANGES:
        for name in changes.names.get(change, ()):
            print_line(
                f"{change:<8}{name}  {_change(change, old.get(name), new.get(name))}".rstrip()
            )
    print_line(", ".join(f"{getattr(changes, change)} {change}" for change in _CHANGES))
    return 1 if changes else 0


def _change(change: str, old: Row | None, new: Row | None) -> str:
    if old is None or new is None:
        row = new or old
        return "" if row is None else f"{hex(row.data_ptr)}, {row.nbytes:,} bytes"
    if change == "moved":
        return f"{hex(old.data_ptr)} → {hex(new.data_ptr)}"
    if change == "resized":
        return f"{old.nbytes:,} → {new.nbytes:,} bytes"
    return f"{old.device} → {new.device}"


def print_last_changes(tables: Sequence[Table]) -> int:
    """What the last update of each table changed, as the engine itself has compared it."""
    differ = False
    for table in tables:
        update = table.role.last_update
        print_line(f"engine {table.engine.name}  {rank_name(table.ranks)}  {table.role.name}")
        if update is None or update.action == "load":
            print_line("  no update since the load")
            continue
        changes = update.changes
        differ = differ or bool(changes)
        for change in _CHANGES:
            names = changes.names.get(change, ())
            for name in names:
                print_line(f"  {change:<8}{name}")
            more = getattr(changes, change) - len(names)
            if more:
                print_line(f"  {change:<8}and {more:,} more")
        print_line("  " + ", ".join(f"{getattr(changes, change)} {change}" for change in _CHANGES))
    return 1 if differ else 0
