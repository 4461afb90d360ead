# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as text: a line each in ``status``, columns in ``table --adapters``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone

from sglang_weight_exporter.cli.choice import rank_name
from sglang_weight_exporter.cli.table_text import print_columns
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.records.adapters import Adapter, Adapters
from sglang_weight_exporter.store.tables import Table

#: How many `status` names, those that were loaded last.
_NAMED = 5


def status_lines(adapters: Adapters) -> Iterator[str]:
    """What is loaded, and the last of them."""
    line = f"{adapters.count:,} adapters, {adapters.nbytes:,} bytes in the host's memory"
    if adapters.changed_at is not None:
        line += f"; the last change at {_time(adapters.changed_at)}"
    yield line
    last = adapters.named[-_NAMED:]
    if len(last) < adapters.count:
        yield f"the last {len(last)}, of which `table --adapters` has more:"
    for each in last:
        rank = "" if each.rank is None else f"rank {each.rank}, "
        slot = "in no slot" if each.slot is None else f"slot {each.slot}"
        yield f"{each.name}  {rank}{each.nbytes:,} bytes, {slot}, loaded at {_time(each.loaded_at)}"


def print_adapters(tables: Sequence[Table]) -> int:
    """Those of each table's rank; exit status 2 where LoRA is off in all."""
    found = [(table, table.role.adapters) for table in tables]
    for table, adapters in found:
        if adapters is None:
            print(
                f"Rank {rank_name(table.ranks)} of engine {table.engine.name} has no adapters to "
                "load. Start SGLang with --enable-lora.",
                file=sys.stderr,
            )
            continue
        print_line(
            f"engine {table.engine.name}  {rank_name(table.ranks)}  {table.role.name}  "
            f"process {table.pid}  {table.engine.model_name}"
        )
        print_columns(
            ("name", "rank", "bytes", "slot", "loaded", "fingerprint"),
            list(map(_cells, adapters.named)),
            right={1, 2, 3},
        )
        more = adapters.count - len(adapters.named)
        print_line(
            f"{adapters.count:,} adapters, {adapters.nbytes:,} bytes in the host's memory"
            + (f"; {more:,} that were loaded before these are not named" if more else "")
        )
    return 2 if all(adapters is None for _, adapters in found) else 0


def _cells(adapter: Adapter) -> tuple[str, ...]:
    slot = "-" if adapter.slot is None else str(adapter.slot)
    return (
        adapter.name,
        "-" if adapter.rank is None else str(adapter.rank),
        f"{adapter.nbytes:,}",
        f"{slot} pinned" if adapter.pinned else slot,
        _time(adapter.loaded_at),
        adapter.fingerprint or "-",
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat(timespec="seconds")
