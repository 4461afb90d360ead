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
from functools import partial
from pathlib import Path
from typing import Any

from sglang_weight_exporter.cli import adapters, formats, table_at, table_diff, table_text
from sglang_weight_exporter.cli.choice import (
    CommandError,
    add_choice,
    choices,
    chosen_tables,
    exit_status,
    is_chosen,
)
from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.cli.trace_reader import TraceError, tables_from_trace
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.ended import ended_ranks, read_black_box
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.store.runtime_dir import NoRuntimeDirError, RuntimeDir
from sglang_weight_exporter.store.tables import Table, TableError
from sglang_weight_exporter.store.weights_metadata import owners, write_files
from sglang_weight_exporter.weight_table import Row

_SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "bytes": lambda row: -row.nbytes,
    "address": lambda row: (row.device, row.data_ptr),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the pointer tables of this host's engines. In the middle of an update "
        "this waits for its end. Exit status: 0; with --diff 1 when there are differences; 2 when "
        "there is no table to print."
    )
    add_flags(parser, "runtime_dir")
    choose = parser.add_argument_group("which table")
    add_choice(choose)
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
    _add_output(parser)
    parser.set_defaults(run=run)


def _add_output(parser: argparse.ArgumentParser) -> None:
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
    show.add_argument("--by", choices=table_text.GROUPS, help="totals instead of tensors")
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
    instead.add_argument(
        "--adapters",
        action="store_true",
        help="the LoRA adapters that are loaded; a slot is the one of when the rank wrote last",
    )
    instead.add_argument(
        "--at",
        type=table_at.address,
        metavar="ADDRESS",
        help="whose memory it is, or was where a rank has ended: the tensor, or what else the rank "
        "has left, with `snapshot --ask` or at its end; exit status 1 where it is nobody's",
    )


def run(arguments: argparse.Namespace) -> int:
    errors = (TableError, TraceError, formats.MissingLibraryError)
    return exit_status(partial(_run, arguments), *errors)


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.diff is not None and len(arguments.diff) == 2:
        before, after = (
            table_diff.only(table_diff.load(Path(name)), name) for name in arguments.diff
        )
        return table_diff.print_differences(before, after)
    if arguments.at is not None:
        return table_at.print_owners(arguments.at, _places(arguments))
    tables = _read(arguments)
    if arguments.adapters:
        return adapters.print_adapters(tables)
    if arguments.diff is not None:
        if not arguments.diff:
            return table_diff.print_last_changes(tables)
        table = _single(tables, "--diff")
        saved = table_diff.matching(
            table_diff.load(Path(arguments.diff[0])), table, arguments.diff[0]
        )
        return table_diff.print_differences(saved, list(table.rows()))
    if arguments.layout is not None:
        _write_layout(tables, Path(arguments.layout[1]))
        return 0
    selected = [(table, _rows(table, arguments)) for table in tables]
    if arguments.fingerprints:
        return table_text.print_fingerprints(selected)
    if arguments.format == "text":
        table_text.print_tables(selected, arguments)
        return 0
    if arguments.format == "json":
        content = formats.as_json(selected)
    else:
        table = _single(tables, f"--format {arguments.format}")
        content = _encode(table, selected[0][1], arguments)
    if sys.stdout.isatty():
        sys.stdout.write(content.decode())
    else:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    of_regions = arguments.regions or arguments.format in formats.OF_REGIONS
    if arguments.diff is not None and len(arguments.diff) > 2:
        raise CommandError("--diff compares two files at most.")
    if arguments.layout is not None and arguments.layout[0] != "weights-metadata":
        raise CommandError(
            f"There is no layout {arguments.layout[0]!r}; the only one is weights-metadata."
        )
    if of_regions and (arguments.filter or arguments.sort or arguments.by):
        raise CommandError(
            "Regions hold many tensors and have no names, so --filter, --sort and --by do not "
            "apply to them. Leave these out, or print tensors."
        )
    if arguments.regions and arguments.format in formats.OF_ROWS:
        raise CommandError(f"--format {arguments.format} is made of tensors. Leave --regions out.")
    if arguments.from_trace and arguments.adapters:
        raise CommandError("Spans carry no adapters. Ask on the engine's host.")
    if arguments.from_trace and of_regions:
        raise CommandError("Spans carry tensors and no regions. Print tensors.")
    if arguments.by and arguments.format != "text":
        raise CommandError("--by prints totals as text. Leave --format out.")
    if arguments.fingerprints and (arguments.format != "text" or arguments.regions or arguments.by):
        raise CommandError(
            "--fingerprints prints text, a tensor a line. Leave --format, --regions and --by out."
        )
    if arguments.format == "parquet" and sys.stdout.isatty():
        raise CommandError("Parquet is no text. Redirect the output to a file.")


