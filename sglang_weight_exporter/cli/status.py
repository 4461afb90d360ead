# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``status``: is every rank of this host hooked, loaded and served? Exit status 0 means yes."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from sglang_weight_exporter.cli import adapters, room
from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.cli.status_last import print_last
from sglang_weight_exporter.cli.terminal import first_of, print_line, print_names, print_reasons
from sglang_weight_exporter.export.manifests import beside_manifest, of_engine
from sglang_weight_exporter.export.references import beside_reference
from sglang_weight_exporter.records.contents import ContentChanges
from sglang_weight_exporter.records.costs import DISCARDED, FATES, UpdateCost
from sglang_weight_exporter.records.engine import HookState
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update, UpdateInProgress
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.ended import ended_ranks
from sglang_weight_exporter.store.locks import is_held
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader, read_endpoint
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.tables import Table, TableError, TableReader
from sglang_weight_exporter.verification.checkpoint import CheckpointError
from sglang_weight_exporter.verification.manifest import ManifestError
from sglang_weight_exporter.verification.sent_comparison import SentComparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "For each engine and rank of this user on this host: hooked or not and why, "
        "the last update, and where the endpoint is. Exit status 0 only when all is well."
    )
    add_flags(parser, "runtime_dir", "reference_dir", "manifest_dir")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every hook")
    parser.add_argument(
        "--last",
        action="store_true",
        help="what is known of the last engine here that ended by an exception, in the middle of "
        "an update, or ran out of GPU memory; exit status 1 where there is none",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, os.environ)
    runtime_dir = RuntimeDir.find(settings.runtime_dir, os.environ)
    if arguments.last:
        return print_last(runtime_dir)
    problems: list[str] = []
    endpoint = read_endpoint(runtime_dir)
    if endpoint is not None and endpoint.url is not None:
        print_line(
            f"endpoint  {endpoint.url}  (process {endpoint.pid}, version {endpoint.version})"
        )
    if endpoint is not None and (endpoint.url is not None or endpoint.problem):
        if endpoint.problem:
            problems.append(endpoint.problem)
    elif is_held(runtime_dir.exporter_lock):
        problems.append("The exporter process is starting.")
    else:
        problems.append(
            "No exporter process runs, so nothing is served. The first rank starts one, unless "
            "SGLANG_WEIGHT_EXPORTER_SERVE is off."
        )
    found = SnapshotReader(runtime_dir, on_unreadable=problems.append).read()
    snapshots = [snapshot for _, snapshot in found]
    if not snapshots:
        problems.append(
            f"No rank is alive in {runtime_dir.path}. Where an engine runs: it may have been "
            "started before the package was installed, by another user, with another "
            "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR, with SGLANG_WEIGHT_EXPORTER_DISABLED, or with an "
            "SGLANG_PLUGINS that does not name sglang_weight_exporter."
        )
        if ended := ended_ranks(runtime_dir):
            problems.append(f"{ended[0]}. `status --last` says more.")
    now = time.time()
    for snapshot in sorted(snapshots, key=lambda each: each.order):
        problems += _print_rank(snapshot, now, verbose=arguments.verbose)
    for number, line in enumerate(room.lines(snapshots)):
        if number == 0:
            print()
        print_line(line)
    problems += _print_comparisons(found, arguments, settings)
    for problem in problems:
        print_line(f"! {problem}")
    return 1 if problems else 0


def _print_rank(snapshot: Snapshot, now: float, *, verbose: bool) -> list[str]:
    engine = snapshot.engine
    name = f"engine {engine.name}, {snapshot.ranks}"
    problems = []
    print()
    print_line(
        f"{name}  (process {snapshot.pid}, SGLang {engine.sglang_version}, {engine.model_name})"
    )
    hooked = [hook for hook in snapshot.hooks if hook.status == "installed"]
    failed = [hook for hook in snapshot.hooks if hook.status == "failed"]
    others = [hook for hook in snapshot.hooks if hook.status in {"absent", "pending"}]
    print_line(
        f"  hooks     {len(hooked)} installed, {len(failed)} failed, {len(others)} not needed"
    )
    for hook in snapshot.hooks if verbose else failed:
        print_line(f"            {_hook_line(hook)}")
    problems += [f"{name}: hook {hook.target} failed: {hook.reason}." for hook in failed]
    for hook_name, count in snapshot.hook_errors.items():
        problems.append(
            f"{name}: {count} errors of ours in {hook_name}; the engine's log has the first."
        )
    if engine.node_rank is not None and (engine.nodes or 1) > 1:
        group = f"of engine group {engine.group}" if engine.group else "(the ranks have not met)"
        print_line(f"  host      {engine.node_rank} of 0 to {(engine.nodes or 1) - 1} {group}")
    if snapshot.weight_version:
        print_line(f"  version   {snapshot.weight_version}")
    if snapshot.last_cost is not None:
        print_line(f"  cost      {_cost_line(snapshot.last_cost)}")
    if snapshot.out_of_memory:
        print_line(
            f"  memory    {snapshot.out_of_memory:,} CUDA out-of-memory errors; `status --last` "
            "has the last"
        )
    for operation, since in snapshot.running.items():
        print_line(f"  runs      {operation} for {now - since:.1f} s")
    if not any(role.loaded_at is not None for role in snapshot.roles):
        problems.append(f"{name}: the weights are not loaded yet.")
    for role in (role.settled(now) for role in snapshot.roles):
        _print_role(role, now)
        if role.loaded_at is not None and role.weights is None:
            problems.append(f"{name}: the weights of the {role.name} model could not be read.")
        last = role.last_update
        if last is not None and not last.succeeded:
            problems.append(
                f"{name}: the last update of the {role.name} model failed: {last.message}"
            )
    return problems


