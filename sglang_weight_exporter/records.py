# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The data model: what a rank knows about its weights and KV pool, as files carry it.

Every room shares these records and they import none of the rooms. All are frozen. Bytes are
bytes, times are Unix seconds (floats), durations are seconds. A value that could not be read is
``None`` or missing from its list, never zero.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

#: Raised when a reader of the previous version could misread a file. Files of another version
#: are reported and left alone.
SCHEMA_VERSION = 1

Source = Literal["disk", "distributed", "tensor", "ipc", "p2p", "eplb", "external"]
SOURCES: tuple[Source, ...] = get_args(Source)

Kind = Literal["parameter", "buffer", "derived"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Change = Literal["added", "removed", "resized", "device"]
CHANGES: tuple[Change, ...] = get_args(Change)

#: Why a fingerprint was not taken: memory is released or may be; it would have taken too long; a
#: CUDA graph was being captured, or a tensor has no bytes that could be read; it failed.
Skip = Literal["released", "time_limit", "unsupported", "error"]
SKIPS: tuple[Skip, ...] = get_args(Skip)

#: What an update spends its time on: nothing of its own, because the next call, a peer or a reader
#: is awaited; tensors that arrive; weights that are written, and read where they come from disk;
#: weights that are unpacked before and packed after that, quantized ones first of all; the prefix
#: cache; this package's own look.
Phase = Literal["wait", "receive", "load", "post_process", "flush", "capture"]
PHASES: tuple[Phase, ...] = get_args(Phase)

#: When tensors changed that no update had written: between two updates; while memory was released
#: that SGLang keeps a copy of.
During = Literal["serving", "release"]
DURINGS: tuple[During, ...] = get_args(During)

#: What an update did to the weights: "undefined" means that some tensors may hold new values,
#: some old ones, and nobody can tell which (SGLang's rollback reads the new checkpoint again).
Effect = Literal["changed", "unchanged", "undefined"]

#: ``installed``: the hook sits on its target. ``pending``: SGLang has not imported the module
#: yet. ``absent``: this SGLang release has no such target. ``failed``: it is there, and wrapping
#: it failed.
HookStatus = Literal["installed", "pending", "absent", "failed"]

#: Upper bounds in seconds of ``sglang_weight_update_duration_seconds``: from a tiny model's
#: reload to a checkpoint of a terabyte over a network file system.
DURATION_BUCKETS: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all records: immutable, named fields, unknown fields ignored on reading.

    None refers to itself, so Python's garbage collector has nothing to do with them.
    """


class Device(Record, frozen=True, kw_only=True):
    """One device that holds weights or KV pool of a rank."""

    #: torch's name in this process: ``cuda:0``, ``cpu``.
    name: str
    #: With NVML's prefix, ``GPU-…`` or ``MIG-…``; empty where the device is no GPU.
    uuid: str = ""
    product: str = ""
    pci_bus_id: str = ""


class WeightUsage(Record, frozen=True, kw_only=True):
    """Bytes and tensors of one device, kind and dtype.

    ``nbytes`` sums unique storages, each counted once, under the first tensor that uses it
    (parameters before buffers); ``tensors`` counts names, so a tied tensor counts twice here.
    """

    device: str
    kind: Kind
    dtype: str
    nbytes: int
    tensors: int
    #: Bytes of storages that these tensors use and that count elsewhere: at the target whose
    #: embeddings a draft uses, or at the weight-cache daemon that they are mapped from.
    shared: int = 0


class KvPoolUsage(Record, frozen=True, kw_only=True):
    """Bytes and capacity of one KV pool on one device."""

    device: str
    pool: str
    nbytes: int
    #: Capacity in tokens; ``None`` for state pools (Mamba), which hold requests, not tokens.
    tokens: int | None = None


class LoraUsage(Record, frozen=True, kw_only=True):
    """Preallocated adapter slots on one device, and adapters that are loaded."""

    device: str
    nbytes: int
    adapters: int
    #: How many can be on the device at a time; ``None``: not known.
    slots: int | None = None


class TableRef(Record, frozen=True, kw_only=True):
    """Where the pointer table of a role lies, and what is in it."""

    #: File name inside the rank's directory.
    file: str
    #: The table's fingerprint (`weight_table.table_sha256`), hexadecimal.
    sha256: str
    rows: int
    #: Device name to number of contiguous regions.
    regions: dict[str, int]
    captured_at: float
    #: What the tensors hold, as :func:`fingerprint.of_rank` says, in 32 hexadecimal digits, and
    #: how long it took; empty and ``None`` where it was not taken, or the memory is released.
    fingerprint: str = ""
    fingerprint_seconds: float | None = None
    #: Parameters and derived weights that hold other bytes than the last load or update left in
    #: them: how many, and the names of :data:`NAMED_CHANGES` of them.
    #: ``None``: not known, because nobody has looked at them when it ended, or looks now.
    modified: int | None = None
    modified_names: tuple[str, ...] = ()


class Histogram(Record, frozen=True, kw_only=True):
    """Observations of a duration; ``counts`` has one entry a bucket and one for +Inf."""

    counts: tuple[int, ...] = (0,) * (len(DURATION_BUCKETS) + 1)
    sum: float = 0.0

    def observe(self, seconds: float) -> Histogram:
        """This histogram with one more observation."""
        counts = list(self.counts)
        for index, bound in enumerate((*DURATION_BUCKETS, float("inf"))):
            if seconds <= bound:
                counts[index] += 1
                break
        return Histogram(counts=tuple(counts), sum=self.sum + seconds)


class UpdateCounts(Record, frozen=True, kw_only=True):
    """Totals of one source since the process started."""

    updates: int = 0
    failures: int = 0
    calls: int = 0
    #: Of ``updates``, those after which every tensor held the bytes that it had held before.
    without_change: int = 0
    duration: Histogram = Histogram()
    #: Seconds of all updates by what they went to, and what they brought; ``None`` once an update
    #: brought something of which nobody can tell how much it is.
    phases: dict[Phase, float] = {}
    nbytes: int | None = 0
    #: The last update that counted: the trace of its span (32 hexadecimal digits), when it ended,
    #: and how long it took.
    trace_id: str = ""
    updated_at: float | None = None
    seconds: float | None = None


def add_phases(one: dict[Phase, float], other: dict[Phase, float]) -> dict[Phase, float]:
    """Seconds by phase, summed."""
    return {
        phase: one.get(phase, 0.0) + other.get(phase, 0.0)
        for phase in PHASES
        if phase in one or phase in other
    }


def add_bytes(one: int | None, other: int | None) -> int | None:
    """What is not known makes the sum unknown."""
    return None if one is None or other is None else one + other


class FingerprintCounts(Record, frozen=True, kw_only=True):
    """What became of the fingerprints of a role, and what they have shown."""

    skipped: dict[Skip, int] = {}
    #: Tensors found with other bytes than the last load or update had left, at each look.
    modified: dict[During, dict[Kind, int]] = {}


class OperationCounts(Record, frozen=True, kw_only=True):
    """Totals of one operation that reads, saves, sends or checks weights."""

    calls: int = 0
    failures: int = 0


#: How generation is interrupted: the running requests stay as they are and go on with what they
#: have in the cache; they go back to the queue and are computed again; all of them are aborted.
Pause = Literal["in_place", "retract", "abort"]
PAUSES: tuple[Pause, ...] = get_args(Pause)


class CacheCounts(Record, frozen=True, kw_only=True):
    """The prefix cache of a scheduler: what became of its keys and values as weights changed."""

    flushes: int = 0
    #: Flushes that SGLang refused, because requests were running or queued.
    failures: int = 0
    flushed_at: float | None = None
    #: Whether it holds tokens that weights have computed which are gone; ``None``: not known.
    stale: bool | None = False
    pauses: dict[Pause, int] = {}
    #: Between an order to pause that keeps its requests and the one to continue.
    paused: bool = False


class TableChanges(Record, frozen=True, kw_only=True):
    """How the table after an update differs from the table before it.

    The name lists are cut at :data:`NAMED_CHANGES` entries; the counts are complete.
    """

    moved: int = 0
    added: int = 0
    removed: int = 0
    resized: int = 0
    device: int = 0
    names: dict[str, tuple[str, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self.moved or self.added or self.removed or self.resized or self.device)


#: How many names of changed tensors an event carries for each change.
NAMED_CHANGES = 100


class Update(Record, frozen=True, kw_only=True):
    """One logical load or update of a role's weights that has ended."""

    #: ``load`` for the first load, ``update`` for everything after it.
    action: Literal["load", "update"]
    source: Source | None = None
    #: Counts loads, updates and requests of the process, failed ones included, from 1; all roles
    #: share it. Ranks of one engine go through the same sequence, so the number names the same
    #: update on every rank.
    sequence: int
    started_at: float
    ended_at: float
    calls: int = 1
    succeeded: bool
    effect: Effect
    #: SGLang's message, or the exception; empty where there was none.
    message: str = ""
    model_path: str = ""
    weight_version: str = ""
    trace_id: str = ""
    changes: TableChanges = TableChanges()
    #: Seconds by what they went to, which sum to its duration, and the bytes that it brought;
    #: ``None``: nobody can tell.
    phases: dict[Phase, float] = {}
    nbytes: int | None = None


class UpdateInProgress(Record, frozen=True, kw_only=True):
    """An update or session that has begun and not ended: the table may be a mixture."""

    source: Source | None
    started_at: float
    last_call_at: float
    calls: int = 0
    #: Whether one of the calls has failed already.
    failed: bool = False
    #: What it is about now, and what it has been about until its last call ended.
    phase: Phase = "wait"
    phases: dict[Phase, float] = {}
    nbytes: int | None = 0
    #: SGLang before 0.5.21 has no end of an update made of several calls: such an update counts
    #: as ended once no call came for this many seconds. ``None``: an end will be reported, of the
    #: update or of the call that is running.
    idle_seconds: float | None = None

    def is_over(self, now: float) -> bool:
        """Whether it counts as ended though nobody reported an end.

        The engine has no thread that could wait for one, so whoever reads a snapshot asks here.
        """
        return (
            self.idle_seconds is not None
            and self.calls > 0
            and now - self.last_call_at > self.idle_seconds
        )


class Role(Record, frozen=True, kw_only=True):
    """One model of a rank: the target, or a draft; or what a process without an engine holds."""

    #: ``target``, ``draft``, ``draft_1``, …, ``encoder``, ``weight_cache``.
    name: str
    #: The device of the model runner.
    device: str
    architecture: str = ""
    quantization: str = ""
    #: The checkpoint that is served.
    model_path: str = ""
    weights: tuple[WeightUsage, ...] | None = None
    #: Physical bytes by device: the sum of ``weights``, or while released what lies outside of the
    #: memory saver's regions.
    resident: dict[str, int] | None = None
    table: TableRef | None = None
    kv_pools: tuple[KvPoolUsage, ...] | None = None
    kv_resident: dict[str, int] | None = None
    lora: tuple[LoraUsage, ...] = ()
    loaded_at: float | None = None
    load_seconds: float | None = None
    #: When weights last changed, also by an update that failed half-way.
    updated_at: float | None = None
    #: When the last load or update began that ``updates`` counts: ranks that hold the same weights
    #: were called at the same moment, however long each took.
    update_started_at: float | None = None
    updates: dict[Source, UpdateCounts] = {}
    moved: int = 0
    changes: dict[Change, int] = {}
    #: ``None``: fingerprints are switched off.
    fingerprints: FingerprintCounts | None = None
    in_progress: UpdateInProgress | None = None
    last_update: Update | None = None

    @property
    def released(self) -> bool:
        """Whether the memory behind the weights has been given back for now."""
        held = sum(part.nbytes for part in self.weights or ())
        return self.resident is not None and sum(self.resident.values()) < held

    def settled(self, now: float) -> Role:
        """The role as it is once an update that is over (:meth:`UpdateInProgress.is_over`) has
        been counted."""
        progress = self.in_progress
        if progress is None or not progress.is_over(now):
            return self
        if progress.source is None:
            return msgspec.structs.replace(self, in_progress=None)
        counts = self.updates.get(progress.source, UpdateCounts())
        ended = msgspec.structs.replace(
            counts,
            updates=counts.updates + (not progress.failed),
            failures=counts.failures + progress.failed,
            duration=counts.duration.observe(
                # The clock may have been set back.
                max(0.0, progress.last_call_at - progress.started_at)
            ),
            phases=add_phases(counts.phases, progress.phases),
            nbytes=add_bytes(counts.nbytes, progress.nbytes),
        )
        return msgspec.structs.replace(
            self,
            in_progress=None,
            updated_at=self.updated_at if progress.failed else progress.last_call_at,
            update_started_at=(self.update_started_at if progress.failed else progress.started_at),
            updates={**self.updates, progress.source: ended},
        )


#: What holds the memory that torch's allocator has of a device. Disjoint, and together all of it;
#: ``docs/memory.md`` says what each is.
MemoryPart = Literal[
    "weights",
    "derived_weights",
    "lora",
    "kv_pool",
    "kv_tables",
    "cuda_graphs",
    "other_tensors",
    "rounding",
    "fragments",
    "cached",
]
MEMORY_PARTS: tuple[MemoryPart, ...] = get_args(MemoryPart)


class DeviceMemory(Record, frozen=True, kw_only=True):
    """What a process has of one device through torch's allocator, at its last look."""

    device: str
    at: float
    #: torch's own counts: live blocks; segments, those included whose memory is given back for
    #: now; and the most of each since the process started, or since somebody reset it.
    allocated: int
    reserved: int
    allocated_peak: int
    reserved_peak: int
    #: Bytes of ``reserved`` that have no physical memory, because the memory saver released them.
    released: int = 0
    #: Bytes of KV pools in virtual memory that is not the allocator's.
    mapped: int = 0
    #: Bytes by what holds them; they sum to ``reserved - released + mapped``. ``None``: not known.
    parts: dict[MemoryPart, int] | None = None
    #: Why they are not, as a sentence.
    reason: str = ""
    #: ``reserved`` before and after the last update; ``None`` before the first.
    before_update: int | None = None
    after_update: int | None = None
    #: What was left of ``reserved`` after the last release.
    after_release: int | None = None

    @property
    def physical(self) -> int:
        """Bytes that the parts sum to."""
        return self.reserved - self.released + self.mapped


class MemoryOwner(Record, frozen=True, kw_only=True):
    """A piece of a GPU's memory, and what it is."""

    address: int
    nbytes: int
    part: MemoryPart
    #: ``model.norm.weight (target)``; of a tied tensor its first name.
    name: str


class MemoryDump(Record, frozen=True, kw_only=True):
    """What a look has left of torch's memory, because somebody had asked for it."""

    schema: int = SCHEMA_VERSION
    at: float
    #: What ``torch.cuda.memory_snapshot()`` answered, as JSON.
    segments: bytes
    owners: tuple[MemoryOwner, ...]
    #: torch's names of the pools of CUDA graphs, where SGLang says them.
    graph_pools: tuple[tuple[int, int], ...] = ()


class MemoryBudget(Record, frozen=True, kw_only=True):
    """What SGLang made the size of the KV pool from; ``None``: this release does not say."""

    #: ``--mem-fraction-static``, as given or as SGLang chose it.
    fraction: float | None = None
    #: Free bytes of the GPU before the weights were loaded; of a group, of the rank with the least.
    before_load: int | None = None
    #: ``--max-total-tokens``; ``None`` also where it was not given.
    token_limit: int | None = None


class HookState(Record, frozen=True, kw_only=True):
    """One line of ``status``: a hook target and whether it is hooked."""

    target: str
    status: HookStatus
    reason: str = ""


class Engine(Record, frozen=True, kw_only=True):
    """Facts about the engine that hold while the process lives."""

    #: The label: the HTTP port in SGLang's settings, with ``-2`` and so on for a further engine
    #: of this host that has the same.
    name: str
    #: Tells two engines apart that had the same name one after the other.
    instance: str
    model_name: str = ""
    model_path: str = ""
    sglang_version: str = ""
    torch_version: str = ""
    #: Into how many parts the model is cut, as SGLang's settings say; ``None``: they do not.
    tp_size: int | None = None
    pp_size: int | None = None
    ep_size: int | None = None
    #: Where it serves HTTP, as its settings say; empty where it does not.
    url: str = ""
    #: The same for all ranks of the engine, on however many hosts; empty until they have agreed.
    group: str = ""
    #: Which of the engine's hosts this is, and of how many; ``None``: the settings do not say.
    node_rank: int | None = None
    nodes: int | None = None


class Ranks(Record, frozen=True, kw_only=True):
    """Parallel ranks as SGLang's own metrics have them; ``None`` where SGLang has no such rank."""

    tp: int = 0
    pp: int = 0
    dp: int | None = None
    moe_ep: int | None = None

    @property
    def labels(self) -> dict[str, int | None]:
        """Under the names that SGLang's own metrics have: ``tp_rank`` and so on."""
        return {f"{name}_rank": getattr(self, name) for name in self.__struct_fields__}

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts the ranks of one engine."""
        return -1 if self.dp is None else self.dp, self.pp, self.tp

    def __str__(self) -> str:
        """For people: ``tp 0 pp 1 dp 2``."""
        text = f"tp {self.tp} pp {self.pp}"
        if self.dp is not None:
            text += f" dp {self.dp}"
        return f"{text} ep {self.moe_ep}" if self.moe_ep else text


class Snapshot(Record, frozen=True, kw_only=True):
    """All that a rank says of itself; one file, replaced atomically."""

    schema: int = SCHEMA_VERSION
    rank_id: str
    pid: int
    started_at: float
    engine: Engine
    ranks: Ranks = Ranks()
    devices: tuple[Device, ...] = ()
    #: Each device that torch's allocator has memory of; empty where there is no GPU.
    memory: tuple[DeviceMemory, ...] = ()
    budget: MemoryBudget = MemoryBudget()
    #: Inode of the namespace that ``pid`` is of; 0: not known.
    pid_namespace: int = 0
    roles: tuple[Role, ...] = ()
    weight_version: str = ""
    hooks: tuple[HookState, ...] = ()
    #: Exceptions of our own that were caught in the engine, by the hook they came from.
    hook_errors: dict[str, int] = {}
    operations: dict[str, OperationCounts] = {}
    update_groups: int = 0
    #: ``None`` where no scheduler serves requests.
    cache: CacheCounts | None = None
    #: Seconds the engine spent on the last capture and on writing it.
    snapshot_seconds: float | None = None
    events_dropped: int = 0
    #: Where the exporter process is to keep ``weights_metadata`` files; empty: nowhere.
    metadata_dir: str = ""

    @property
    def order(self) -> tuple[str, tuple[int, int, int], float]:
        """Sorts ranks for people: by engine, ranks, and start."""
        return self.engine.name, self.ranks.order, self.started_at


class Event(Record, frozen=True, kw_only=True):
    """One ended load or update, waiting to be exported as a span."""

    schema: int = SCHEMA_VERSION
    #: Numbers the events of one rank, from 1.
    number: int
    rank_id: str
    pid: int
    engine: Engine
    ranks: Ranks
    role: str
    device: Device
    update: Update
    weights: tuple[WeightUsage, ...] | None = None
    #: The table after the update.
    table: TableRef | None = None
    #: The table's in the event before this one of the same role; equal when nothing changed.
    previous_sha256: str = ""


class ExporterEndpoint(Record, frozen=True, kw_only=True):
    """What the exporter process says of itself in ``exporter.json``."""

    schema: int = SCHEMA_VERSION
    pid: int
    started_at: float
    version: str
    #: ``None`` until the port could be bound.
    url: str | None = None
    #: Why there is no URL, or not as it was configured, as one sentence.
    problem: str = ""
