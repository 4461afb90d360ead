# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``status --last``: what is known of the last engine that ended, or ran out of memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime, timezone

from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.records.black_box import BlackBox, Crash, OutOfMemory
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.ended import EndedRank, ended_ranks, read_black_box
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


def print_last(runtime_dir: RuntimeDir) -> int:
    """Exit status 0 where anything is known, 1 where nothing is."""
    found = [*ended_ranks(runtime_dir), *_alive(runtime_dir)]
    if not found:
        print_line(
            f"In {runtime_dir.path} no rank has ended in the middle of an update or by an "
            "exception of its scheduler, and none has run out of CUDA memory. One that was killed "
            "at another time has left nothing: see the engine's log and the kernel's."
        )
        return 1
    last = max(found, key=lambda ended: ended.at).known.engine.instance
    now = time.time()
    mine = [ended for ended in found if ended.known.engine.instance == last]
    for ended in sorted(mine, key=lambda ended: ended.known.ranks.order):
        for line in _rank(ended, now):
            print_line(line)
    return 0


def _alive(runtime_dir: RuntimeDir) -> Iterator[EndedRank]:
    """Ranks that have run out of memory and go on."""
    for directory, snapshot in SnapshotReader(runtime_dir).read():
        box = read_black_box(directory)
        if box is not None and box.errors:
            with contextlib.suppress(OSError):
                at = directory.is_alive() and box.errors[-1].at
                if at:
                    yield EndedRank(directory, box, snapshot, at, alive=True)


def _rank(ended: EndedRank, now: float) -> Iterator[str]:
    known = ended.known
    yield f"engine {known.engine.name}, {known.ranks}  (process {known.pid}, SGLang " + (
        f"{known.engine.sglang_version}, {known.engine.model_name})"
    )
    box = ended.box
    if ended.alive:
        yield "  goes on"
    elif box is not None and box.crash is not None:
        yield from _crash(box.crash, now)
    else:
        yield f"  ended     at {_when(ended.at, now)} or later, and said nothing: killed, perhaps"
    if not ended.alive and str(ended.doing):
        yield f"  during    {ended.doing}"
    yield from _failures(ended.snapshot)
    if box is not None and box.count:
        yield from _memory(box, now)


def _crash(crash: Crash, now: float) -> Iterator[str]:
    first, *more = crash.message.splitlines() or [""]
    yield f"  ended     at {_when(crash.at, now)} by {crash.error}: {first}"
    yield from (f"            {line}" for line in more[:3])
    yield from (f"  in        {frame}" for frame in reversed(crash.where[-3:]))


def _failures(snapshot: Snapshot | None) -> Iterator[str]:
    for role in () if snapshot is None else snapshot.roles:
        last = role.last_update
        if last is not None and not last.succeeded:
            phase = "" if last.failed_in is None else f", in phase {last.failed_in}"
            yield (
                f"  update    of the {role.name} model from {last.source} failed{phase}, weights "
                f"{last.effect}: {last.message}"
            )


def _memory(box: BlackBox, now: float) -> Iterator[str]:
    yield f"  memory    {box.count:,} CUDA out-of-memory errors since its start"
    # The first one, and the last.
    for error in (*box.errors[:1], *box.errors[1:][-1:]):
        yield from _out_of_memory(error, now)


def _out_of_memory(error: OutOfMemory, now: float) -> Iterator[str]:
    total = "" if error.total is None else f" of {error.total:,}"
    yield f"  at        {_when(error.at, now)}" + (
        f", in {error.doing}" if str(error.doing) else ""
    )
    yield (
        f"    asked   {error.requested:,} bytes on {error.device}, where "
        f"{error.free:,}{total} were free"
    )
    if error.limit != error.total:
        yield f"    limit   {error.limit:,} bytes, which somebody has set for the process"
    if error.largest_free is not None:
        yield f"    block   {error.largest_free:,} bytes, the largest that torch had free"
    memory = error.memory
    if memory is not None and memory.parts is not None:
        for part, nbytes in sorted(memory.parts.items(), key=lambda each: -each[1]):
            if nbytes:
                yield f"    {part:<16}{nbytes:>18,}"
        yield f"    {'torch':<16}{memory.physical:>18,}"
    elif memory is not None:
        yield f"    torch   {memory.physical:,} bytes; of what, is not known: {memory.reason}"
    if error.elsewhere is not None:
        yield f"    {'elsewhere':<16}{error.elsewhere:>18,}  other processes, and CUDA's own"
    for owner in error.owners:
        yield f"    largest {owner.nbytes:>18,}  {owner.part}  {owner.name}"


def _when(at: float, now: float) -> str:
    moment = datetime.fromtimestamp(at, tz=timezone.utc).isoformat(timespec="seconds")
    return f"{moment}, {max(0.0, now - at):.0f} s ago"