def _print_comparisons(
    found: Sequence[tuple[RankDirectory, Snapshot]],
    arguments: argparse.Namespace,
    settings: Settings,
) -> Iterator[str]:
    """With what was loaded elsewhere, and with what was sent; problems are given back."""
    # An engine's own directory before that of this shell: there may be engines of several.
    references = [
        (directory, snapshot, Path(where))
        for directory, snapshot in found
        if (where := arguments.reference_dir or snapshot.reference_dir or settings.reference_dir)
    ]
    manifests = [
        (directory, snapshot, Path(where))
        for directory, snapshot in found
        if (where := arguments.manifest_dir or snapshot.manifest_dir or settings.manifest_dir)
    ]
    if references:
        print()
        for directory, snapshot, where in references:
            yield from _print_references(directory, snapshot, where)
    if manifests:
        print()
        yield from _print_manifests(manifests)


def _print_references(
    directory: RankDirectory, snapshot: Snapshot, references: Path
) -> Iterator[str]:
    """A line for each load that has a reference; problems are given back."""
    for role in snapshot.roles:
        name = f"engine {snapshot.engine.name}, {snapshot.ranks}, {role.name}"
        try:
            table = TableReader(directory, role.name, snapshot.engine, snapshot.ranks).read()
            found = beside_reference(table, references, os.environ)
        except TableError:
            continue  # It is being updated, or it ended.
        except (CheckpointError, ManifestError, OSError) as error:
            yield f"{name}: it cannot be compared with a reference: {error}"
            continue
        if found is None:
            continue
        reference, differing = found
        made_at = datetime.fromtimestamp(reference.made_at, tz=timezone.utc)
        print_line(
            f"reference {reference.key.digest[:12]}, {made_at.isoformat(timespec='seconds')}, "
            f"{reference.host}: {name}: "
            + (f"{len(differing):,} tensors hold other bytes" if differing else "the same")
        )
        print_names("        ", differing)
        if differing:
            yield (
                f"{name}: its load left other bytes in {first_of(differing)} than another load of "
                "the same checkpoint and configuration. Load it again; if it stays, compare the "
                "checkpoint's files with another host's."
            )


def _print_manifests(
    found: Iterable[tuple[RankDirectory, Snapshot, Path]],
) -> Iterator[str]:
    """A line for each target whose version has a manifest; problems are given back."""
    engines: dict[tuple[str, str], list[tuple[Table, SentComparison]]] = {}
    for directory, snapshot, manifests in found:
        name = f"engine {snapshot.engine.name}, {snapshot.ranks}"
        try:
            table = TableReader(directory, "target", snapshot.engine, snapshot.ranks).read()
            beside = beside_manifest(table, manifests)
        except TableError:
            continue  # It is being updated, or has no target.
        except (ManifestError, OSError) as error:
            yield f"{name}: it cannot be compared with a manifest: {error}"
            continue
        if beside is None:
            continue
        of_engine_so_far = engines.setdefault((table.engine.instance, table.weight_version), [])
        of_engine_so_far.append((table, beside))
        counts = beside.comparison
        print_line(
            f"manifest  version {table.weight_version}: {name}: {len(counts.equal):,} equal, "
            f"{len(counts.differing):,} different, {len(counts.unverifiable):,} that cannot be "
            "compared"
        )
        print_names("        ", counts.differing)
        print_reasons("          cannot be compared", counts.unverifiable)
        if counts.differing:
            yield (
                f"{name}: {first_of(counts.differing)} is not what the trainer sent as version "
                f"{table.weight_version}. Send it again; if it stays, see whether SGLang's log "
                "names it."
            )
    for (_, version), ranks in engines.items():
        together = of_engine(ranks)
        if together.unheld:
            print_line(f"manifest  version {version}: no rank holds {first_of(together.unheld)}")
        for name, meant in together.renamed.items():
            yield f"{name} was sent as version {version}, and no rank knows it: was {meant} meant?"


