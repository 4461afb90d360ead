# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Pointer tables as text: tensors, regions, totals and fingerprints in columns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from sglang_weight_exporter.cli.choice import rank_name
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Row, table_fingerprints

GROUPS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: _layer(row.name),
    "kind": lambda row: row.kind,
    "dtype": lambda row: row.dtype,
    "device": lambda row: row.device,
}


def print_tables(
    selected: Sequence[tuple[Table, list[Row]]], arguments: argparse.Namespace
) -> None:
    for index, (table, rows) in enumerate(selected):
        if index:
            print()
        print_line(
            f"engine {table.engine.name}  {rank_name(table.ranks)}  {table.role.name}  "
            f"process {table.pid}  SGLang {table.engine.sglang_version}  {table.engine.model_name}"
        )
        if table.released:
            print_line("The memory is released: nothing is behind these addresses for now.")
        if arguments.regions:
            print_columns(
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
            print_columns(
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
        print_line(
            f"{len(rows):,} tensors, {_unique_bytes(rows):,} bytes of memory, "
            + ("" if arguments.from_trace else f"{sum(1 for _ in table.regions()):,} regions, ")
            + f"sha256 {table.columns.sha256[:16]}…"
        )


def print_fingerprints(selected: Sequence[tuple[Table, list[Row]]]) -> int:
    without = [table for table, _ in selected if not table.columns.fingerprints]
    for table, rows in selected:
        texts = table_fingerprints(table.columns)
        if texts:
            print_line(
                f"engine {table.engine.name}  {rank_name(table.ranks)}  {table.role.name}  "
                f"fingerprint {table.columns.fingerprint}"
            )
            for row in rows:
                print_line(f"{texts.get(row.name, '-' * 32)} {row.name}")
    for table in without:
        print(
            f"Rank {rank_name(table.ranks)} of engine {table.engine.name} has no fingerprints. "
            "Start SGLang with SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; where it was, its log says "
            "why none were taken. A span whose table is in an earlier span has them of the rank "
            "alone.",
            file=sys.stderr,
        )
    return 2 if len(without) == len(selected) else 0


def _print_totals(rows: Iterable[Row], by: str) -> None:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(GROUPS[by](row), []).append(row)
    seen: set[tuple[str, int]] = set()
    print_columns(
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


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]], right: set[int]) -> None:
    widths = [
        max(len(title), *(len(line[index]) for line in lines)) if lines else len(title)
        for index, title in enumerate(header)
    ]
    for line in (header, *lines):
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print_line("  ".join(cells).rstrip())
