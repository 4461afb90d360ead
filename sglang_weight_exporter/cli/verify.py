# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify``: are the weights that engines hold the ones that they should hold?"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_weight_exporter.cli import through_checker
from sglang_weight_exporter.cli.capture_request import request_capture, url
from sglang_weight_exporter.cli.choice import CommandError, add_choice, chosen_tables, exit_status
from sglang_weight_exporter.cli.flags import add_flags
from sglang_weight_exporter.cli.table_comparisons import (
    Comparisons,
    against_checkpoint,
    against_manifests,
    read_manifests,
    replicas,
    title,
)
from sglang_weight_exporter.cli.terminal import (
    NAMED,
    first_of,
    print_line,
    print_names,
    print_reasons,
)
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError
from sglang_weight_exporter.store.tables import Table, TableError, TableReader
from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.verification.comparison import Comparison
from sglang_weight_exporter.verification.delta import read_delta
from sglang_weight_exporter.verification.manifest import ManifestError

#: How long the engine may take fingerprints between two batches where somebody watches it.
_PART_SECONDS = 0.002
_MOST_PARTS = 1_000
#: For which the other ranks of an engine are waited for, once one has captured.
OTHER_RANKS_SECONDS = 10.0
_POLL_SECONDS = 0.05
#: The share of the time between two captures that the parts of one are spread over.
_ROUND = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare the weights that the engines of this host hold with a checkpoint, with a "
        "manifest, or the replicas with one another. Engines need "
        "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on. Their fingerprints are taken anew, which also "
        "finds what changed without an update. Exit status: 0 when enough is equal and nothing "
        "differs, 1 when something differs, 2 when too little could be compared."
    )
    add_flags(parser, "runtime_dir")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="safetensors, sharded or not")
    what.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="FILE",
        help="what `manifest`, `reference` or a trainer wrote, or a directory of such files; "
        "several times for the ranks of another engine",
    )
    what.add_argument(
        "--through-checker",
        nargs="?",
        const=through_checker.ACTIONS[0],
        choices=through_checker.ACTIONS,
        metavar="ACTION",
        help="SGLang's /weights_checker, for quantized engines: `checksum` of what weights stand "
        "for, between replicas (default); `snapshot`, and later `compare` with it, in a tolerance",
    )
    parser.add_argument(
        "--delta",
        type=Path,
        metavar="DIR",
        help="with --checkpoint: a trainer's delta, whose checksums the checkpoint's tensors are "
        "to have",
    )
    add_choice(parser, role="target")
    parser.add_argument(
        "--require",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="the share of each rank's bytes that has to be equal (default: 0.5)",
    )
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="tensor-parallel size (default: the engine's)",
    )
    _add_when(parser)
    parser.set_defaults(run=run)


def _add_when(parser: argparse.ArgumentParser) -> None:
    when = parser.add_argument_group("when the engine takes fingerprints")
    when.add_argument(
        "--recorded",
        action="store_true",
        help="compare what the last load or update left, and ask the engine for nothing",
    )
    when.add_argument("--url", type=url, help="the engine's (default: as its own settings have it)")
    when.add_argument(
        "--api-key",
        default="",
        help="the engine's, where it has one; its admin key, if it has that",
    )
    when.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for the end of an update (default: 10)",
    )
    when.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="take them anew every so many seconds until interrupted, 2 ms at a time between "
        "batches, and print what is new",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time between two captures")
    return seconds


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share


def run(arguments: argparse.Namespace) -> int:
    return _caught(_run, arguments)


