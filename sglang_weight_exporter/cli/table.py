# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``table``: the pointer tables of this host's engines, for eyes and for programs."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglang_weight_exporter.cli import formats
from sglang_weight_exporter.cli.flags import add_flags, ranks, settings_from
from sglang_weight_exporter.cli.trace_reader import TraceError, tables_from_trace
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.records.weights import CHANGES
from sglang_weight_exporter.store.tables import Table, TableError, TableReader, open_tables
from sglang_weight_exporter.store.weights_metadata import owners, write_files
from sglang_weight_exporter.weight_table import Row, compare_rows, table_fingerprints

_SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "bytes": lambda row: -row.nbytes,
    "address": lambda row: (row.device, row.data_ptr),
}
_GROUPS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: _layer(row.name),
    "kind": lambda row: row.kind,
    "dtype": lambda row: row.dtype,
    "device": lambda row: row.device,
}
_CHANGES = ("moved", *CHANGES)


class _ProblemError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "table",
        help="print the pointer table: name, address, bytes, dtype, shape of every tensor",
        description="Print the pointer tables of this host's engines. In the middle of an update "
        "this waits for its end. Exit status: 0; with --diff 1 when there are differences; 2 when "
        "there is no table to print.",
    )
    add_flags(parser, "runtime_dir")
    choose = parser.add_argument_group("which table")
    choose.add_argument("--engine", help="the engine with this label")
    choose.add_argument("--role", help="target, draft, draft_1, …")
    choose.add_argument(
        "--rank",
        type=ranks,
        default={},
        metavar="RANK",
        help="tensor-parallel rank N, or a list such as tp=1,dp=0",
    )
    choose.add_argument(
        "--from-trace",
        type=Path,
        metavar="FILE",
        help="not of this host: the newest table of each rank in the spans of a file, verified "
        "(OTLP as JSON, or what the API of Tempo, Jaeger or Phoenix gives)",
    )
    choose.add_argument("--trace-id", default="", help="with --from-trace: of this trace")
    choose.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for the end of an update (default: 10)",
    )
    show = parser.add_argument_group("what to print")
    show.add_argument("--format", choices=formats.FORMATS, default="text")
    show.add_argument("--regions", action="store_true", help="regions instead of tensors")
    show.add_argument(
        "--filter", action="append", metavar="PATTERN", help="only names that match, as in *.qkv_*"
    )
    show.add_argument("--sort", choices=_SORTS, help="default: the model's own order")
    show.add_argument(
        "--fingerprints",
        action="store_true",
        help="what each tensor holds, where the engine runs with "
        "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on",
    )
    show.add_argument("--by", choices=_GROUPS, help="totals instead of tensors")
    instead = parser.add_argument_group("instead of printing a table")
    instead.add_argument(
        "--diff",
        nargs="*",
        metavar="FILE",
        help="what changed: by the last update, since FILE was written by --format json, or "
        "between two such files",
    )
    instead.add_argument(
        "--layout",
        nargs=2,
        metavar=("weights-metadata", "DIR"),
        help="write weights_meta_*.json, total_weight_meta_*.json and "
        "weight_update_summary_*.json into DIR",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except (_ProblemError, TableError, TraceError, formats.MissingLibraryError) as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename or 'Output'} cannot be used: {error.strerror}.", file=sys.stderr)
    return 2


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.diff is not None and len(arguments.diff) == 2:
        before, after = (_only(_load(Path(name)), name) for name in arguments.diff)
        return _print_differences(before[1], after[1])
    tables = _read(arguments)
    if arguments.diff is not None:
        if not arguments.diff:
            return _print_last_changes(tables)
        table = _single(tables, "--diff")
        saved = _matching(_load(Path(arguments.diff[0])), table, arguments.diff[0])
        return _print_differences(saved, list(table.rows()))
    if arguments.layout is not None:
        _write_layout(tables, Path(arguments.layout[1]))
        return 0
    selected = [(table, _rows(table, arguments)) for table in tables]
    if arguments.fingerprints:
        return _print_fingerprints(selected)
    if arguments.format == "text":
        _print_tables(selected, arguments)
        return 0
    if arguments.format == "json":
        content = formats.as_json(selected)
    else:
        table = _single(tables, f"--format {arguments.format}")
        content = _encode(table, selected[0][1], arguments)
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    of_regions = arguments.regions or arguments.format in formats.OF_REGIONS
    if arguments.diff is not None and len(arguments.diff) > 2:
        raise _ProblemError("--diff compares two files at most.")
    if arguments.layout is not None and arguments.layout[0] != "weights-metadata":
        raise _ProblemError(
            f"There is no layout {arguments.layout[0]!r}; the only one is weights-metadata."
        )
    if of_regions and (arguments.filter or arguments.sort or arguments.by):
        raise _ProblemError(
            "Regions hold many tensors and have no names, so --filter, --sort and --by do not "
            "apply to them. Leave these out, or print tensors."
        )
    if arguments.regions and arguments.format in formats.OF_ROWS:
        raise _ProblemError(f"--format {arguments.format} is made of tensors. Leave --regions out.")
    if arguments.from_trace and of_regions:
        raise _ProblemError("Spans carry tensors and no regions. Print tensors.")
    if arguments.by and arguments.format != "text":
        raise _ProblemError("--by prints totals as text. Leave --format out.")
    if arguments.fingerprints and (arguments.format != "text" or arguments.regions or arguments.by):
        raise _ProblemError(
            "--fingerprints prints text, a tensor a line. Leave --format, --regions and --by out."
        )
    if arguments.format == "parquet" and sys.stdout.isatty():
        raise _ProblemError("Parquet is no text. Redirect the output to a file.")


