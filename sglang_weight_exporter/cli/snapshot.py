# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``snapshot``: torch's memory with its blocks named, for PyTorch's viewer and Perfetto."""

from __future__ import annotations

import argparse
import bisect
import json
import os
import pickle
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sglang_weight_exporter.cli.choice import add_rank, exit_status, is_chosen
from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.cli.terminal import first_of
from sglang_weight_exporter.cli.torch_snapshot import (
    SnapshotError,
    bounded_memory,
    decoded_segments,
    read_snapshot,
)
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import table_rows

#: The newest that PyTorch's viewer reads. Python 3.14 writes a newer one unless it is told.
VIEWERS_PROTOCOL = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Without a file: take what ranks have left of their memory since --ask. With "
        "one: name the blocks of a snapshot that torch.cuda.memory._dump_snapshot has written in "
        "a rank that is alive here, by its pointer table."
    )
    add_flags(parser, "runtime_dir")
    parser.add_argument("file", nargs="?", type=Path, help="a snapshot that torch has written")
    parser.add_argument(
        "--ask",
        action="store_true",
        help="have ranks leave their memory with the next thing that happens to them: an update, "
        "a release, a flush of the cache",
    )
    parser.add_argument("--engine", help="the engine with this label")
    add_rank(parser)
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIRECTORY", help="where files are written"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, os.environ)
    reader = SnapshotReader(RuntimeDir.find(settings.runtime_dir, os.environ))
    found = [
        (directory, snapshot)
        for directory, snapshot in reader.read()
        if is_chosen(arguments, snapshot.engine, snapshot.ranks)
    ]
    if not found:
        print("No such rank is alive here. See `sglang-weight-exporter status`.", file=sys.stderr)
        return 1
    if arguments.ask:
        do = partial(_ask, found)
    elif arguments.file is not None:
        do = partial(_name, arguments.file, found, arguments.output)
    else:
        do = partial(_take, found, arguments.output)
    return exit_status(do, UnreadableError, SnapshotError)


def _ask(found: list[tuple[RankDirectory, Snapshot]]) -> int:
    for directory, _ in found:
        directory.ask_for_memory()
    print(
        f"{len(found)} ranks leave their memory with the next thing that happens to them: an "
        "update, a release, or a flush of the cache (POST /flush_cache). Then run this command "
        "again without --ask."
    )
    return 0


def _take(found: list[tuple[RankDirectory, Snapshot]], output: Path) -> int:
    missing = 0
    for directory, snapshot in found:
        try:
            dump = directory.memory()
        except FileNotFoundError:
            missing += 1
            why = "nothing has happened to it since it was asked"
            if not directory.memory_is_wanted:
                why = "it was not asked (--ask), or has no GPU"
            print(f"{_stem(snapshot)} has left nothing: {why}.", file=sys.stderr)
            continue
        segments = decoded_segments(dump.segments)
        pools = set(dump.graph_pools)
        _write({"segments": segments}, dump.owners, pools, output / _stem(snapshot))
    return 1 if missing else 0


def _name(file: Path, found: list[tuple[RankDirectory, Snapshot]], output: Path) -> int:
    if len(found) > 1:
        raise SnapshotError(
            f"{len(found)} ranks are alive here, and addresses are a process's own: name the one "
            "that has written the snapshot with --engine and --rank."
        )
    ((directory, snapshot),) = found
    owners = _owners(directory, snapshot)
    with bounded_memory(file):
        content = read_snapshot(file)
        _write(content, owners, set(), output / f"{file.stem}-named")
    return 0


def _owners(directory: RankDirectory, snapshot: Snapshot) -> list[MemoryOwner]:
    owners = []
    for role in snapshot.roles:
        if role.table is not None:
            seen: set[int] = set()
            for row in table_rows(directory.table(role.table.file)):
                if row.storage_ptr not in seen:
                    seen.add(row.storage_ptr)
                    owners.append(
                        MemoryOwner(
                            address=row.storage_ptr,
                            nbytes=row.storage_nbytes,
                            part="derived_weights" if row.kind == "derived" else "weights",
                            name=f"{row.name} ({role.name})",
                        )
                    )
    return owners


