# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify``: are the weights that engines hold the ones that they should hold?"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError
from sglang_weight_exporter.store.tables import Table, TableError, open_tables
from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.verification.checkpoint_layout import (
    FUSED,
    ServedTensor,
    expected_fingerprints,
)
from sglang_weight_exporter.verification.comparison import Comparison, compare, compare_replicas
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestError,
    Shard,
    read_manifest,
)
from sglang_weight_exporter.weight_table import table_fingerprints

#: Names that a text lists of each kind.
_NAMED = 20


class _ProblemError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare the weights that the engines of this host hold with a checkpoint, "
        "with a manifest, or the replicas with one another. Engines need "
        "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on. A look also finds what changed without an update. "
        "Exit status: 0 when all that can be compared is "
        "equal, 1 when something differs, 2 when nothing could be compared."
    )
    add_flags(parser, "runtime_dir")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="safetensors, sharded or not")
    what.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="FILE",
        help="what `manifest` or a trainer wrote; several times for the ranks of another engine",
    )
    parser.add_argument("--engine", help="the engine with this label")
    parser.add_argument("--role", default="target", help="default: target")
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="tensor-parallel size (default: the engine's)",
    )
    look = parser.add_argument_group("when the engine looks")
    look.add_argument(
        "--recorded",
        action="store_true",
        help="compare what the last load or update left, and ask the engine for nothing",
    )
    look.add_argument(
        "--url", type=_url, help="the engine's (default: as its own settings have it)"
    )
    look.add_argument(
        "--api-key",
        default="",
        help="the engine's, where it has one; its admin key, if it has that",
    )
    look.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for the end of an update (default: 10)",
    )
    look.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="look again every so many seconds until interrupted, and print what is new",
    )
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time between two looks")
    return seconds


