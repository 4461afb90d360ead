# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify``: are the weights that engines hold the ones that they should hold?"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from sglang_weight_exporter.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.checkpoint_layout import ServedTensor, expected_fingerprints
from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.manifest import Manifest, ManifestError, read_manifest
from sglang_weight_exporter.store.tables import Table, TableError, open_tables
from sglang_weight_exporter.verification import Comparison, compare, compare_replicas
from sglang_weight_exporter.weight_table import Row, table_fingerprints

#: Names that a text lists of each kind.
_NAMED = 20


class _ProblemError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="compare the weights in memory with a checkpoint, a manifest, or other replicas",
        description="Compare the weights that the engines of this host hold with a checkpoint, "
        "with a manifest, or the replicas with one another. Engines need "
        "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on. Exit status: 0 when all that can be compared is "
        "equal, 1 when something differs, 2 when nothing could be compared.",
    )
    add_flags(parser, "runtime_dir")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="safetensors, sharded or not")
    what.add_argument("--manifest", type=Path, metavar="FILE", help="what `manifest` wrote")
    parser.add_argument("--engine", help="the engine with this label")
    parser.add_argument("--role", default="target", help="default: target")
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="tensor-parallel size (default: from the ranks of the engine on this host)",
    )
    look = parser.add_argument_group("when the engine looks")
    look.add_argument(
        "--recorded",
        action="store_true",
        help="compare what the last load or update left, and ask the engine for nothing",
    )
    look.add_argument("--url", help="the engine's (default: http://127.0.0.1:PORT)")
    look.add_argument("--api-key", default="", help="the engine's, where it has one")
    look.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for the end of an update (default: 10)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except (_ProblemError, TableError, CheckpointError, ManifestError) as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"{error.name} is needed to read tensors and not installed here.", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename or 'Output'} cannot be used: {error.strerror}.", file=sys.stderr)
    return 2


def _run(arguments: argparse.Namespace) -> int:
    asked_at = time.time()
    if not arguments.recorded:
        for url in _urls(arguments):
            _ask_to_look(url, arguments.api_key)
    tables = _tables(arguments)
    for table in tables:
        captured_at = 0.0 if table.role.table is None else table.role.table.captured_at
        if not arguments.recorded and captured_at < asked_at:
            print(
                f"{_title(table)}: not looked at again, so this compares what was left then.",
                file=sys.stderr,
            )
    if arguments.checkpoint is not None:
        checkpoint = Checkpoint(arguments.checkpoint)
        results = [
            (
                _title(table),
                _against_checkpoint(
                    table, checkpoint, arguments.tp_size or _tp_size(table, tables)
                ),
            )
            for table in tables
        ]
    elif arguments.manifest is not None:
        manifest = read_manifest(arguments.manifest)
        results = [(_title(table), _against_manifest(table, manifest)) for table in tables]
    else:
        results = _replicas(tables)
    for title, result in results:
        _print(title, result)
    statuses = {result.exit_status for _, result in results}
    return 1 if 1 in statuses else 0 if 0 in statuses else 2


def _tables(arguments: argparse.Namespace) -> list[Table]:
    settings = settings_from(arguments, os.environ)
    readers = open_tables(settings.runtime_dir, engine=arguments.engine, role=arguments.role)
    deadline = time.monotonic() + arguments.wait
    tables = [reader.read(max(0.0, deadline - time.monotonic())) for reader in readers]
    with_fingerprints = []
    for table in tables:
        if table.role.table is not None and table.role.table.fingerprint:
            with_fingerprints.append(table)
        else:
            print(f"{_title(table)}: no fingerprints.", file=sys.stderr)
    if not with_fingerprints:
        raise _ProblemError(
            "There are no fingerprints here to compare. Start SGLang with "
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; they are absent too while the memory of the "
            "weights is released, and where taking them failed, which SGLang's log says."
        )
    return with_fingerprints


def _title(table: Table) -> str:
    since = "its load" if table.update <= 1 else f"update {table.update}"
    return f"engine {table.engine.name}  {table.ranks}  {table.role.name}  since {since}"


# A fresh look.