def name_blocks(
    segments: Iterable[dict[str, Any]],
    owners: Iterable[MemoryOwner],
    graph_pools: set[tuple[int, int]],
) -> None:
    """Write into each block that is somebody's what it is: as the innermost frame of its history,
    which PyTorch's viewer shows. The tensor's name stands for the file: the viewer hides a frame
    whose function has ``_start`` in its name, and tensors have that too."""
    ordered = sorted(owners, key=lambda owner: owner.address)
    starts = [owner.address for owner in ordered]
    for segment in segments:
        pool = tuple(segment.get("segment_pool_id", (0, 0)))
        of_graph = pool in graph_pools or pool[0] != 0
        for block in segment["blocks"]:
            if block["state"] == "inactive" and not of_graph:
                continue
            first = bisect.bisect_left(starts, block["address"])
            # One that began before it reaches into it where SGLang has cut up a large buffer.
            last = bisect.bisect_left(starts, block["address"] + block["size"])
            if first and ordered[first - 1].address + ordered[first - 1].nbytes > block["address"]:
                first -= 1
            mine = ordered[first:last]
            if mine:
                part, name = mine[0].part, first_of([each.name for each in mine])
            else:
                part = "cuda_graphs" if of_graph else "other_tensors"
                name = ""
            block["part"], block["name"] = part, name
            frame = {"name": part, "filename": name or part, "line": 0}
            block["frames"] = [frame, *block.get("frames", ())]


def name_allocations(content: dict[str, Any]) -> None:
    """Give the allocations of a history the names of the blocks that they have made. Of those the
    viewer's timeline shows the allocation's frames, and not the block's."""
    for device, events in enumerate(content["device_traces"]):
        frames = {
            block["address"]: block["frames"][0]
            for segment in content["segments"]
            if segment.get("device", 0) == device
            for block in segment["blocks"]
            if block["state"] != "inactive"
        }
        for event in reversed(events):
            if event["action"] in {"alloc", "free_completed"}:
                # What was there before the last one was something else.
                frame = frames.pop(event.get("addr"), None)
                if frame is not None and event["action"] == "alloc":
                    event["frames"] = [frame, *event.get("frames", ())]


def trace_events(segments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chrome's trace format, which Perfetto reads: a thread a segment, and a byte for a
    microsecond."""
    events: list[dict[str, Any]] = []
    for number, segment in enumerate(sorted(segments, key=lambda each: each["address"])):
        where = {"pid": segment.get("device", 0), "tid": number}
        pool = "private " if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) else ""
        label = f"{pool}segment {segment['address']:#x}, {segment['total_size']:,} bytes"
        events.append({"ph": "M", "name": "thread_name", "args": {"name": label}, **where})
        events += [
            {
                "ph": "X",
                "name": block.get("name") or block.get("part") or "free",
                "cat": block.get("part", "free"),
                "ts": block["address"] - segment["address"],
                "dur": block["size"],
                "args": {
                    "address": hex(block["address"]),
                    "bytes": block["size"],
                    "requested": block.get("requested_size", block["size"]),
                    "state": block["state"],
                },
                **where,
            }
            for block in segment["blocks"]
        ]
    return events


def _write(
    content: dict[str, Any],
    owners: Iterable[MemoryOwner],
    graph_pools: set[tuple[int, int]],
    stem: Path,
) -> None:
    segments = content["segments"]
    name_blocks(segments, owners, graph_pools)
    devices = 1 + max((segment.get("device", 0) for segment in segments), default=0)
    content.setdefault("device_traces", [[] for _ in range(devices)])
    name_allocations(content)
    viewer, perfetto = Path(f"{stem}.pickle"), Path(f"{stem}.perfetto.json")
    files = (
        (viewer, pickle.dumps(content, protocol=VIEWERS_PROTOCOL)),
        (perfetto, json.dumps({"traceEvents": trace_events(segments)}).encode()),
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path, written in files:
        # Addresses are for their owner alone.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # One that was there has kept its mode.
            file.write(written)
    print(f"{viewer}  for PyTorch's memory viewer, pytorch.org/memory_viz")
    print(f"{perfetto}  for ui.perfetto.dev, a thread a segment, a byte for a microsecond")


def _stem(snapshot: Snapshot) -> str:
    names = (f"{name}{value}" for name, value in snapshot.ranks.labels.items() if value is not None)
    return "-".join((f"engine-{snapshot.engine.name}", *names)).replace("/", "_")