def _caught(do: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    errors = (RuntimeDirError, TableError, CheckpointError, ManifestError)
    try:
        return exit_status(functools.partial(do, arguments), *errors)
    except BrokenPipeError:
        raise
    except Exception:  # Python's own status for it would say that something differs.
        traceback.print_exc()
    return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.through_checker:
        return through_checker.run(arguments)
    if arguments.watch is not None:
        return _watch(arguments)
    return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    if not arguments.recorded:
        _wait_for_updates(arguments)
    asked_at = time.time()
    if not arguments.recorded:
        _request_capture(arguments)
    return _compare(arguments, asked_at)


def _wait_for_updates(arguments: argparse.Namespace) -> None:
    """Until none is open: in the middle of one the engine takes no fingerprints."""
    deadline = time.monotonic() + arguments.wait
    for reader in chosen_tables(arguments):
        while (since := _updating_since(reader)) is not None:
            if time.monotonic() > deadline:
                raise CommandError(
                    f"An update of engine {reader.engine.name}, {reader.ranks}, has been open for "
                    f"{max(0.0, time.time() - since):.0f} s and did not end in the "
                    f"{arguments.wait:g} s that this waited, so some tensors may be new and some "
                    "old. Ask again when it is over, or wait longer (--wait)."
                )
            time.sleep(_POLL_SECONDS)


def _updating_since(reader: TableReader) -> float | None:
    """When an update of any model of this rank began that has not ended."""
    with contextlib.suppress(OSError, UnreadableError):  # It has just ended; that is said later.
        for role in reader.directory.snapshot().roles:
            if role.in_progress is not None and not role.in_progress.is_over(time.time()):
                return role.in_progress.started_at
    return None


def _compare(arguments: argparse.Namespace, asked_at: float) -> int:
    tables = _with_fingerprints(_tables(arguments, asked_at))
    captured = [table for table in tables if _captured_at(table) >= asked_at]
    if not arguments.recorded:
        for table in tables:
            if table not in captured:
                print(
                    f"{title(table)}: not captured again, so this compares what was left then.",
                    file=sys.stderr,
                )
    of_delta = _beside_delta(arguments)
    found = _comparisons(arguments, tables)
    _print_names(found)
    for name, result in found.results:
        _print(name, result, arguments.require)
    statuses = {_status(result, arguments.require) for _, result in found.results}
    statuses |= {1 for _ in found.renamed} | of_delta
    statuses |= {1 for table in tables if _print_modified(table)}
    if arguments.checkpoint is None and not arguments.manifest:
        known = [table for table in captured if _modified(table) is not None]
        if not found.results:
            for table in known:
                print(f"{title(table)}\n  {table.columns.rows:,} tensors captured")
        if not (found.results or known or statuses):
            raise CommandError(
                "There are no two ranks here that should hold the same. Name a --checkpoint or a "
                "--manifest to compare with."
            )
        statuses |= {0 for table in known if not _modified(table)}
    if not arguments.recorded and len(captured) < len(tables):
        statuses.add(2)  # What was left then is not what is there now.
    return 1 if 1 in statuses else 2 if 2 in statuses else 0


def _beside_delta(arguments: argparse.Namespace) -> set[int]:
    """What the files are to be, before what memory is beside them."""
    if arguments.delta is None:
        return set()
    if arguments.checkpoint is None:
        raise CommandError("--delta is of a --checkpoint: name that too.")
    delta = read_delta(arguments.delta)
    if delta.obstacle:
        print_line(f"delta {delta.version}: cannot be compared: {delta.obstacle}")
        return {2}
    differing = delta.differing(Checkpoint(arguments.checkpoint))
    held, count = len(delta.checksums) - len(differing), len(delta.checksums)
    print_line(
        f"delta {delta.version}: {held:,} of {count:,} tensors of the checkpoint have its "
        f"checksums ({delta.kind})"
    )
    print_names("  other bytes than the delta made", differing)
    return {1} if differing else set() if count else {2}


def _captured_at(table: Table) -> float:
    return 0.0 if table.role.table is None else table.role.table.captured_at


def _status(result: Comparison, required: float) -> int:
    return 1 if result.differing else 0 if result.is_enough(required) else 2


def _comparisons(arguments: argparse.Namespace, tables: Sequence[Table]) -> Comparisons:
    if arguments.checkpoint is not None:
        return against_checkpoint(tables, arguments.checkpoint, arguments.tp_size)
    if arguments.manifest:
        return against_manifests(tables, read_manifests(arguments.manifest))
    return replicas(tables)


def _watch(arguments: argparse.Namespace) -> int:
    """Again and again until it is interrupted. What one says is printed where it is not what the
    one before said. The status is the worst of all."""
    statuses: set[int] = set()
    printed: tuple[str, str] | None = None
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.is_set():
        began = time.monotonic()
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            statuses.add(_caught(functools.partial(_verify_in_parts, ended), arguments))
        now = (output.getvalue(), errors.getvalue())
        if now != printed:
            print(time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            sys.stdout.write(now[0])
            sys.stdout.flush()
            sys.stderr.write(now[1])
            sys.stderr.flush()
        printed = now
        ended.wait(max(0.0, arguments.watch - (time.monotonic() - began)))
    return 1 if 1 in statuses else 2 if 2 in statuses else 0


def _verify_in_parts(ended: threading.Event, arguments: argparse.Namespace) -> int:
    """A whole round of fingerprints in the time between two, each part of them in milliseconds."""
    asked_at = time.time()
    parts = 1 if arguments.recorded else _parts(arguments)
    for part in range(0 if arguments.recorded else parts):
        if not _request_capture(arguments, part, parts):
            break
        until = asked_at + _ROUND * arguments.watch * (part + 1) / parts
        if parts > 1 and ended.wait(max(0.0, until - time.time())):
            return 0  # Nobody waits for what it would have found.
    return _compare(arguments, asked_at)


def _parts(arguments: argparse.Namespace) -> int:
    """So many that each takes as long as it may, by what the last fingerprints took."""
    seconds = [0.0]
    for reader in chosen_tables(arguments):
        with contextlib.suppress(TableError, OSError, UnreadableError):
            table = reader.read(0.0).role.table
            if table is not None:
                seconds.append(table.fingerprint_seconds or 0.0)
    return max(1, min(_MOST_PARTS, math.ceil(max(seconds) / _PART_SECONDS)))


def _tables(arguments: argparse.Namespace, asked_at: float) -> list[Table]:
    """SGLang answers when the first rank of an engine is through with it; the others do the same
    between the same two batches, a moment later."""
    deadline = time.monotonic() + (0.0 if arguments.recorded else OTHER_RANKS_SECONDS)
    while True:
        tables = _read(arguments)
        fresh = {each.engine.identity for each in tables if _captured_at(each) >= asked_at}
        late = [
            each
            for each in tables
            if _has_fingerprint(each)
            and _captured_at(each) < asked_at
            and each.engine.identity in fresh
        ]
        if not late or time.monotonic() > deadline:
            return tables
        time.sleep(_POLL_SECONDS)


def _read(arguments: argparse.Namespace) -> list[Table]:
    deadline = time.monotonic() + arguments.wait
    readers = chosen_tables(arguments)
    return [reader.read(max(0.0, deadline - time.monotonic())) for reader in readers]


def _has_fingerprint(table: Table) -> bool:
    return table.role.table is not None and bool(table.role.table.fingerprint)


def _with_fingerprints(tables: list[Table]) -> list[Table]:
    for table in tables:
        if not _has_fingerprint(table):
            print(f"{title(table)}: no fingerprints.", file=sys.stderr)
    found = list(filter(_has_fingerprint, tables))
    if not found:
        raise CommandError(
            "There are no fingerprints here to compare. Start SGLang with "
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; they are absent too while the memory of the "
            "weights is released, and where taking them failed, which SGLang's log says."
        )
    return found


def _request_capture(arguments: argparse.Namespace, part: int = 0, parts: int = 1) -> bool:
    """Each engine once, whatever its number of ranks. Whether all were asked."""
    if arguments.url:
        return request_capture(arguments.url, arguments.api_key, None, part, parts)
    pids: dict[str, list[int]] = {}
    for reader in chosen_tables(arguments):
        if reader.engine.url:
            with contextlib.suppress(OSError, UnreadableError):  # It has just ended.
                found = pids.setdefault(reader.engine.url, [])
                found.append(reader.directory.snapshot().pid)
    asked = [
        request_capture(address, arguments.api_key, ranks_of_engine, part, parts)
        for address, ranks_of_engine in pids.items()
    ]
    return all(asked)


def _modified(table: Table) -> int | None:
    """Tensors that hold something else than the last load or update left in them."""
    return None if table.role.table is None else table.role.table.modified


def _print_modified(table: Table) -> bool:
    count = _modified(table)
    if not count or table.role.table is None:
        return False
    names = table.role.table.modified_names
    print(f"{title(table)}\n  {count:,} changed without an update")
    print_names("  changed without an update", names, count)
    return True


def _print_names(found: Comparisons) -> None:
    """What has no counterpart: nothing else tells that a tensor came under a name of no use."""
    for name, meant in list(found.renamed.items())[:NAMED]:
        print_line(f"sent under a name that no rank holds  {name}: was {meant} meant?")
    for what, names in (("no rank here holds", found.unheld), ("nobody sent", found.unsent)):
        if names:
            print_line(f"{what}  {first_of(names)}")


def _print(name: str, result: Comparison, required: float) -> None:
    print(name)
    print(
        f"  {len(result.equal):,} equal, {len(result.differing):,} different, "
        f"{len(result.unverifiable):,} that cannot be compared"
    )
    share = result.equal_bytes / result.all_bytes if result.all_bytes else 0.0
    print(f"  {result.equal_bytes:,} of {result.all_bytes:,} bytes are equal ({share:.1%})")
    if not (result.differing or result.is_enough(required)):
        print(f"  too few: --require asks for {required:.1%}")
    print_names("  different", result.differing)
    print_reasons("  cannot be compared", result.unverifiable)
