# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The account of each GPU: what ranks say of torch's memory, and the rest by what NVML says.

NVML is read here and not in the engine, so between two captures of a rank nothing of it runs there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from sglang_weight_exporter.export.nvml import DEADLINE_SECONDS, GpuMemory
from sglang_weight_exporter.records.memory import MEMORY_PARTS, DeviceMemory
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.namespaces import HOST_PIDS, pid_namespace

#: Parts of a GPU beside those of torch in its ranks, see ``docs/memory.md``.
OTHER_PARTS = (
    "outside_torch",
    "since_capture",
    "other_processes",
    "unattributed",
    "driver",
    "free",
)
GPU_PARTS = (*MEMORY_PARTS, *OTHER_PARTS)

#: What a GPU has in use may change so much between two readings while no rank reads its own memory.
#: More is under way: a load, a resume, and the rank that does it has not said so yet.
UNSAID_BYTES = 256 * 2**20
#: So long the process of a rank that is gone may have memory.
ENDING_SECONDS = 10.0

#: How far back the most in use is searched: any usual scrape interval, and with two scrapers the
#: same for both.
WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class RankOnGpu:
    """A rank's process, as NVML sees it."""

    snapshot: Snapshot
    memory: DeviceMemory
    #: Bytes of its process; ``None`` where it is not known which process of NVML's it is.
    used: int | None = None
    most_used: int | None = None
    #: What it has beside torch's memory: context, modules, graphs, communicators.
    outside_torch: int | None = None


@dataclass(frozen=True)
class GpuAccount:
    """One GPU now. The parts sum to NVML's total; ``None``: they do not close or change right now,
    as in the middle of a load or a release, because ranks and NVML are read at different times."""

    gpu: GpuMemory
    ranks: tuple[RankOnGpu, ...]
    parts: dict[str, int] | None
    #: ``None`` where the driver does not say what is in use.
    most_used: int | None

    @property
    def free(self) -> int | None:
        """Bytes that nobody has now; ``None`` where the driver does not say what is in use."""
        gpu = self.gpu
        if gpu.total_bytes is None or gpu.used_bytes is None:
            return None
        return gpu.total_bytes - gpu.used_bytes - (gpu.reserved_bytes or 0)

    @property
    def resume(self) -> int | None:
        """What ranks will take when they resume; ``None`` where one of them does not know what it
        has released."""
        if not self.ranks or any(rank.memory.parts is None for rank in self.ranks):
            return None
        return sum(rank.memory.released for rank in self.ranks)


@dataclass
class _Most:
    """The most of a figure within the window."""

    _seen: dict[Hashable, deque[tuple[float, int]]] = field(default_factory=dict)

    def note(self, what: Hashable, value: int, now: float) -> int:
        kept = self._seen.setdefault(what, deque())
        while kept and kept[-1][1] <= value:
            kept.pop()
        kept.append((now, value))
        while kept[0][0] < now - WINDOW_SECONDS:
            kept.popleft()
        return kept[0][1]

    def forget(self, now: float) -> None:
        for what in [what for what, kept in self._seen.items() if kept[-1][0] < now - 1]:
            del self._seen[what]