# Which tables.


def _read(arguments: argparse.Namespace) -> list[Table]:
    if arguments.from_trace:
        return _read_trace(arguments)
    settings = settings_from(arguments, os.environ)
    readers = [
        reader
        for reader in open_tables(
            settings.runtime_dir, engine=arguments.engine, role=arguments.role
        )
        if all(getattr(reader.ranks, name) == rank for name, rank in arguments.rank.items())
    ]
    if not readers:
        there = open_tables(settings.runtime_dir)
        raise _ProblemError(
            f"No table was chosen. There are these:\n{_list(there)}"
            if there
            else "No rank is alive here, so there is no table. "
            "`sglang-weight-exporter status` says what may be the reason."
        )
    deadline = time.monotonic() + arguments.wait
    tables, problems = [], []
    for reader in readers:
        try:
            tables.append(reader.read(max(0.0, deadline - time.monotonic())))
        except TableError as error:
            problems.append(error)
    if not tables:
        raise problems[0]
    for problem in problems:  # One rank's trouble hides no other rank's table.
        print(problem, file=sys.stderr)
    return tables


def _read_trace(arguments: argparse.Namespace) -> list[Table]:
    found = tables_from_trace(arguments.from_trace, trace_id=arguments.trace_id)
    tables = [
        table
        for table in found
        if arguments.engine in {None, table.engine.name}
        and arguments.role in {None, table.role.name}
        and all(getattr(table.ranks, name) == rank for name, rank in arguments.rank.items())
    ]
    if not tables:
        raise _ProblemError(
            f"No table was chosen. {arguments.from_trace} has these:\n{_list(found)}"
        )
    return tables


def _list(tables: Iterable[Table | TableReader]) -> str:
    return "\n".join(
        f"  --engine {table.engine.name} --rank {_rank_name(table.ranks)} --role "
        + (table.role if isinstance(table, TableReader) else table.role.name)
        for table in tables
    )


def _single(tables: Sequence[Table], purpose: str) -> Table:
    if len(tables) > 1:
        raise _ProblemError(
            f"{purpose} takes one table: addresses of two processes do not mix. Choose one of:\n"
            + _list(tables)
        )
    return tables[0]


