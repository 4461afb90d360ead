# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of the GPUs that ranks use, by what holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_weight_exporter.export.gpu_account import GPU_PARTS, GpuAccount
from sglang_weight_exporter.export.instruments.base import HostReader, Instrument, Sample, not_zero
from sglang_weight_exporter.export.views import HostView


def _gpu(read: Callable[[GpuAccount], int | None]) -> HostReader:
    def samples(view: HostView) -> Iterator[Sample]:
        for account in view.gpus:
            value = read(account)
            if value is not None:
                yield Sample((account.gpu.uuid, str(account.gpu.index)), value)

    return samples


def _gpu_parts(parts: tuple[str, ...]) -> HostReader:
    """Of these parts; what torch has in each rank is the rank's own account as well."""

    def samples(view: HostView) -> Iterator[Sample]:
        for account in view.gpus:
            for part, nbytes in (account.parts or {}).items():
                if part in parts:
                    yield Sample((account.gpu.uuid, str(account.gpu.index), part), nbytes)

    return samples


INSTRUMENTS = (
    Instrument(
        "sglang_gpu_memory_total_bytes",
        "gauge",
        "By",
        "Memory of a GPU that a rank of this exporter uses, from NVML.",
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
        "The most of it that was in use within the last minute, read once a second.",
        ("gpu_uuid", "gpu"),
        read_host=_gpu(lambda account: account.most_used),
    ),
    Instrument(
        "sglang_gpu_memory_resume_bytes",
        "gauge",
        "By",
        "What ranks will take of the GPU when they resume: weights, KV pool and graphs whose "
        "memory they have released. Absent where it is not known of one of them; in lean and "
        "default also while it is nothing.",
        ("gpu_uuid", "gpu"),
        read_host=_gpu(lambda account: account.resume),
        lean_host=not_zero(_gpu(lambda account: account.resume)),
    ),
    Instrument(
        "sglang_gpu_memory_bytes",
        "gauge",
        "By",
        "The GPU's account: bytes by what holds them, which sum to its total. Absent while they "
        "do not, as in the middle of a release. In lean and default only what is other processes'.",
        ("gpu_uuid", "gpu", "part"),
        read_host=_gpu_parts(GPU_PARTS),
        lean_host=not_zero(_gpu_parts(("other_processes",))),
    ),
)
