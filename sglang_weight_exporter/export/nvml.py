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

from sglang_weight_exporter.export.guard import Guard

logger = logging.getLogger("sglang_weight_exporter")

#: Between two readings, and how old one may be until it is no longer true.
READ_SECONDS, DEADLINE_SECONDS = 1.0, 5.0


@dataclass(frozen=True)
class GpuMemory:
    """One GPU, or one MIG instance of one. ``None``: the driver does not say it."""

    uuid: str
    #: NVML's index of the GPU, as nvidia-smi and dcgm-exporter have it.
    index: int
    #: ``None`` where the GPU's memory is the host's (GB10).
    total_bytes: int | None
    #: Without what the driver reserves for itself, as nvidia-smi shows it.
    used_bytes: int | None
    #: What the driver reserves for itself; ``None`` where it is part of ``used_bytes``.
    reserved_bytes: int | None = None
    #: Process id, as the host counts, → bytes, of every process that has memory here.
    processes: dict[int, int] | None = None
    #: Whether it had other bytes in use when its processes had been read than before.
    changing: bool = False
    #: When it was read, in seconds since the epoch; ``None``: just now.
    read_at: float | None = None


#: So much may come and go while a GPU is read.
_UNCHANGED_BYTES = 16 * 2**20

#: Answers of a sound driver that does not say this of this GPU, to this user or in its version:
#: NVML_ERROR_NOT_SUPPORTED, _NO_PERMISSION and _FUNCTION_NOT_FOUND.
_NOT_SAID = {3, 4, 13}

#: NVML_ERROR_NOT_FOUND: of a MIG instance's number that no instance has.
_NOT_FOUND = 6


class Nvml:
    """Reads all GPUs, and takes hold of the driver anew after a failure. May block for as long as
    the driver does.

    ``guard``: counts what goes wrong with one GPU, and logs it once; ``clock``: that of the ranks.
    """

    def __init__(self, guard: Guard, clock: Callable[[], float] = time.time) -> None:
        self._guard = guard
        self._clock = clock
        self._nvml: Any = None
        self._logged: set[str] = set()
        #: Why the last reading has no GPU; empty where it could be had.
        self.problem = ""

    def read(self) -> list[GpuMemory]:
        """Every GPU that answers; of a GPU with MIG instances, these. One that fell off the bus is
        left out. Never raises."""
        try:
            if self._nvml is None:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
            count = self._nvml.nvmlDeviceGetCount()
        except Exception as error:  # No driver, no GPU, or one in trouble: who reads us says it.
            self.problem = f"{type(error).__name__}: {_text(error)}"
            self._let_go()
            return []
        self.problem = ""
        found: list[GpuMemory] = []
        for index in range(count):
            with self._step(f"Reading GPU {index} by NVML"):
                for handle in self._handles(index):
                    with self._step(f"Reading a MIG instance of GPU {index} by NVML"):
                        found.append(self._gpu(handle, index))
        if not found:
            self._let_go()
        return found

    def _let_go(self) -> None:
        """The next reading begins anew."""
        if self._nvml is not None:
            # It fails where the driver has failed, of which was said what there is to say.
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()
        self._nvml = None

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        """Around what goes wrong alone. What a sound driver does not say is no error, and is said
        once. pynvml raises more than its own errors: UnicodeDecodeError, TypeError."""
        with self._guard.step(what, traceback=False):
            try:
                yield
            except self._nvml.NVMLError as error:
                if error.value not in _NOT_SAID:
                    raise
                if what not in self._logged:
                    self._logged.add(what)
                    logger.info("%s: the driver does not say it (%s).", what, _text(error))

    def _gpu(self, handle: Any, index: int) -> GpuMemory:
        uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
        memory = processes = None
        read_at = self._clock()
        with self._step(f"The memory of {uuid}"):
            memory = self._memory(handle)
        with self._step(f"Processes that have memory of {uuid}"):
            processes = self._processes(handle)
        if memory is None:
            return GpuMemory(uuid, index, None, None, processes=processes)
        grown = int(self._memory(handle).used) - int(memory.used)
        return GpuMemory(
            uuid=uuid,
            index=index,
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            reserved_bytes=getattr(memory, "reserved", None),
            processes=processes,
            changing=abs(grown) > _UNCHANGED_BYTES,
            read_at=read_at,
        )

    def _memory(self, handle: Any) -> Any:
        nvml = self._nvml
        # An older driver and an older pynvml have no second version, each with an error of its own.
        # If something else is wrong, the call of the first version fails too.
        with contextlib.suppress(Exception):
            return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return nvml.nvmlDeviceGetMemoryInfo(handle)

    def _processes(self, handle: Any) -> dict[int, int] | None:
        found: dict[int, int] = {}
        for each in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if each.usedGpuMemory is None:
                return None  # As under Windows' driver model, or without permission.
            found[int(each.pid)] = int(each.usedGpuMemory)
        return found

    def _handles(self, index: int) -> list[Any]:
        """The GPU, or its MIG instances where it has any: then nobody can use it but by them."""
        nvml = self._nvml
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        instances = []
        for number in range(self._most_instances(gpu)):
            try:
                instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number))
            except nvml.NVMLError as error:
                if error.value != _NOT_FOUND:
                    raise
        return instances or [gpu]

    def _most_instances(self, gpu: Any) -> int:
        nvml = self._nvml
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(gpu)
            return int(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)) if mode else 0
        except nvml.NVMLError as error:
            if error.value not in _NOT_SAID:
                raise
            return 0  # Most kinds of GPUs have no such mode.


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
        self._logging = threading.Lock()
        self._logged = False

    def start(self, seconds: float) -> None:
        """Begin, and wait for the first reading for at most this long."""
        threading.Thread(target=self._run, name="nvml", daemon=True).start()
        self._first.wait(seconds)
        self.read()  # Which says what is wrong, before anything is served.

    def read(self) -> list[GpuMemory]:
        """The last reading; none where that is too long ago."""
        at, gpus, problem = self._seen
        late = self._clock() - at > DEADLINE_SECONDS
        self._log(f"NVML has not answered for {DEADLINE_SECONDS:g} seconds" if late else problem)
        return [] if late else gpus

    def _run(self) -> None:
        while True:
            gpus = self._nvml.read()
            self._seen = (self._clock(), gpus, self._nvml.problem)
            self._first.set()
            time.sleep(READ_SECONDS)

    def _log(self, problem: str) -> None:
        with self._logging:
            if problem and not self._logged:
                logger.info(
                    "There are no metrics of GPUs (%s). They come with the first answer of NVML.",
                    problem,
                )
            elif self._logged and not problem and self._first.is_set():
                logger.info("NVML answers again; metrics of GPUs are served.")
            self._logged = bool(problem)
