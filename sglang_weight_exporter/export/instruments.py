# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one definition of every metric: its name, what it means, and how it is read from a view.

Prometheus and OTLP both take their values from here, and so does the reference in ``docs/``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.gpu_account import GpuAccount, RankOnGpu, ranks_on_gpus
from sglang_weight_exporter.export.views import IDENTITY, HostView, RoleView, identity
from sglang_weight_exporter.fingerprint import as_number
from sglang_weight_exporter.records.fingerprints import DURINGS, SKIPS
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.records.pools import PAUSES, CacheCounts
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.records.updates import PHASES, SOURCES, Histogram, UpdateCounts
from sglang_weight_exporter.records.weights import CHANGES, KINDS


@dataclass(frozen=True)
class Sample:
    """One value of an instrument."""

    #: Label values beyond identity, in the instrument's order.
    labels: tuple[str, ...]
    value: float | Histogram
    #: The device that the value belongs to; empty: the role's own.
    device: str = ""
    #: The trace of the last update that was counted here; empty where there is none.
    trace_id: str = ""
    #: When that was, and how long it took.
    at: float | None = None
    seconds: float | None = None


RoleReader: TypeAlias = Callable[[RoleView], Iterable[Sample]]
HostReader: TypeAlias = Callable[[HostView], Iterable[Sample]]


@dataclass(frozen=True)
class Instrument:
    """One metric family.

    ``name`` is Prometheus's, without ``_total``; OTLP derives its own from it and ``unit``.
    ``read_role`` gives values for each role of each rank (with identity labels), ``read_host``
    for the host.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    #: UCUM, with what is counted in braces; empty where a number has no unit.
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    read_role: RoleReader | None = None
    read_host: HostReader | None = None
    #: It is the rank's and no role's: a rank of which no role is known yet has it too.
    of_rank: bool = False


def _one(value: float | None) -> Iterator[Sample]:
    if value is not None:
        yield Sample((), value)


def _weight_bytes(view: RoleView) -> Iterator[Sample]:
    for part in view.role.weights or ():
        yield Sample((part.kind, part.dtype), part.nbytes, part.device)


def _weight_tensors(view: RoleView) -> Iterator[Sample]:
    for part in view.role.weights or ():
        yield Sample((part.kind, part.dtype), part.tensors, part.device)


def _shared(view: RoleView) -> Iterator[Sample]:
    totals: dict[str, int] = {}
    for part in view.role.weights or ():
        totals[part.device] = totals.get(part.device, 0) + part.shared
    return _by_device({device: nbytes for device, nbytes in totals.items() if nbytes})


def _by_device(totals: dict[str, int] | None) -> Iterator[Sample]:
    for device, value in (totals or {}).items():
        yield Sample((), value, device)


def _by_source(
    read: Callable[[UpdateCounts], float | Histogram], *, exemplar: bool = False
) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for source in SOURCES:
            counts = view.role.updates.get(source, UpdateCounts())
            yield Sample(
                (source,),
                read(counts),
                trace_id=counts.trace_id if exemplar else "",
                at=counts.updated_at,
                seconds=counts.seconds,
            )

    return samples


def _histograms(view: RoleView) -> Iterator[Sample]:
    """Of sources that were used: of a rank's series most would be of those that never are."""
    durations = _by_source(lambda counts: counts.duration, exemplar=True)
    for sample in durations(view):
        if isinstance(sample.value, Histogram) and any(sample.value.counts):
            yield sample