def _rank_name(ranks: Ranks) -> str:
    values = msgspec.structs.asdict(ranks)
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _rows(table: Table, arguments: argparse.Namespace) -> list[Row]:
    rows: Iterable[Row] = table.rows()
    if arguments.filter:
        rows = (
            row
            for row in rows
            if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in arguments.filter)
        )
    return list(rows) if arguments.sort is None else sorted(rows, key=_SORTS[arguments.sort])


# Printing.


def _encode(table: Table, rows: list[Row], arguments: argparse.Namespace) -> bytes:
    name: str = arguments.format
    if name in formats.OF_REGIONS:
        return formats.OF_REGIONS[name](table.regions())
    if name in formats.OF_ROWS:
        return formats.OF_ROWS[name](rows)
    return formats.OF_RECORDS[name](list(table.regions()) if arguments.regions else rows)


def _print_tables(
    selected: Sequence[tuple[Table, list[Row]]], arguments: argparse.Namespace
) -> None:
    for index, (table, rows) in enumerate(selected):
        if index:
            print()
        print(
            f"engine {table.engine.name}  {_rank_name(table.ranks)}  {table.role.name}  "
            f"process {table.pid}  SGLang {table.engine.sglang_version}  {table.engine.model_name}"
        )
        if table.released:
            print("The memory is released: nothing is behind these addresses for now.")
        if arguments.regions:
            _print_columns(
                ("address", "bytes", "device"),
                [
                    (hex(region.data_ptr), f"{region.nbytes:,}", region.device)
                    for region in table.regions()
                ],
                right={1},
            )
        elif arguments.by:
            _print_totals(rows, arguments.by)
        else:
            _print_columns(
                ("name", "kind", "dtype", "shape", "bytes", "address", "device"),
                [
                    (
                        row.name,
                        row.kind,
                        row.dtype,
                        "x".join(map(str, row.shape)) or "scalar",
                        f"{row.nbytes:,}",
                        hex(row.data_ptr),
                        row.device,
                    )
                    for row in rows
                ],
                right={4},
            )
        print(
            f"{len(rows):,} tensors, {_unique_bytes(rows):,} bytes of memory, "
            + ("" if arguments.from_trace else f"{sum(1 for _ in table.regions()):,} regions, ")
            + f"sha256 {table.columns.sha256[:16]}…"
        )


def _print_fingerprints(selected: Sequence[tuple[Table, list[Row]]]) -> int:
    without = [table for table, _ in selected if not table.columns.fingerprints]
    for table, rows in selected:
        texts = table_fingerprints(table.columns)
        if texts:
            print(
                f"engine {table.engine.name}  {_rank_name(table.ranks)}  {table.role.name}  "
                f"fingerprint {table.columns.fingerprint}"
            )
            for row in rows:
                print(texts.get(row.name, "-" * 32), row.name)
    for table in without:
        print(
            f"Rank {_rank_name(table.ranks)} of engine {table.engine.name} has no fingerprints. "
            "Start SGLang with SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; where it was, its log says "
            "why none were taken. A span whose table is in an earlier span has them of the rank "
            "alone.",
            file=sys.stderr,
        )
    return 2 if len(without) == len(selected) else 0


def _print_totals(rows: Iterable[Row], by: str) -> None:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_GROUPS[by](row), []).append(row)
    seen: set[tuple[str, int]] = set()
    _print_columns(
        (by, "tensors", "bytes"),
        [
            (name, f"{len(members):,}", f"{_unique_bytes(members, seen):,}")
            for name, members in groups.items()
        ],
        right={1, 2},
    )


