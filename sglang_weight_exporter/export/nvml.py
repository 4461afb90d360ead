# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of this host's GPUs, as the driver counts it (NVML)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuMemory:
    """One GPU, or one MIG instance of one."""

    uuid: str
    #: NVML's index of the GPU, as nvidia-smi and dcgm-exporter have it.
    index: int
    product: str
    pci_bus_id: str
    total_bytes: int
    #: Without what the driver reserves for itself, as nvidia-smi shows it.
    used_bytes: int
    #: What the driver reserves for itself; ``None`` where it is part of ``used_bytes``.
    reserved_bytes: int | None = None
    #: Process id, as the host counts, → bytes, of every process that has memory here. ``None``
    #: where the driver does not tell.
    processes: dict[int, int] | None = None


class Nvml:
    """Reads all GPUs; empty where there is no NVIDIA driver."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except Exception:
            return  # No driver, no GPU: what could not be read is absent.

    def read(self) -> list[GpuMemory]:
        """Every GPU that answers. One that fell off the bus is left out."""
        nvml = self._nvml
        if nvml is None:
            return []
        found: list[GpuMemory] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpu = nvml.nvmlDeviceGetHandleByIndex(index)
                bus = _text(nvml.nvmlDeviceGetPciInfo(gpu).busId)
                for handle in (gpu, *self._mig_instances(gpu)):
                    memory = self._memory(handle)
                    found.append(
                        GpuMemory(
                            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                            index=index,
                            product=_text(nvml.nvmlDeviceGetName(handle)),
                            pci_bus_id=bus,
                            total_bytes=int(memory.total),
                            used_bytes=int(memory.used),
                            reserved_bytes=getattr(memory, "reserved", None),
                            processes=self._processes(handle),
                        )
                    )
            except nvml.NVMLError:
                continue
        return found

    def _memory(self, handle: Any) -> Any:
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        except (AttributeError, nvml.NVMLError):
            return nvml.nvmlDeviceGetMemoryInfo(handle)

    def _processes(self, handle: Any) -> dict[int, int] | None:
        nvml = self._nvml
        found: dict[int, int] = {}
        try:
            for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if each.usedGpuMemory is None:
                    return None  # As under Windows' driver model, or without permission.
                found[int(each.pid)] = int(each.usedGpuMemory)
        except nvml.NVMLError:
            return None
        return found

    def _mig_instances(self, gpu: Any) -> Iterator[Any]:
        nvml = self._nvml
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(gpu)
            count = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if mode else 0
        except nvml.NVMLError:
            return
        for index in range(count):
            try:
                yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            except nvml.NVMLError:
                continue


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