# Which tables.


def _read(arguments: argparse.Namespace) -> list[Table]:
    if arguments.from_trace:
        return _read_trace(arguments)
    deadline = time.monotonic() + arguments.wait
    tables, problems = [], []
    for reader in chosen_tables(arguments):
        try:
            tables.append(reader.read(max(0.0, deadline - time.monotonic())))
        except TableError as error:
            problems.append(error)
    if not tables:
        raise problems[0]
    for problem in problems:  # One rank's trouble hides no other rank's table.
        print(problem, file=sys.stderr)
    return tables


def _places(arguments: argparse.Namespace) -> list[table_at.Place]:
    """Of ranks that live, and of those that have left something when they ended. Raises
    :class:`CommandError` and :class:`TableError` where there are none."""
    if arguments.from_trace:
        return [table_at.Place.of_table(table, None, None) for table in _read(arguments)]
    try:
        path = settings_from(arguments, os.environ).runtime_dir
        runtime_dir = RuntimeDir.find(path, os.environ)
    except NoRuntimeDirError as error:
        raise CommandError(str(error)) from error
    ended = [
        place
        for each in ended_ranks(runtime_dir)
        for place in table_at.ended_places(each)
        if is_chosen(arguments, place.engine, place.ranks, place.role or None)
    ]
    try:
        tables = _read(arguments)
    except (CommandError, TableError):
        if not ended:
            raise
        return ended
    living = []
    for table in tables:
        directory = RankDirectory(runtime_dir.ranks / table.rank_id)
        box = read_black_box(directory)
        living.append(table_at.Place.of_table(table, _owners(directory), box))
    return living + ended


def _owners(directory: RankDirectory) -> Sequence[MemoryOwner] | None:
    """What else is in the rank's memory, as it has left it."""
    try:
        return directory.memory().owners
    except (OSError, UnreadableError):
        return None


def _read_trace(arguments: argparse.Namespace) -> list[Table]:
    found = tables_from_trace(arguments.from_trace, trace_id=arguments.trace_id)
    tables = [
        table for table in found if is_chosen(arguments, table.engine, table.ranks, table.role.name)
    ]
    if not tables:
        raise CommandError(
            f"No table was chosen. {arguments.from_trace} has these:\n{choices(found)}"
        )
    return tables


def _single(tables: Sequence[Table], purpose: str) -> Table:
    if len(tables) > 1:
        raise CommandError(
            f"{purpose} takes one table: addresses of two processes do not mix. Choose one of:\n"
            + choices(tables)
        )
    return tables[0]


def _rows(table: Table, arguments: argparse.Namespace) -> list[Row]:
    rows: Iterable[Row] = table.rows()
    if arguments.filter:
        rows = (
            row
            for row in rows
            if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in arguments.filter)
        )
    return list(rows) if arguments.sort is None else sorted(rows, key=_SORTS[arguments.sort])


def _encode(table: Table, rows: list[Row], arguments: argparse.Namespace) -> bytes:
    name: str = arguments.format
    if name in formats.OF_REGIONS:
        return formats.OF_REGIONS[name](table.regions())
    if name in formats.OF_ROWS:
        return formats.OF_ROWS[name](rows)
    return formats.OF_RECORDS[name](list(table.regions()) if arguments.regions else rows)


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
