# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""torch's own observer of CUDA out-of-memory errors.

torch calls it once for each ``OutOfMemoryError`` that it is about to raise: after it has given back
all that it had cached and has tried again, without its lock on the allocator, and with the GIL. An
allocation that succeeds at the second try is no error and not reported
(``DeviceCachingAllocator::malloc``). What CUDA refuses to others (NCCL, the memory saver, a pool of
SGLang's own in virtual memory) torch does not know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class OutOfMemoryObserver:
    """Attached once, and for as long as the process lives: torch has no way to take it off.

    ``notify``: takes the GPU's index, what torch asked CUDA for, what the process may have, and
    what is free. While it runs, and what it raises, is nobody's: an exception here would be raised
    in the place of torch's. ``count`` is called for every error, ``report`` with exceptions of
    ours.
    """

    def __init__(
        self,
        notify: Callable[[int, int, int, int], None],
        *,
        count: Callable[[], None],
        report: Callable[[str, BaseException], None],
    ) -> None:
        self._notify = notify
        self._count = count
        self._report = report
        self._busy = threading.Lock()
        self.attached = False
        self._tried = False

    def attach(self) -> bool:
        """Once torch has started CUDA by itself; whether it is attached now."""
        if not self._tried and torch.cuda.is_initialized():
            self._tried = True
            attach: Any = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
            if attach is not None:
                try:
                    attach(self)
                    self.attached = True
                except RuntimeError:
                    return False  # cudaMallocAsync has none.
        return self.attached

    def __call__(self, device: int, requested: int, limit: int, free: int) -> None:
        try:
            self._count()
            if self._busy.acquire(blocking=False):
                try:
                    self._notify(device, requested, limit, free)
                finally:
                    self._busy.release()
        except Exception as error:
            self._report("out_of_memory", error)
