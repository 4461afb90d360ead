# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank leaves for the time after it: out-of-memory errors, and what ended it."""

from __future__ import annotations

from sglang_weight_exporter.records.base import SCHEMA_VERSION, Count, Record, Seconds
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryOwner
from sglang_weight_exporter.records.updates import UpdateInProgress

#: How many owners of memory an error names, and how many errors are kept: the first one, and the
#: last.
NAMED_OWNERS = 10
KEPT_ERRORS = 4


class Doing(Record, frozen=True, kw_only=True):
    """What a rank was in the middle of."""

    #: By role.
    updates: dict[str, UpdateInProgress] = {}
    #: Operations, and since when.
    operations: dict[str, Seconds] = {}

    def __str__(self) -> str:
        """For people: ``an update of the target model from disk (load)``; empty: nothing."""
        what = [
            f"an update of the {role} model from {update.source or 'nowhere yet'} ({update.phase})"
            for role, update in self.updates.items()
        ]
        return " and ".join([*what, *self.operations])


class OutOfMemory(Record, frozen=True, kw_only=True):
    """A CUDA out-of-memory error of torch's, and what held the memory when it was raised."""

    at: Seconds
    device: str
    #: What torch asked CUDA for; what CUDA said was free on the GPU; what the process may have,
    #: which is the GPU's memory unless somebody has set a fraction of it; and the GPU's memory.
    requested: Count
    free: Count
    limit: Count
    total: Count | None = None
    memory: DeviceMemory | None = None
    #: The largest block that torch had free for tensors.
    largest_free: Count | None = None
    #: Largest first; weights by tensor, pools as a whole.
    owners: tuple[MemoryOwner, ...] = ()
    doing: Doing = Doing()
    #: What it took to find this out, while the error waited to be raised.
    seconds: Seconds = 0.0

    @property
    def elsewhere(self) -> int | None:
        """In use on the GPU and not by torch here: other processes, and what this one has beside
        torch. Without NVML nobody can tell them apart."""
        if self.memory is None or self.total is None:
            return None
        return max(0, self.total - self.free - self.memory.physical)

    def __str__(self) -> str:
        """In one line, for a log."""
        parts = {} if self.memory is None else self.memory.parts or {}
        held = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
        doing, largest = str(self.doing), ""
        if self.largest_free is not None:
            largest = f" Its largest free block has {self.largest_free:,}."
        return (
            f"CUDA out of memory on {self.device}: {self.requested:,} bytes asked for, "
            f"{self.free:,} free{', in the middle of ' + doing if doing else ''}. "
            f"torch has {held or 'what could not be read'}.{largest}"
        )


class Crash(Record, frozen=True, kw_only=True):
    """The exception that ended a scheduler."""

    at: Seconds
    #: Its class, and its text.
    error: str
    message: str = ""
    #: Where it was raised, innermost last.
    where: tuple[str, ...] = ()
    doing: Doing = Doing()


class Segment(Record, frozen=True, kw_only=True):
    """A piece of a GPU's memory that torch's allocator has."""

    address: Count
    nbytes: Count
    #: Whether it is of a pool that CUDA graphs are captured into.
    of_graphs: bool = False


class BlackBox(Record, frozen=True, kw_only=True):
    """All of that of one rank; one file, replaced atomically, which outlives the process."""

    schema: Count = SCHEMA_VERSION
    #: Counts the events of the rank's black box; 0 in its file.
    number: Count = 0
    rank_id: str
    pid: Count
    engine: Engine
    ranks: Ranks = Ranks()
    #: Out-of-memory errors that torch has raised in the process, and of these the first and the
    #: last.
    count: Count = 0
    errors: tuple[OutOfMemory, ...] = ()
    crash: Crash | None = None
    #: Pools, adapter slots and tables, and torch's segments, for whoever has an address.
    owners: tuple[MemoryOwner, ...] = ()
    segments: tuple[Segment, ...] = ()
