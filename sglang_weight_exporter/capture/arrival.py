# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When a device has done what a call has put into its stream, asked without waiting.

NCCL is asynchronous: a call that broadcasts weights and copies them returns when all of that is
queued, and a sender that is late is waited for by the device alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Arrival:
    """Two events of the current stream, around a call. Host and device are compared once, when it
    begins."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended = torch.cuda.Event(enable_timing=True, blocking=True)
        self._began_at = clock()
        self._began.record()
        self._returned_at: float | None = None

    def end(self) -> None:
        """The call has returned."""
        self._ended.record()
        self._returned_at = self._clock()

    def at(self) -> float | None:
        """When its work was done; ``None``: it is not yet."""
        if self._returned_at is None or not self._ended.query():
            return None
        done_at: float = self._began_at + self._began.elapsed_time(self._ended) / 1e3
        return min(max(done_at, self._returned_at), self._clock())

    def wait(self) -> None:
        """Other threads run meanwhile."""
        self._ended.synchronize()


def arrival(clock: Callable[[], float]) -> Arrival | None:
    """Of a call that begins now; ``None`` where no GPU is in use or a graph is being captured."""
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return None
    return Arrival(clock)


def asked_so_far() -> torch.cuda.Event | None:
    """The end of all that the current stream was asked for until now; ``None`` as above."""
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return None
    end = torch.cuda.Event(blocking=True)
    end.record()
    return end