def _url(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as http://127.0.0.1:30000")
    return text.rstrip("/")


def run(arguments: argparse.Namespace) -> int:
    return _caught(_run, arguments)


def _caught(do: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return do(arguments)
    except (
        _ProblemError,
        RuntimeDirError,
        TableError,
        CheckpointError,
        ManifestError,
    ) as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"{error.name} is needed to read tensors and not installed here.", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename or 'Output'} cannot be used: {error.strerror}.", file=sys.stderr)
    except Exception:  # Python's own status for it would say that something differs.
        traceback.print_exc()
    return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.watch is not None:
        return _watch(arguments)
    return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    asked_at = time.time()
    if not arguments.recorded:
        for url in _urls(arguments):
            _ask_to_look(url, arguments.api_key)
    tables = _tables(arguments)
    looked_at = []
    for table in tables:
        captured_at = 0.0 if table.role.table is None else table.role.table.captured_at
        if captured_at >= asked_at:
            looked_at.append(table)
        elif not arguments.recorded:
            print(
                f"{_title(table)}: not looked at again, so this compares what was left then.",
                file=sys.stderr,
            )
    results = _results(arguments, tables)
    for title, result in results:
        _print(title, result)
    statuses = {result.exit_status for _, result in results}
    statuses |= {1 for table in tables if _print_modified(table)}
    if arguments.checkpoint is None and not arguments.manifest:
        known = [table for table in looked_at if _modified(table) is not None]
        if not results:
            for table in known:
                print(f"{_title(table)}\n  {table.columns.rows:,} tensors looked at")
        if not (results or known or statuses):
            raise _ProblemError(
                "There are no two ranks here that should hold the same. Name a --checkpoint or a "
                "--manifest to compare with."
            )
        statuses |= {0 for table in known if not _modified(table)}
    return 1 if 1 in statuses else 0 if 0 in statuses else 2


def _results(
    arguments: argparse.Namespace, tables: Sequence[Table]
) -> list[tuple[str, Comparison]]:
    if arguments.checkpoint is not None:
        checkpoint = Checkpoint(arguments.checkpoint)
        return [
            (
                _title(table),
                _against_checkpoint(
                    table, checkpoint, arguments.tp_size or _tp_size(table, tables)
                ),
            )
            for table in tables
        ]
    if arguments.manifest:
        return _against_manifests(tables, [read_manifest(path) for path in arguments.manifest])
    return _replicas(tables)


def _watch(arguments: argparse.Namespace) -> int:
    """Again and again until it is interrupted. What a look says is printed where it is not what the
    one before said. The status is the worst of all looks."""
    statuses: set[int] = set()
    said: tuple[str, str] | None = None
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.is_set():
        began = time.monotonic()
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            statuses.add(_caught(_verify, arguments))
        now = (output.getvalue(), errors.getvalue())
        if now != said:
            print(time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            sys.stdout.write(now[0])
            sys.stdout.flush()
            sys.stderr.write(now[1])
            sys.stderr.flush()
        said = now
        ended.wait(max(0.0, arguments.watch - (time.monotonic() - began)))
    return 1 if 1 in statuses else 2 if 2 in statuses else 0


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
        return [arguments.url]
    settings = settings_from(arguments, os.environ)
    readers = open_tables(settings.runtime_dir, engine=arguments.engine, role=arguments.role)
    return list(dict.fromkeys(reader.engine.url for reader in readers if reader.engine.url))


def _ask_to_look(url: str, api_key: str) -> None:
    """A request that SGLang hands to every scheduler between two batches; in that call the
    fingerprints are taken anew. It is asked for no checksums of its own."""
    request = urllib.request.Request(  # noqa: S310 -- the engine's own address, or one given
        f"{url}/weights_checker",
        data=json.dumps({"action": "checksum", "skip_tensor_list": [""]}).encode(),
        headers={"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    )
    # A proxy neither reaches an engine on this host nor is to know its key.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60):
            return
    except urllib.error.HTTPError as error:
        if error.code == 400:  # The action is newer than this release; it was called all the same.
            return
        reason = f"it answers with status {error.code}"
    except http.client.HTTPException as error:
        reason = f"it speaks no HTTP: {error!r}"
    except OSError as error:
        reason = str(error)
    print(
        f"{url} could not be asked to look again ({reason}). --url and --api-key name another "
        "address and a key.",
        file=sys.stderr,
    )


# What is compared.


def _tp_size(table: Table, tables: Sequence[Table]) -> int:
    """As the engine's settings have it: some of its ranks may be on other hosts."""
    return table.engine.tp_size or 1 + max(
        other.ranks.tp for other in tables if other.engine.instance == table.engine.instance
    )


def _against_checkpoint(table: Table, checkpoint: Checkpoint, tp_size: int) -> Comparison:
    served = [
        ServedTensor(row.name, row.dtype, row.shape_in_memory, row.kind) for row in table.rows()
    ]
    expected, unverifiable, inexact = expected_fingerprints(
        served, checkpoint, tp_rank=table.ranks.tp, tp_size=tp_size
    )
    fingerprints = table_fingerprints(table.columns)
    return compare(fingerprints, expected, unverifiable=unverifiable, inexact=inexact)


def _against_manifests(
    tables: Sequence[Table], manifests: Sequence[Manifest]
) -> list[tuple[str, Comparison]]:
    """A manifest of a running rank with the ranks at its place, another one with all."""
    results = []
    for table in tables:
        shard = Shard.of(table.engine, table.ranks, table.role.name)
        chosen = [manifest for manifest in manifests if manifest.shard in {None, shard}]
        if not chosen:
            print(
                f"{_title(table)}: no manifest is of this part of the model ({_place(shard)}).",
                file=sys.stderr,
            )
        results += [(_title(table), _against_manifest(table, manifest)) for manifest in chosen]
    if not results:
        places = (_place(each.shard) for each in manifests if each.shard is not None)
        raise _ProblemError(
            "No rank here holds what a manifest is of, which is: " + "; ".join(places) + "."
        )
    return results


def _place(shard: Shard) -> str:
    sizes = (shard.tp_size, shard.pp_size, shard.ep_size)
    tp, pp, ep = ("?" if size is None else size for size in sizes)
    return (
        f"{shard.role} of {shard.model_name}, tp {shard.tp_rank} of {tp}, pp {shard.pp_rank} of "
        f"{pp}, ep {shard.moe_ep_rank} of {ep}"
    )


def _against_manifest(table: Table, manifest: Manifest) -> Comparison:
    """Compares what has the same dtype and shape: a rank's share has another fingerprint."""
    expected, unverifiable = {}, {}
    for row in table.rows():
        tensor = manifest.tensors.get(row.name)
        if tensor is None:
            unverifiable[row.name] = _not_there(row.name)
        elif (tensor.dtype, tensor.shape) != (row.dtype, row.shape_in_memory):
            unverifiable[row.name] = "it has another shape or dtype in the manifest: a rank's share"
        else:
            expected[row.name] = tensor.fingerprint
    fingerprints = table_fingerprints(table.columns)
    return compare(fingerprints, expected, unverifiable=unverifiable)


def _not_there(name: str) -> str:
    if any(f".{fused}." in name for fused in FUSED):
        return "the manifest has it in parts: `manifest --fused` and fused=True write it whole"
    return "the manifest has no tensor of this name"


def _replicas(tables: Sequence[Table]) -> list[tuple[str, Comparison]]:
    """Ranks that should hold the same: of one model, at the same place in it, quantized and packed
    in the same way."""
    places: dict[tuple[Shard, str, str], list[Table]] = {}
    for table in tables:
        shard = Shard.of(table.engine, table.ranks, table.role.name)
        same = shard, table.role.quantization, table.engine.sglang_version
        places.setdefault(same, []).append(table)
    results = []
    for first, *others in places.values():
        one = table_fingerprints(first.columns)
        for other in others:
            title = f"{_title(other)}\n  beside {_title(first)}"
            results.append((title, compare_replicas(one, table_fingerprints(other.columns))))
    return results


def _modified(table: Table) -> int | None:
    """Tensors that hold something else than the last load or update left in them."""
    return None if table.role.table is None else table.role.table.modified


def _print_modified(table: Table) -> bool:
    count = _modified(table)
    if not count or table.role.table is None:
        return False
    names = table.role.table.modified_names
    print(f"{_title(table)}\n  {count:,} changed without an update")
    for name in names[:_NAMED]:
        print(f"  changed without an update  {name}")
    if count > _NAMED:
        print(f"  changed without an update  and {count - _NAMED:,} more")
    return True


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