class GpuAccounts:
    """Accounts of the GPUs that ranks use, from one reading to the next. Not safe from several
    threads.

    In a pod that sees all GPUs of its host others are other pods': each is published by the
    exporter whose ranks use it, and one that nobody's rank uses by none.
    """

    def __init__(self, namespace: int | None = None) -> None:
        #: Of this process's id.
        self._namespace = pid_namespace() if namespace is None else namespace
        self._most = _Most()
        #: Ranks with the times of their captures → the least that they had beside torch's memory
        #: since. What torch takes between two captures would count as outside of it otherwise.
        self._outside: dict[Hashable, int] = {}
        #: GPU → its bytes in use and the times of its ranks' readings, at the last reading.
        self._before: dict[str, tuple[int, frozenset[Hashable]]] = {}
        #: Process → when it was a rank's last.
        self._were_ranks: dict[int, float] = {}

    def read(
        self, snapshots: Iterable[Snapshot], gpus: Iterable[GpuMemory], now: float
    ) -> tuple[GpuAccount, ...]:
        """``gpus`` as NVML has them now."""
        snapshots = list(snapshots)
        kept, self._outside = self._outside, {}
        self._were_ranks = {
            pid: seen for pid, seen in self._were_ranks.items() if now - seen < ENDING_SECONDS
        } | {each.pid: now for each in snapshots if each.pid_namespace == HOST_PIDS}
        in_use = {device.uuid for each in snapshots for device in each.devices}
        accounts = tuple(
            self._account(gpu, snapshots, kept, now) for gpu in gpus if gpu.uuid in in_use
        )
        self._most.forget(now)
        return accounts

    def _account(
        self, gpu: GpuMemory, snapshots: list[Snapshot], kept: dict[Hashable, int], now: float
    ) -> GpuAccount:
        ranks = [
            (snapshot, memory)
            for snapshot in snapshots
            for memory in snapshot.memory
            if memory.device in {each.name for each in snapshot.devices if each.uuid == gpu.uuid}
        ]
        changing = self._is_changing(gpu, ranks, snapshots)
        of_processes = self._of_processes(gpu, [snapshot for snapshot, _ in ranks])
        found = tuple(
            self._rank(gpu, snapshot, memory, of_processes.get(snapshot.rank_id), kept, now)
            for snapshot, memory in ranks
        )
        return GpuAccount(
            gpu=gpu,
            ranks=found,
            parts=None if changing else self._parts(gpu, found, snapshots, kept),
            most_used=None
            if gpu.used_bytes is None
            else self._most.note(gpu.uuid, gpu.used_bytes, now),
        )

    def _is_changing(
        self,
        gpu: GpuMemory,
        ranks: list[tuple[Snapshot, DeviceMemory]],
        snapshots: list[Snapshot],
    ) -> bool:
        """Whether something is under way that ranks have not said yet."""
        if gpu.used_bytes is None:
            return False  # Nor is there an account that it could spoil.
        said = frozenset[Hashable]((snapshot.rank_id, memory.at) for snapshot, memory in ranks)
        used, said_before = self._before.get(gpu.uuid, (gpu.used_bytes, said))
        self._before[gpu.uuid] = gpu.used_bytes, said
        unsaid = said == said_before and abs(gpu.used_bytes - used) > UNSAID_BYTES
        living = {each.pid for each in snapshots}
        ends = self._namespace == HOST_PIDS and any(
            pid in self._were_ranks and pid not in living for pid in gpu.processes or ()
        )
        earlier = any(_is_earlier(gpu, memory) for _, memory in ranks)
        return gpu.changing or unsaid or ends or earlier

    def _of_processes(self, gpu: GpuMemory, ranks: list[Snapshot]) -> dict[str, int]:
        """Rank → bytes of its process, where it is known which one that is.

        By its id, where everybody counts processes as the host does. In a container, where they
        are all of one rank: it has memory of this GPU, so a single process can only be its own.
        """
        processes = gpu.processes or {}
        if self._namespace == HOST_PIDS:
            return {
                snapshot.rank_id: processes[snapshot.pid]
                for snapshot in ranks
                if snapshot.pid_namespace == HOST_PIDS and snapshot.pid in processes
            }
        if len(ranks) == len(processes) == 1:
            return {ranks[0].rank_id: next(iter(processes.values()))}
        return {}

    def _rank(
        self,
        gpu: GpuMemory,
        snapshot: Snapshot,
        memory: DeviceMemory,
        used: int | None,
        kept: dict[Hashable, int],
        now: float,
    ) -> RankOnGpu:
        if used is None:
            return RankOnGpu(snapshot, memory)
        return RankOnGpu(
            snapshot,
            memory,
            used=used,
            most_used=self._most.note((gpu.uuid, snapshot.rank_id), used, now),
            outside_torch=self._beside([(snapshot, memory)], gpu, used, kept)
            if memory.parts is not None
            else None,
        )

    def _beside(
        self,
        ranks: Iterable[tuple[Snapshot, DeviceMemory]],
        gpu: GpuMemory,
        used: int,
        kept: dict[Hashable, int],
    ) -> int | None:
        """What processes have beside torch's memory; ``None`` where it was read at another time
        than theirs."""
        ranks = list(ranks)
        beside = used - sum(memory.physical for _, memory in ranks)
        if beside < 0 or any(_is_earlier(gpu, memory) for _, memory in ranks):
            return None
        key = (gpu.uuid, *((snapshot.rank_id, memory.at) for snapshot, memory in ranks))
        least = min(beside, kept.get(key, beside))
        self._outside[key] = least
        return least

    def _parts(
        self,
        gpu: GpuMemory,
        ranks: tuple[RankOnGpu, ...],
        snapshots: list[Snapshot],
        kept: dict[Hashable, int],
    ) -> dict[str, int] | None:
        if gpu.total_bytes is None or gpu.used_bytes is None:
            return None
        known = [rank for rank in ranks if rank.memory.parts is not None]
        parts = dict.fromkeys(GPU_PARTS, 0)
        for rank in known:
            for part, nbytes in (rank.memory.parts or {}).items():
                parts[part] += nbytes
        rest = gpu.used_bytes - sum(rank.memory.physical for rank in known)
        used, others = self._processes(gpu, known, len(ranks), snapshots)
        if used is not None:
            pairs = [(rank.snapshot, rank.memory) for rank in known]
            outside = self._beside(pairs, gpu, used, kept)
            if outside is None:
                return None
            beside = used - sum(rank.memory.physical for rank in known)
            parts["outside_torch"], parts["since_capture"] = outside, beside - outside
            parts["other_processes"] = others
            rest -= beside + others
        parts["unattributed"] = rest
        parts["driver"] = gpu.reserved_bytes or 0
        parts["free"] = gpu.total_bytes - gpu.used_bytes - parts["driver"]
        return parts if min(parts.values()) >= 0 else None

    def _processes(
        self, gpu: GpuMemory, known: list[RankOnGpu], ranks: int, snapshots: list[Snapshot]
    ) -> tuple[int | None, int]:
        """Bytes of the processes of the ranks whose parts are known, and of those that are no
        rank's; ``None``: they cannot be distinguished."""
        if gpu.processes is None:
            return None, 0
        total = sum(gpu.processes.values())
        if self._namespace == HOST_PIDS:
            used = [rank.used for rank in known]
            if None in used:
                return None, 0
            mine = {each.pid for each in snapshots if each.pid_namespace == HOST_PIDS}
            others = sum(size for pid, size in gpu.processes.items() if pid not in mine)
            return sum(each for each in used if each is not None), others
        # Which is which is not known, but as many processes as ranks can be nobody else's.
        return (total, 0) if len(known) == ranks == len(gpu.processes) else (None, 0)


def _is_earlier(gpu: GpuMemory, memory: DeviceMemory) -> bool:
    """Whether the driver was asked before the rank read its memory, and so may not know of what it
    has just taken or let go; no reading is as old as a clock that was set back would make it."""
    return gpu.read_at is not None and 0 < memory.at - gpu.read_at < 2 * DEADLINE_SECONDS


def ranks_on_gpus(accounts: Iterable[GpuAccount]) -> Iterator[RankOnGpu]:
    """Every rank on every GPU."""
    for account in accounts:
        yield from account.ranks
