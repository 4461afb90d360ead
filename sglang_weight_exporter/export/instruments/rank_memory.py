# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of each rank: of torch's allocator, and of its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_weight_exporter.export.gpu_account import RankOnGpu, ranks_on_gpus
from sglang_weight_exporter.export.instruments.base import (
    HostReader,
    Instrument,
    RoleReader,
    Sample,
    once_a_rank,
)
from sglang_weight_exporter.export.views import IDENTITY, HostView, RoleView, identity
from sglang_weight_exporter.records.memory import DeviceMemory


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


def _memory_parts_in_use(view: RoleView) -> Iterator[Sample]:
    """Without those that most models never have."""
    for sample in _memory_parts(view):
        if sample.value or sample.labels[0] not in {"derived_weights", "lora"}:
            yield sample


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


INSTRUMENTS = (
    Instrument(
        "sglang_rank_memory_bytes",
        "gauge",
        "By",
        "The rank's account of what torch's allocator has of the GPU, as of its last capture: "
        "bytes with physical memory by what holds them, which sum to what is reserved and not "
        "released.",
        ("part",),
        _memory_parts,
        lean_role=_memory_parts_in_use,
    ),
    Instrument(
        "sglang_rank_memory_allocated_bytes",
        "gauge",
        "By",
        "Live blocks of torch's allocator at the last capture.",
        read_role=_memory(lambda memory: memory.allocated),
        preset="full",
    ),
    Instrument(
        "sglang_rank_memory_allocated_peak_bytes",
        "gauge",
        "By",
        "The most of them since the process started, or since somebody reset torch's peak.",
        read_role=_memory(lambda memory: memory.allocated_peak),
        preset="full",
    ),
    Instrument(
        "sglang_rank_memory_reserved_bytes",
        "gauge",
        "By",
        "Segments of torch's allocator at the last capture, released ones included.",
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
        preset="full",
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
        "sglang_rank_memory_update_peak_bytes",
        "gauge",
        "By",
        "The most that an update was seen to need beyond what torch's allocator had reserved when "
        "it began. Absent before the first.",
        read_role=_memory(lambda memory: memory.update_peak),
        preset="full",
    ),
    Instrument(
        "sglang_rank_out_of_memory",
        "counter",
        "{error}",
        "CUDA out-of-memory errors that torch has raised in the rank's process, also those that "
        "somebody caught. Absent where torch does not report them: without a GPU, and with "
        "cudaMallocAsync.",
        read_role=once_a_rank(lambda snapshot: snapshot.out_of_memory),
        preset="full",
    ),
    Instrument(
        "sglang_rank_memory_process_bytes",
        "gauge",
        "By",
        "Memory of the GPU that the rank's process has now, from NVML. Absent where it is not "
        "known which of NVML's processes it is.",
        IDENTITY,
        read_host=_process(lambda rank: rank.used),
        preset="full",
    ),
    Instrument(
        "sglang_rank_memory_process_max_bytes",
        "gauge",
        "By",
        "The most of it within the last minute, read once a second.",
        IDENTITY,
        read_host=_process(lambda rank: rank.most_used),
        preset="full",
    ),
    Instrument(
        "sglang_rank_memory_outside_torch_bytes",
        "gauge",
        "By",
        "What it has of it beside torch's allocator: CUDA context, kernels, graphs, communicators.",
        IDENTITY,
        read_host=_process(lambda rank: rank.outside_torch),
    ),
)