def _hook_line(hook: HookState) -> str:
    return f"{hook.status:<10}{hook.target}" + (f"  ({hook.reason})" if hook.reason else "")


def _print_role(role: Role, now: float) -> None:
    print_line(f"  {role.name:<9} on {role.device}")
    if role.weights is not None:
        nbytes = sum(part.nbytes for part in role.weights)
        tensors = sum(part.tensors for part in role.weights)
        shared = sum(part.shared for part in role.weights)
        print_line(
            f"    weights {nbytes:,} bytes in {tensors:,} tensors"
            + (f", and {shared:,} that count elsewhere" if shared else "")
            + (", released" if role.released else "")
        )
    if role.table is not None and role.table.scratch:
        names = ", ".join(role.table.scratch_names[:5])
        more = ", …" if role.table.scratch > 5 else ""
        print_line(
            f"    scratch {role.table.scratch:,} tensors, written while serving: {names}{more}"
        )
    for pool in role.kv_pools or ():
        tokens = "" if pool.tokens is None else f" for {pool.tokens:,} tokens"
        print_line(f"    kv pool {pool.nbytes:,} bytes{tokens} ({pool.pool})")
    if role.adapters is not None:
        for number, line in enumerate(adapters.status_lines(role.adapters)):
            print_line(f"    {'' if number else 'lora':<7} {line}")
    if role.in_progress is not None:
        print_line(f"    update  in progress for {_progress_line(role.in_progress, now)}")
    if role.last_update is not None:
        print_line(f"    last    {_update_line(role.last_update, now)}")
        if role.last_update.contents is not None:
            print_line(f"    changed {_contents_line(role.last_update.contents)}")
        if role.last_update.phases:
            print_line(f"    took    {_time_line(role.last_update)}")


def _progress_line(progress: UpdateInProgress, now: float) -> str:
    phase: str = progress.phase
    if progress.phase_since is not None:
        phase += f" for {now - progress.phase_since:.1f} s"
    return f"{now - progress.started_at:.1f} s ({phase})"


def _time_line(update: Update) -> str:
    """Where its time went, the most first."""
    parts = sorted(update.phases.items(), key=lambda part: -part[1])
    line = f"{sum(update.phases.values()):.3f} s: " + ", ".join(
        f"{phase} {seconds:.3f}" for phase, seconds in parts
    )
    return line if update.nbytes is None else f"{line}; {update.nbytes:,} bytes came"


def _contents_line(contents: ContentChanges) -> str:
    """What the last update changed, and what it left as it was."""
    tensors, nbytes = sum(contents.tensors.values()), sum(contents.nbytes.values())
    parts = [f"{layer} {count:,}" for layer, count in contents.tensors.items() if count]
    same = [layer for layer, count in contents.tensors.items() if not count]
    line = f"{tensors:,} tensors, {nbytes:,} bytes" + (f": {', '.join(parts)}" if parts else "")
    return line + (f"; nothing in {', '.join(same)}" if same else "")


def _cost_line(cost: UpdateCost) -> str:
    """Of the last update, to those who wait."""
    fates = ", ".join(f"{cost.requests[fate]:,} {fate}" for fate in FATES if fate in cost.requests)
    line = f"no token for {cost.paused_seconds:.3f} s; requests: {fates or 'none'}"
    if cost.straddling:
        line += f"; {cost.straddling:,} go on under the new version"
    thrown = [f"{cost.discarded[kind]:,} {kind}" for kind in DISCARDED if cost.discarded.get(kind)]
    return line + (f"; tokens thrown away: {', '.join(thrown)}" if thrown else "")


def _update_line(update: Update, now: float) -> str:
    when = datetime.fromtimestamp(update.ended_at, tz=timezone.utc).isoformat(timespec="seconds")
    what = "load" if update.source is None else f"update from {update.source}"
    phase = "" if update.failed_in is None else f" in phase {update.failed_in}"
    outcome = "succeeded" if update.succeeded else f"failed{phase} (weights {update.effect})"
    line = f"{what} {outcome} at {when}, {now - update.ended_at:.0f} s ago"
    if update.model_path:
        line += f", {update.model_path}"
    if update.weight_version:
        line += f", version {update.weight_version}"
    return line