def _phase_seconds(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES:
        seconds = view.role.updates.get(source, UpdateCounts()).phases
        for phase in PHASES if seconds else ():
            yield Sample((source, phase), seconds.get(phase, 0.0))


def _update_bytes(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES:
        counts = view.role.updates.get(source, UpdateCounts())
        if counts.phases and counts.nbytes is not None:
            yield Sample((source,), counts.nbytes)


def _phase_in_progress(view: RoleView) -> Iterator[Sample]:
    if view.role.in_progress is not None:
        yield Sample((view.role.in_progress.phase,), 1)


def _changes(view: RoleView) -> Iterator[Sample]:
    for change in CHANGES:
        yield Sample((change,), view.role.changes.get(change, 0))


#: Known before their first call, so that the counter exists at 0.
OPERATIONS = (
    "get_weights_by_name",
    "save_remote_model",
    "save_sharded_model",
    "send_weights_to_remote_instance",
    "check_weights",
    "init_weights_update_group",
    "destroy_weights_update_group",
    "load_lora_adapter",
    "load_lora_adapter_from_tensors",
    "unload_lora_adapter",
)


def _operations(attribute: Literal["calls", "failures"]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target:
            for operation in dict.fromkeys((*OPERATIONS, *view.snapshot.operations)):
                counts = view.snapshot.operations.get(operation)
                yield Sample((operation,), 0 if counts is None else getattr(counts, attribute))

    return samples


#: SGLang's weight version where it is an integer. Anything that `float` takes besides (`nan`,
#: `12e4567`) is a name and no number.
_INTEGER = re.compile(r"-?[0-9]{1,16}")

#: Every integer up to here is exact in a float, which is what Prometheus keeps.
_EXACT = 2**53


def _version(view: RoleView) -> Iterator[Sample]:
    text = view.snapshot.weight_version
    if _INTEGER.fullmatch(text) and abs(int(text)) <= _EXACT:
        yield Sample((), int(text))


def _version_id(snapshot: Snapshot) -> float | None:
    if not snapshot.weight_version:
        return None
    return as_number(hashlib.sha256(snapshot.weight_version.encode()).hexdigest())


def _target_only(read: Callable[[Snapshot], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target:
            yield from _one(read(view.snapshot))

    return samples


def _once_a_rank(read: Callable[[Snapshot], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_first:
            yield from _one(read(view.snapshot))

    return samples


def _cache(read: Callable[[CacheCounts], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target and view.snapshot.cache is not None:
            yield from _one(read(view.snapshot.cache))

    return samples


def _pauses(view: RoleView) -> Iterator[Sample]:
    if view.is_target and view.snapshot.cache is not None:
        for how in PAUSES:
            yield Sample((how,), view.snapshot.cache.pauses.get(how, 0))


def _kv_bytes(view: RoleView) -> Iterator[Sample]:
    for pool in view.role.kv_pools or ():
        yield Sample((pool.pool,), pool.nbytes, pool.device)


def _kv_tokens(view: RoleView) -> Iterator[Sample]:
    for pool in view.role.kv_pools or ():
        if pool.tokens is not None:
            yield Sample((pool.pool,), pool.tokens, pool.device)


def _lora(attribute: Literal["nbytes", "adapters"]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for usage in view.role.lora:
            yield Sample((), getattr(usage, attribute), usage.device)

    return samples


def _regions(view: RoleView) -> Iterator[Sample]:
    if view.role.table is not None:
        yield from _by_device(view.role.table.regions)


def _fingerprint(view: RoleView) -> Iterator[Sample]:
    if view.role.table is not None and view.role.table.fingerprint:
        yield Sample((), as_number(view.role.table.fingerprint))


def _without_change(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES if view.role.fingerprints is not None else ():
        yield Sample((source,), view.role.updates.get(source, UpdateCounts()).without_change)


def _modified(view: RoleView) -> Iterator[Sample]:
    if view.role.fingerprints is not None:
        for during, kind in itertools.product(DURINGS, KINDS):
            counts = view.role.fingerprints.modified.get(during, {})
            yield Sample((during, kind), counts.get(kind, 0))


def _skipped(view: RoleView) -> Iterator[Sample]:
    if view.role.fingerprints is not None:
        for reason in SKIPS:
            yield Sample((reason,), view.role.fingerprints.skipped.get(reason, 0))


def _size(number: int | None) -> str:
    return "" if number is None else str(number)


def _info(view: RoleView) -> Iterator[Sample]:
    engine, role = view.snapshot.engine, view.role
    device = next((each for each in view.snapshot.devices if each.name == role.device), None)
    yield Sample(
        (
            engine.model_path,
            role.quantization,
            role.architecture,
            engine.sglang_version,
            engine.torch_version,
            "" if device is None else device.product,
            "" if device is None else device.pci_bus_id,
            _size(engine.tp_size),
            _size(engine.pp_size),
            _size(engine.ep_size),
            engine.group,
            _size(engine.node_rank),
            _size(engine.nodes),
        ),
        1,
    )


def _nodes(view: RoleView) -> Iterator[Sample]:
    engine = view.snapshot.engine
    if view.is_first and engine.group and (engine.nodes or 1) > 1:
        yield Sample((engine.group, _size(engine.node_rank)), engine.nodes or 1)


def _gpu(read: Callable[[GpuAccount], int]) -> HostReader:
    def samples(view: HostView) -> Iterator[Sample]:
        for account in view.gpus:
            yield Sample((account.gpu.uuid, str(account.gpu.index)), read(account))

    return samples


def _gpu_parts(view: HostView) -> Iterator[Sample]:
    for account in view.gpus:
        for part, nbytes in (account.parts or {}).items():
            yield Sample((account.gpu.uuid, str(account.gpu.index), part), nbytes)


def _memory(read: Callable[[DeviceMemory], int | None]) -> RoleReader:
    """Once a rank and device."""

    def samples(view: RoleView) -> Iterator[Sample]:
        for memory in view.snapshot.memory if view.is_first else ():
            value = read(memory)
            if value is not None:
                yield Sample((), value, memory.device)

    return samples


def _memory_parts(view: RoleView) -> Iterator[Sample]:
    for memory in view.snapshot.memory if view.is_first else ():
        for part, nbytes in (memory.parts or {}).items():
            yield Sample((part,), nbytes, memory.device)


def _growth(memory: DeviceMemory) -> int | None:
    if memory.before_update is None or memory.after_update is None:
        return None
    return memory.after_update - memory.before_update


def _process(read: Callable[[RankOnGpu], int | None]) -> HostReader:
    """Of a rank's process, from NVML."""

    def samples(view: HostView) -> Iterator[Sample]:
        for rank in ranks_on_gpus(view.gpus):
            value = read(rank)
            if value is not None and rank.snapshot.roles:
                role = RoleView(rank.snapshot, rank.snapshot.roles[0])
                yield Sample(identity(role, rank.memory.device), value)

    return samples


def _hooks(view: HostView) -> Iterator[Sample]:
    counts: dict[tuple[str, str], int] = {}
    for snapshot in view.snapshots:
        for hook in snapshot.hooks:
            key: tuple[str, str] = (hook.target, hook.status)
            counts[key] = counts.get(key, 0) + 1
    for key, count in counts.items():
        yield Sample(key, count)


def _dropped(view: HostView) -> Iterator[Sample]:
    for reason, count in view.spans.dropped.items():
        yield Sample((reason,), count)


INSTRUMENTS: tuple[Instrument, ...] = (
    Instrument(
        "sglang_weight_bytes",
        "gauge",
        "By",
        "Bytes of unique storages that hold weights; sum over kind and dtype for all of them.",
        ("kind", "dtype"),
        _weight_bytes,
    ),
    Instrument(
        "sglang_weight_tensors",
        "gauge",
        "{tensor}",
        "Named tensors; a tied tensor counts under each of its names.",
        ("kind", "dtype"),
        _weight_tensors,
    ),
    Instrument(
        "sglang_weight_resident_bytes",
        "gauge",
        "By",
        "Bytes of weights backed by physical memory now. While weights are released that is what "
        "lies outside of the memory saver's regions, and what is not on a GPU.",
        read_role=lambda view: _by_device(view.role.resident),
    ),
    Instrument(
        "sglang_weight_shared_bytes",
        "gauge",
        "By",
        "Bytes of weights that this model uses and that count elsewhere: a draft's at its target, "
        "mapped ones at the weight-cache daemon. Absent where there are none.",
        read_role=_shared,
    ),
    Instrument(
        "sglang_weight_regions",
        "gauge",
        "{region}",
        "Contiguous runs of weight memory, merged inside one allocation.",
        read_role=_regions,
    ),
    Instrument(
        "sglang_weight_loaded_timestamp_seconds",
        "gauge",
        "s",
        "When the first load ended, in Unix time.",
        read_role=lambda view: _one(view.role.loaded_at),
    ),
    Instrument(
        "sglang_weight_last_update_timestamp_seconds",
        "gauge",
        "s",
        "When weights last changed, the first load included, in Unix time.",
        read_role=lambda view: _one(view.role.updated_at),
    ),
    Instrument(
        "sglang_weight_last_update_start_timestamp_seconds",
        "gauge",
        "s",
        "When the last update that succeeded began, the first load included, in Unix time: the "
        "same moment on every rank that has it, but for their clocks.",
        read_role=lambda view: _one(view.role.update_started_at),
    ),
    Instrument(
        "sglang_weight_update_in_progress",
        "gauge",
        "{update}",
        "1 inside an update or update session, else 0.",
        read_role=lambda view: _one(float(view.role.in_progress is not None)),
    ),
    Instrument(
        "sglang_weight_updates",
        "counter",
        "{update}",
        "Logical updates that changed weights.",
        ("source",),
        _by_source(lambda counts: counts.updates, exemplar=True),
    ),
    Instrument(
        "sglang_weight_update_failures",
        "counter",
        "{update}",
        "Logical updates that failed, whether or not they changed weights.",
        ("source",),
        _by_source(lambda counts: counts.failures),
    ),
    Instrument(
        "sglang_weight_update_calls",
        "counter",
        "{call}",
        "Calls that wrote weights: one a bucket, several an update.",
        ("source",),
        _by_source(lambda counts: counts.calls),
    ),
    Instrument(
        "sglang_weight_update_duration_seconds",
        "histogram",
        "s",
        "Time of one logical update, from its first call to its last, with what follows that: the "
        "flush of the cache and the look at what has changed. Of sources that were used.",
        ("source",),
        _histograms,
    ),
    Instrument(
        "sglang_weight_update_phase_seconds",
        "counter",
        "s",
        "Where the time of updates went, which sums to their duration: nothing of the rank's own, "
        "because a call, a peer or a reader is awaited (wait); tensors that arrive (receive); "
        "weights that are read and written (load), unpacked or packed, quantized ones first of all "
        "(post_process); the cache (flush); this exporter's own look (capture). Of sources that "
        "were used.",
        ("source", "phase"),
        _phase_seconds,
    ),
    Instrument(
        "sglang_weight_update_phase_in_progress",
        "gauge",
        "",
        "What an update is about now; 1, and absent while there is none.",
        ("phase",),
        _phase_in_progress,
    ),
    Instrument(
        "sglang_weight_update_bytes",
        "counter",
        "By",
        "Bytes that updates brought: of tensors that were handed over, or of the files of a "
        "checkpoint. Of sources that were used and of whose bytes all are known.",
        ("source",),
        _update_bytes,
    ),
    Instrument(
        "sglang_weight_first_load_seconds",
        "gauge",
        "s",
        "Time of the first load.",
        read_role=lambda view: _one(view.role.load_seconds),
    ),
    Instrument(
        "sglang_weight_fingerprint",
        "gauge",
        "",
        "53 bits over every byte of the weights and their names, as a number: equal where the "
        "weights are. Absent where it is not taken or was skipped, and while released.",
        read_role=_fingerprint,
    ),
    Instrument(
        "sglang_weight_fingerprint_seconds",
        "gauge",
        "s",
        "How long the last fingerprint took.",
        read_role=lambda view: _one(
            None if view.role.table is None else view.role.table.fingerprint_seconds
        ),
    ),
    Instrument(
        "sglang_weight_fingerprint_skipped",
        "counter",
        "{fingerprint}",
        "Fingerprints that were not taken: memory is released (released), it would have taken too "
        "long (time_limit), a CUDA graph was being captured or a tensor cannot be read "
        "(unsupported), or it failed (error).",
        ("reason",),
        _skipped,
    ),
    Instrument(
        "sglang_weight_updates_without_change",
        "counter",
        "{update}",
        "Logical updates that succeeded and left every byte of the weights as it was.",
        ("source",),
        _without_change,
    ),
    Instrument(
        "sglang_weight_tensors_altered",
        "counter",
        "{tensor}",
        "Tensors found, at each look, with other bytes than the last load or update left: changed "
        "while serving, or not brought back after a release.",
        ("during", "kind"),
        _modified,
    ),
    Instrument(
        "sglang_weight_tensors_moved",
        "counter",
        "{tensor}",
        "Tensors whose address changed in an update; CUDA graphs keep the old one.",
        read_role=lambda view: _one(view.role.moved),
    ),
    Instrument(
        "sglang_weight_table_changes",
        "counter",
        "{tensor}",
        "Tensors that an update added, removed, resized or put on another device.",
        ("change",),
        _changes,
    ),
    Instrument(
        "sglang_weight_update_groups",
        "gauge",
        "{group}",
        "Process groups open for distributed updates.",
        read_role=_target_only(lambda snapshot: snapshot.update_groups),
    ),
    Instrument(
        "sglang_weight_operations",
        "counter",
        "{call}",
        "Calls that read, save, send or check weights, or change adapters or update groups.",
        ("operation",),
        _operations("calls"),
    ),
    Instrument(
        "sglang_weight_operation_failures",
        "counter",
        "{call}",
        "Such calls that failed.",
        ("operation",),
        _operations("failures"),
    ),
    Instrument(
        "sglang_weight_version",
        "gauge",
        "",
        "SGLang's weight version, where it is an integer of at most 2^53.",
        read_role=_version,
    ),
    Instrument(
        "sglang_weight_version_id",
        "gauge",
        "",
        "53 bits of the SHA-256 of SGLang's weight version, whatever its form: equal where the "
        "strings are equal. Once a rank; the string is in the update's span and in status.",
        read_role=_once_a_rank(_version_id),
    ),
    Instrument(
        "sglang_weight_info",
        "gauge",
        "",
        "Facts that hold while the process lives, for joining; always 1.",
        (
            "model_path",
            "quantization",
            "architecture",
            "sglang_version",
            "torch_version",
            "gpu_name",
            "pci_bus_id",
            "tp_size",
            "pp_size",
            "ep_size",
            "engine_group",
            "node_rank",
            "nodes",
        ),
        _info,
    ),
    Instrument(
        "sglang_weight_engine_nodes",
        "gauge",
        "{host}",
        "On how many hosts the engine runs, as it was started. Absent for engines on one.",
        ("engine_group", "node_rank"),
        _nodes,
    ),
    Instrument(
        "sglang_kv_pool_bytes",
        "gauge",
        "By",
        "Bytes of unique storages of the KV pools.",
        ("pool",),
        _kv_bytes,
    ),
    Instrument(
        "sglang_kv_pool_resident_bytes",
        "gauge",
        "By",
        "Bytes of KV pools backed by physical memory now; less what is released.",
        read_role=lambda view: _by_device(view.role.kv_resident),
    ),
    Instrument(
        "sglang_kv_pool_tokens",
        "gauge",
        "{token}",
        "Capacity of the KV pools in tokens.",
        ("pool",),
        _kv_tokens,
    ),
    Instrument(
        "sglang_kv_cache_flushes",
        "counter",
        "{flush}",
        "Flushes of the prefix cache.",
        read_role=_cache(lambda cache: cache.flushes),
    ),
    Instrument(
        "sglang_kv_cache_flush_failures",
        "counter",
        "{flush}",
        "Flushes that SGLang refused, because requests were running or queued.",
        read_role=_cache(lambda cache: cache.failures),
    ),
    Instrument(
        "sglang_kv_cache_flushed_timestamp_seconds",
        "gauge",
        "s",
        "When the prefix cache was last flushed, in Unix time. Absent before the first flush.",
        read_role=_cache(lambda cache: cache.flushed_at),
    ),
    Instrument(
        "sglang_kv_cache_stale",
        "gauge",
        "",
        "1 while the prefix cache holds tokens computed by weights that are gone, else 0. Absent "
        "where the cache could not be read.",
        read_role=_cache(lambda cache: None if cache.stale is None else float(cache.stale)),
    ),
    Instrument(
        "sglang_kv_cache_pauses",
        "counter",
        "{pause}",
        "Orders to pause generation, by what becomes of running requests: they keep their cache "
        "(in_place), are computed again (retract), or are all aborted (abort).",
        ("mode",),
        _pauses,
    ),
    Instrument(
        "sglang_kv_cache_paused",
        "gauge",
        "",
        "1 while generation is paused and its requests wait (in_place, retract), else 0.",
        read_role=_cache(lambda cache: float(cache.paused)),
    ),
    Instrument(
        "sglang_lora_pool_bytes",
        "gauge",
        "By",
        "Bytes of the preallocated LoRA adapter slots.",
        read_role=_lora("nbytes"),
    ),
    Instrument(
        "sglang_lora_adapters",
        "gauge",
        "{adapter}",
        "LoRA adapters that are loaded.",
        read_role=_lora("adapters"),
    ),
    Instrument(
        "sglang_gpu_memory_total_bytes",
        "gauge",
        "By",
        "Memory of the GPU, from NVML.",
        ("gpu_uuid", "gpu"),
        read_host=_gpu(lambda account: account.gpu.total_bytes),
    ),
    Instrument(
        "sglang_gpu_memory_used_bytes",
        "gauge",
        "By",
        "Memory of the GPU that is in use by anyone, from NVML.",
        ("gpu_uuid", "gpu"),
        read_host=_gpu(lambda account: account.gpu.used_bytes),
    ),
    Instrument(
        "sglang_gpu_memory_used_max_bytes",
        "gauge",
        "By",
        "The most of it that was in use within the last minute, looked at once a second.",
        ("gpu_uuid", "gpu"),
        read_host=_gpu(lambda account: account.most_used),
    ),
    Instrument(
        "sglang_gpu_memory_bytes",
        "gauge",
        "By",
        "The GPU's account: bytes by what holds them, which sum to its total. Absent while they "
        "do not, as in the middle of a release.",
        ("gpu_uuid", "gpu", "part"),
        read_host=_gpu_parts,
    ),
    Instrument(
        "sglang_rank_memory_bytes",
        "gauge",
        "By",
        "The rank's account of what torch's allocator has of the GPU, as of its last look: bytes "
        "with physical memory by what holds them, which sum to what is reserved and not released.",
        ("part",),
        _memory_parts,
    ),
    Instrument(
        "sglang_rank_memory_allocated_bytes",
        "gauge",
        "By",
        "Live blocks of torch's allocator at the last look.",
        read_role=_memory(lambda memory: memory.allocated),
    ),
    Instrument(
        "sglang_rank_memory_allocated_peak_bytes",
        "gauge",
        "By",
        "The most of them since the process started, or since somebody reset torch's peak.",
        read_role=_memory(lambda memory: memory.allocated_peak),
    ),
    Instrument(
        "sglang_rank_memory_reserved_bytes",
        "gauge",
        "By",
        "Segments of torch's allocator at the last look, released ones included.",
        read_role=_memory(lambda memory: memory.reserved),
    ),
    Instrument(
        "sglang_rank_memory_reserved_peak_bytes",
        "gauge",
        "By",
        "The most of them since the process started, or since somebody reset torch's peak.",
        read_role=_memory(lambda memory: memory.reserved_peak),
    ),
    Instrument(
        "sglang_rank_memory_released_bytes",
        "gauge",
        "By",
        "Segments whose physical memory the memory saver has given back for now.",
        read_role=_memory(lambda memory: None if memory.parts is None else memory.released),
    ),
    Instrument(
        "sglang_rank_memory_after_release_bytes",
        "gauge",
        "By",
        "What torch's allocator kept of the GPU in the last release. Absent before the first.",
        read_role=_memory(lambda memory: memory.after_release),
    ),
    Instrument(
        "sglang_rank_memory_update_growth_bytes",
        "gauge",
        "By",
        "By how much the last update has changed what torch's allocator has reserved. Absent "
        "before the first.",
        read_role=_memory(_growth),
    ),
    Instrument(
        "sglang_rank_memory_process_bytes",
        "gauge",
        "By",
        "Memory of the GPU that the rank's process has now, from NVML. Absent where it cannot be "
        "told which of NVML's processes it is.",
        IDENTITY,
        read_host=_process(lambda rank: rank.used),
    ),
    Instrument(
        "sglang_rank_memory_process_max_bytes",
        "gauge",
        "By",
        "The most of it within the last minute, looked at once a second.",
        IDENTITY,
        read_host=_process(lambda rank: rank.most_used),
    ),
    Instrument(
        "sglang_rank_memory_outside_torch_bytes",
        "gauge",
        "By",
        "What it has of it beside torch's allocator: CUDA context, kernels, graphs, communicators.",
        IDENTITY,
        read_host=_process(lambda rank: rank.outside_torch),
    ),
    Instrument(
        "sglang_weight_exporter_build_info",
        "gauge",
        "",
        "Version of this exporter; always 1. simulated: whether its ranks are made up.",
        ("version", "simulated"),
        read_host=lambda view: [Sample((__version__, str(view.simulated).lower()), 1)],
    ),
    Instrument(
        "sglang_weight_exporter_ranks",
        "gauge",
        "{rank}",
        "Ranks of this host that are alive and have published a snapshot.",
        read_host=lambda view: _one(len(view.snapshots)),
    ),
    Instrument(
        "sglang_weight_exporter_hooks",
        "gauge",
        "{rank}",
        "Ranks by state of each hook: installed, pending, absent (this SGLang has no such "
        "function) or failed (it should have it).",
        ("target", "state"),
        read_host=_hooks,
    ),
    Instrument(
        "sglang_weight_exporter_hook_errors",
        "counter",
        "{error}",
        "Exceptions of ours that were caught inside the engine.",
        read_role=_once_a_rank(lambda snapshot: sum(snapshot.hook_errors.values())),
        of_rank=True,
    ),
    Instrument(
        "sglang_weight_exporter_snapshot_seconds",
        "gauge",
        "s",
        "Time that the engine last spent on reading its weights and pools.",
        read_role=_once_a_rank(lambda snapshot: snapshot.snapshot_seconds),
        of_rank=True,
    ),
    Instrument(
        "sglang_weight_exporter_read_errors",
        "counter",
        "{error}",
        "Files of ranks that this exporter could not read.",
        read_host=lambda view: _one(view.unreadable),
    ),
    Instrument(
        "sglang_weight_exporter_scrape_duration_seconds",
        "gauge",
        "s",
        "What the scrape before this one took: reading what ranks have written, NVML, and making "
        "the text. Absent in the first.",
        read_host=lambda view: [] if view.scrape_seconds is None else _one(view.scrape_seconds),
    ),
    Instrument(
        "sglang_weight_exporter_spans_exported",
        "counter",
        "{span}",
        "Spans of loads and updates that the collector has acknowledged.",
        read_host=lambda view: _one(view.spans.exported),
    ),
    Instrument(
        "sglang_weight_exporter_spans_waiting",
        "gauge",
        "{span}",
        "Loads and updates whose span the collector has not acknowledged yet.",
        read_host=lambda view: _one(view.spans.waiting),
    ),
    Instrument(
        "sglang_weight_exporter_spans_dropped",
        "counter",
        "{span}",
        "Loads and updates whose span was given up: too many waited (queue_full), the collector "
        "took others and not this one (refused), or its file is damaged (unreadable).",
        ("reason",),
        read_host=_dropped,
    ),
    Instrument(
        "sglang_weight_exporter_span_failures",
        "counter",
        "{try}",
        "Tries at sending a span that the collector did not acknowledge.",
        read_host=lambda view: _one(view.spans.failures),
    ),
)