def _layer(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.gate.weight``; without a number the module."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def _unique_bytes(rows: Iterable[Row], seen: set[tuple[str, int]] | None = None) -> int:
    """Bytes of the storages behind rows, those in ``seen`` not again."""
    seen = set() if seen is None else seen
    total = 0
    for row in rows:
        storage = (row.device, row.storage_ptr)
        if row.storage_ptr and storage not in seen:
            seen.add(storage)
            total += row.storage_nbytes
    return total


def _print_columns(header: Sequence[str], lines: Sequence[Sequence[str]], right: set[int]) -> None:
    widths = [
        max(len(title), *(len(line[index]) for line in lines)) if lines else len(title)
        for index, title in enumerate(header)
    ]
    for line in (header, *lines):
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


# Differences.


def _load(path: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """Tables of a file that ``--format json`` wrote, each with whose it is."""
    try:
        tables = msgspec.json.decode(path.read_bytes())["tables"]
        return [(table, [_row(tensor) for tensor in table["tensors"]]) for table in tables]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise _ProblemError(
            f"{path} is not what `table --format json` writes ({error}), so it cannot be compared."
        ) from error


def _row(tensor: dict[str, Any]) -> Row:
    values = {name: tensor[name] for name in Row._fields}
    for pointer in ("data_ptr", "storage_ptr"):
        values[pointer] = int(values[pointer], 16)
    return Row(**values)


def _only(
    tables: list[tuple[dict[str, Any], list[Row]]], name: str
) -> tuple[dict[str, Any], list[Row]]:
    if len(tables) != 1:
        raise _ProblemError(
            f"{name} has {len(tables)} tables, and two files are compared table with table. "
            f"Write it with --engine, --rank and --role."
        )
    return tables[0]


def _matching(tables: list[tuple[dict[str, Any], list[Row]]], table: Table, name: str) -> list[Row]:
    """The rows of the same role and ranks, whatever the engine was called."""
    whose = formats.identity(table)
    keys = ("role", "tp_rank", "pp_rank", "dp_rank")
    found = [rows for saved, rows in tables if all(saved.get(key) == whose[key] for key in keys)]
    if len(found) != 1:
        raise _ProblemError(
            f"{name} has {len(found)} tables of the {table.role.name} model of "
            f"{_rank_name(table.ranks)}, so there is nothing to compare with."
        )
    return found[0]


def _print_differences(before: Sequence[Row], after: Sequence[Row]) -> int:
    """As lines, a change each. Returns the exit status of diff(1): 1 if there are any."""
    changes = compare_rows(before, after, named=len(before) + len(after))
    old = {row.name: row for row in before}
    new = {row.name: row for row in after}
    for change in _CHANGES:
        for name in changes.names.get(change, ()):
            print(f"{change:<8}{name}  {_change(change, old.get(name), new.get(name))}".rstrip())
    print(", ".join(f"{getattr(changes, change)} {change}" for change in _CHANGES))
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


def _print_last_changes(tables: Sequence[Table]) -> int:
    """What the last update of each table changed, as the engine itself has compared it."""
    differ = False
    for table in tables:
        update = table.role.last_update
        print(f"engine {table.engine.name}  {_rank_name(table.ranks)}  {table.role.name}")
        if update is None or update.action == "load":
            print("  no update since the load")
            continue
        changes = update.changes
        differ = differ or bool(changes)
        for change in _CHANGES:
            names = changes.names.get(change, ())
            for name in names:
                print(f"  {change:<8}{name}")
            more = getattr(changes, change) - len(names)
            if more:
                print(f"  {change:<8}and {more:,} more")
        print("  " + ", ".join(f"{getattr(changes, change)} {change}" for change in _CHANGES))
    return 1 if differ else 0


# Files.


def _write_layout(tables: Sequence[Table], directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    taken: dict[str, str] = {}
    for table in sorted(tables, key=lambda table: table.started_at):
        owner = next(
            name for name in owners(table) if taken.get(name, table.rank_id) == table.rank_id
        )
        taken[owner] = table.rank_id
        for path in write_files(directory, table, owner):
            print(path)
