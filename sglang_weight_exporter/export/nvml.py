# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Memory of this host's GPUs, as the driver counts it (NVML)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("sglang_weight_exporter")

#: Between two readings, and how old one may be until it is no longer true.
READ_SECONDS, DEADLINE_SECONDS = 1.0, 5.0


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
    #: where the driver does not say.
    processes: dict[int, int] | None = None
    #: Whether it had other bytes in use when its processes had been read than before.
    changing: bool = False


#: So much may come and go while a GPU is read.
_UNCHANGED_BYTES = 16 * 2**20


class Nvml:
    """Reads all GPUs, and takes hold of the driver anew after a failure. May block for as long as
    the driver does."""

    def __init__(self) -> None:
        self._nvml: Any = None
        #: Why the last reading has no GPU; empty where it could be had.
        self.problem = ""

    def read(self) -> list[GpuMemory]:
        """Every GPU that answers. One that fell off the bus is left out. Never raises."""
        try:
            if self._nvml is None:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
            found = self._gpus()
        except Exception as error:  # No driver, no GPU, or one in trouble.
            self.problem = f"{type(error).__name__}: {_text(error)}"
            if self._nvml is not None:
                with contextlib.suppress(Exception):
                    self._nvml.nvmlShutdown()
            self._nvml = None
            return []
        self.problem = ""
        return found

    def _gpus(self) -> list[GpuMemory]:
        nvml = self._nvml
        found: list[GpuMemory] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            # pynvml raises more than its own errors: UnicodeDecodeError, TypeError, AttributeError.
            with contextlib.suppress(Exception):
                gpu = nvml.nvmlDeviceGetHandleByIndex(index)
                bus = _text(nvml.nvmlDeviceGetPciInfo(gpu).busId)
                for handle in (gpu, *self._mig_instances(gpu)):
                    memory = self._memory(handle)
                    processes = self._processes(handle)
                    grown = int(self._memory(handle).used) - int(memory.used)
                    found.append(
                        GpuMemory(
                            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                            index=index,
                            product=self._product(handle),
                            pci_bus_id=bus,
                            total_bytes=int(memory.total),
                            used_bytes=int(memory.used),
                            reserved_bytes=getattr(memory, "reserved", None),
                            processes=processes,
                            changing=abs(grown) > _UNCHANGED_BYTES,
                        )
                    )
        return found

    def _product(self, handle: Any) -> str:
        try:
            return _text(self._nvml.nvmlDeviceGetName(handle))
        except Exception:  # No UTF-8, which pynvml insists on.
            return ""

    def _memory(self, handle: Any) -> Any:
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        except Exception:
            return nvml.nvmlDeviceGetMemoryInfo(handle)

    def _processes(self, handle: Any) -> dict[int, int] | None:
        nvml = self._nvml
        found: dict[int, int] = {}
        try:
            for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if each.usedGpuMemory is None:
                    return None  # As under Windows' driver model, or without permission.
                found[int(each.pid)] = int(each.usedGpuMemory)
        except Exception:
            return None
        return found

    def _mig_instances(self, gpu: Any) -> Iterator[Any]:
        nvml = self._nvml
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(gpu)
            count = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if mode else 0
        except Exception:
            return
        for index in range(count):
            with contextlib.suppress(Exception):
                yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class GpuWatch:
    """Reads the GPUs once a second in a thread of its own, which a driver that hangs keeps, and
    nobody else.

    ``clock``: seconds that never go back.
    """

    def __init__(self, nvml: Nvml, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        #: The last reading, and when it ended.
        self._seen: tuple[float, list[GpuMemory], str] = (clock(), [], "")
        self._first = threading.Event()
        self._saying = threading.Lock()
        self._said = False

    def start(self, seconds: float) -> None:
        """Begin, and wait for the first reading for at most this long."""
        threading.Thread(target=self._run, name="nvml", daemon=True).start()
        self._first.wait(seconds)
        self.read()  # Which says what is wrong, before anything is served.

    def read(self) -> list[GpuMemory]:
        """The last reading; none where that is too long ago."""
        at, gpus, problem = self._seen
        late = self._clock() - at > DEADLINE_SECONDS
        self._say(f"NVML has not answered for {DEADLINE_SECONDS:g} seconds" if late else problem)
        return [] if late else gpus

    def _run(self) -> None:
        while True:
            gpus = self._nvml.read()
            self._seen = (self._clock(), gpus, self._nvml.problem)
            self._first.set()
            time.sleep(READ_SECONDS)

    def _say(self, problem: str) -> None:
        with self._saying:
            if problem and not self._said:
                logger.info(
                    "There are no metrics of GPUs (%s). They come with the first answer of NVML.",
                    problem,
                )
            elif self._said and not problem and self._first.is_set():
                logger.info("NVML answers again; metrics of GPUs are served.")
            self._said = bool(problem)