def _urls(arguments: argparse.Namespace) -> list[str]:
    if arguments.url:
        return [arguments.url.rstrip("/")]
    settings = settings_from(arguments, os.environ)
    readers = open_tables(settings.runtime_dir, engine=arguments.engine, role=arguments.role)
    ports = dict.fromkeys(reader.engine.name.partition("-")[0] for reader in readers)
    return [f"http://127.0.0.1:{port}" for port in ports if port.isdigit()]


def _ask_to_look(url: str, api_key: str) -> None:
    """A request that SGLang hands to every scheduler between two batches; in that call the
    fingerprints are taken anew. It is asked for no checksums of its own."""
    request = urllib.request.Request(  # noqa: S310 -- the engine's own address, or one given
        f"{url}/weights_checker",
        data=json.dumps({"action": "checksum", "skip_tensor_list": [""]}).encode(),
        headers={"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    )
    try:
        with urllib.request.urlopen(request, timeout=60):  # noqa: S310
            return
    except urllib.error.HTTPError as error:
        if error.code == 400:  # The action is newer than this release; it was called all the same.
            return
        reason = f"it answers with status {error.code}"
    except OSError as error:
        reason = str(error)
    print(
        f"{url} could not be asked to look again ({reason}). --url and --api-key name another "
        "address and a key.",
        file=sys.stderr,
    )


# What is compared.


def _tp_size(table: Table, tables: Sequence[Table]) -> int:
    return 1 + max(
        other.ranks.tp for other in tables if other.engine.instance == table.engine.instance
    )


def _against_checkpoint(table: Table, checkpoint: Checkpoint, tp_size: int) -> Comparison:
    served = [
        ServedTensor(row.name, row.dtype, _in_memory_order(row), row.kind) for row in table.rows()
    ]
    expected, unverifiable, inexact = expected_fingerprints(
        served, checkpoint, tp_rank=table.ranks.tp, tp_size=tp_size
    )
    fingerprints = table_fingerprints(table.columns)
    return compare(fingerprints, expected, unverifiable=unverifiable, inexact=inexact)


def _against_manifest(table: Table, manifest: Manifest) -> Comparison:
    """Of the same dtype and shape: a rank's share of a tensor has another fingerprint."""
    expected, unverifiable = {}, {}
    for row in table.rows():
        tensor = manifest.tensors.get(row.name)
        if tensor is None:
            unverifiable[row.name] = "the manifest has no tensor of this name"
        elif (tensor.dtype, tensor.shape) != (row.dtype, _in_memory_order(row)):
            unverifiable[row.name] = "it has another shape or dtype in the manifest: a rank's share"
        else:
            expected[row.name] = tensor.fingerprint
    fingerprints = table_fingerprints(table.columns)
    return compare(fingerprints, expected, unverifiable=unverifiable)


def _in_memory_order(row: Row) -> tuple[int, ...]:
    """The shape whose elements follow one another in memory, as the fingerprint has them."""
    order = sorted(range(len(row.shape)), key=lambda dim: -row.stride[dim])
    return tuple(row.shape[dim] for dim in order)


def _replicas(tables: Sequence[Table]) -> list[tuple[str, Comparison]]:
    """Ranks that should hold the same: of one model, at the same place in it."""

    def place(table: Table) -> tuple[str, str, int, int, int]:
        ranks = table.ranks
        return (table.engine.model_name, table.role.name, ranks.pp, ranks.tp, ranks.moe_ep or 0)

    results = []
    for _, group in itertools.groupby(sorted(tables, key=place), key=place):
        first, *others = group
        one = table_fingerprints(first.columns)
        for other in others:
            title = f"{_title(other)}\n  beside {_title(first)}"
            results.append((title, compare_replicas(one, table_fingerprints(other.columns))))
    if not results:
        raise _ProblemError(
            "There are no two ranks here that should hold the same. Name a --checkpoint or a "
            "--manifest to compare with."
        )
    return results


def _print(title: str, result: Comparison) -> None:
    print(title)
    print(
        f"  {len(result.equal):,} equal, {len(result.differing):,} different, "
        f"{len(result.unverifiable):,} that cannot be compared"
    )
    for name in result.differing[:_NAMED]:
        print(f"  different  {name}")
    if len(result.differing) > _NAMED:
        print(f"  different  and {len(result.differing) - _NAMED:,} more")
    reasons: dict[str, list[str]] = {}
    for name, reason in result.unverifiable.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        print(f"  cannot be compared  {names[0]}{more}: {reason}")
