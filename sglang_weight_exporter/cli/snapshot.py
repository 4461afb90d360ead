# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``snapshot``: torch's memory with its blocks named, for PyTorch's viewer and Perfetto."""

from __future__ import annotations

import argparse
import bisect
import io
import json
import os
import pickle
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglang_weight_exporter.cli.choice import add_rank, is_chosen
from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import table_rows

#: A pickle of a history of a million allocations, and no more than a machine has.
LARGEST_PICKLE = 2**32

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
    try:
        if arguments.ask:
            return _ask(found)
        if arguments.file is not None:
            return _name(arguments.file, found, arguments.output)
        return _take(found, arguments.output)
    except (OSError, UnreadableError, SnapshotError) as error:
        print(error, file=sys.stderr)
        return 1


class SnapshotError(Exception):
    """What is wrong with a snapshot, as a sentence."""


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
        segments = _checked(msgspec.json.decode(dump.segments))
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
    content = read_snapshot(file)
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
    _write(content, owners, set(), output / f"{file.stem}-named")
    return 0


class _Builtins(pickle.Unpickler):
    """A snapshot is dictionaries, lists, numbers and text. What a pickle could run besides is
    refused: the file may have come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        raise SnapshotError(
            f"It asks for {module}.{name}, which no snapshot of torch needs, so nothing of it was "
            "read."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise SnapshotError("It refers to objects outside of itself, so nothing of it was read.")


def read_snapshot(file: Path) -> dict[str, Any]:
    """What torch has pickled: ``segments``, and whatever else was there. Raises ``OSError`` and
    :class:`SnapshotError`."""
    size = file.stat().st_size
    if size > LARGEST_PICKLE:
        raise SnapshotError(f"{file} has {size:,} bytes, which is no snapshot of torch.")
    try:
        content = _Builtins(io.BytesIO(file.read_bytes())).load()
    except SnapshotError as error:
        raise SnapshotError(f"{file} is refused. {error}") from error
    except Exception as error:
        raise SnapshotError(f"{file} is no pickle that could be read ({error}).") from error
    if isinstance(content, list):  # Of torch.cuda.memory_snapshot().
        content = {"segments": content}
    if not isinstance(content, dict):
        raise SnapshotError(f"{file} holds no snapshot of torch.")
    return {**content, "segments": _checked(content.get("segments"))}


def _checked(segments: Any) -> list[dict[str, Any]]:
    """Segments that have what is needed of them. Raises :class:`SnapshotError`."""
    try:
        for segment in segments:
            address, end = segment["address"], segment["address"] + segment["total_size"]
            for block in segment["blocks"]:
                block["address"] = address
                address += block["size"]
                block["state"] + ""
            if address != end:
                raise SnapshotError("The blocks of a segment do not fill it.")
    except (TypeError, KeyError, AttributeError) as error:
        raise SnapshotError(f"Its segments are not as torch has them ({error!r}).") from error
    found: list[dict[str, Any]] = segments
    return found


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
                more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
                part, name = mine[0].part, mine[0].name + more
            else:
                part = "cuda_graphs" if of_graph else "other_tensors"
                name = ""
            block["part"], block["name"] = part, name
            frame = {"name": part, "filename": name or part, "line": 0}
            block["frames"] = [frame, *block.get("frames", ())]


def name_allocations(content: dict[str, Any]) -> None:
    """Give the allocations of a history the names of the blocks that they have made. Of those the
    viewer's timeline shows the allocation's frames, and not the block's. Raises
    :class:`SnapshotError`."""
    try:
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
                    frame = frames.pop(event["addr"], None)
                    if frame is not None and event["action"] == "alloc":
                        event["frames"] = [frame, *event.get("frames", ())]
    except (TypeError, KeyError, AttributeError) as error:
        raise SnapshotError(f"Its history is not as torch has it ({error!r}).") from error


def trace_events(segments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chrome's trace format, which Perfetto reads: a thread a segment, and a byte for a
    microsecond."""
    events: list[dict[str, Any]] = []
    for number, segment in enumerate(sorted(segments, key=lambda each: int(each["address"]))):
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
    devices = 1 + max((int(segment.get("device", 0)) for segment in segments), default=0)
    content.setdefault("device_traces", [[] for _ in range(devices)])
    name_allocations(content)
    stem.parent.mkdir(parents=True, exist_ok=True)
    viewer, perfetto = Path(f"{stem}.pickle"), Path(f"{stem}.perfetto.json")
    for path, written in (
        (viewer, pickle.dumps(content, protocol=VIEWERS_PROTOCOL)),
        (perfetto, json.dumps({"traceEvents": trace_events(segments)}).encode()),
    ):
        # Addresses are for their owner alone.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(written)
    print(f"{viewer}  for PyTorch's memory viewer, pytorch.org/memory_viz")
    print(f"{perfetto}  for ui.perfetto.dev, a thread a segment, a byte for a microsecond")


def _stem(snapshot: Snapshot) -> str:
    names = (f"{name}{value}" for name, value in snapshot.ranks.labels.items() if value is not None)
    return "-".join((f"engine-{snapshot.engine.name}", *names)).replace("/", "_")
