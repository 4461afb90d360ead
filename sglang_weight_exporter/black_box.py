# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank leaves for the time after it, written while it still can.

SGLang's scheduler or torch waits meanwhile with an error in hand: what is not known at once is left
out, nothing is asked of the device, and no lock is waited for that somebody could keep.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable
from types import TracebackType

import msgspec

from sglang_weight_exporter.capture.out_of_memory import OutOfMemoryObserver
from sglang_weight_exporter.ledger import Ledger
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.rank_records import RankRecords
from sglang_weight_exporter.records.black_box import (
    KEPT_ERRORS,
    BlackBox,
    Crash,
    Doing,
    OutOfMemory,
    Segment,
)
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.runners.roles import Roles

logger = logging.getLogger("sglang_weight_exporter")

#: Between two out-of-memory errors that are looked into, and between two of which a span is sent.
#: All are counted.
SECONDS_BETWEEN = 1.0
SECONDS_BETWEEN_SPANS = 60.0

#: Of an exception's text, and of its frames.
MESSAGE_CHARACTERS = 4000
FRAMES = 10


_MORE = "`sglang-weight-exporter status --last` says more."


class BlackBoxRecorder:
    """Keeps one rank's black box. ``report``: takes an exception of ours."""

    def __init__(
        self,
        *,
        roles: Roles,
        ledger: Ledger,
        inspector: ModelRunnerInspector,
        records: RankRecords,
        publisher: Publisher,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roles = roles
        self._ledger = ledger
        self._inspector = inspector
        self._records = records
        self._publisher = publisher
        self._report = report
        self._clock = clock
        self._elapsed = elapsed
        self._observer = OutOfMemoryObserver(
            self._record_out_of_memory,
            count=ledger.counters.count_out_of_memory,
            report=report,
        )
        self._errors: list[OutOfMemory] = []
        self._segments: tuple[Segment, ...] = ()
        self._crash: Crash | None = None
        self._crashed_by: Exception | None = None
        self._number = 0
        self._written_at = self._queued_at = float("-inf")

    def watch(self) -> None:
        """Have torch report out-of-memory errors, if it has started CUDA."""
        if not self._observer.attached and self._observer.attach():
            self._ledger.counters.watch_out_of_memory()

    def record_crash(self, error: BaseException | None) -> str | None:
        """An exception is about to end the scheduler; its kind and text, for what it ends too.
        ``None``: it is none, or is known."""
        if not isinstance(error, Exception) or error is self._crashed_by:
            return None
        self._crashed_by = error
        self._crash = Crash(
            at=self._clock(),
            error=type(error).__name__,
            message=_text(error),
            where=_frames(error.__traceback__),
            doing=self._doing(),
        )
        if self._leave((), self._crash):
            doing = str(self._crash.doing)
            logger.error(
                "sglang_weight_exporter: %s ends the scheduler%s. %s",
                self._crash.error,
                f" in the middle of {doing}" if doing else "",
                _MORE,
            )
        return f"{self._crash.error}: {self._crash.message}"

    def _record_out_of_memory(self, device: int, requested: int, limit: int, free: int) -> None:
        began = self._elapsed()
        if began - self._written_at < SECONDS_BETWEEN:
            return
        error, self._segments = self._inspector.describe_out_of_memory(
            device=device, requested=requested, limit=limit, free=free
        )
        error = msgspec.structs.replace(
            error, doing=self._doing(), seconds=max(0.0, self._elapsed() - began)
        )
        self._errors.append(error)
        if len(self._errors) > KEPT_ERRORS:
            del self._errors[1]
        spans = began - self._queued_at >= SECONDS_BETWEEN_SPANS
        written = self._leave((error,) if spans else (), None)
        self._written_at = self._elapsed()
        if spans and written:
            self._queued_at = began
            logger.warning("sglang_weight_exporter: %s %s", error, _MORE)

    def _leave(self, errors: tuple[OutOfMemory, ...], crash: Crash | None) -> bool:
        """Write the file, and queue a span of what is new; whether it could be written."""
        if not self._roles.engine.instance:
            return False  # It is not known yet whose it would be.
        box = BlackBox(
            rank_id="",
            pid=os.getpid(),
            engine=self._roles.engine,
            ranks=self._roles.ranks,
            count=self._ledger.counters.out_of_memory or 0,
            errors=tuple(self._errors),
            crash=self._crash,
            owners=self._inspector.pool_owners(),
            segments=self._segments,
        )
        event = None
        if errors or crash is not None:
            self._number += 1
            event = msgspec.structs.replace(
                box, number=self._number, errors=errors, crash=crash, owners=(), segments=()
            )
        return self._publisher.leave_black_box(box, event, self._records.progress())

    def _doing(self) -> Doing:
        return Doing(
            updates={name: each.in_progress for name, each in self._ledger.progress().items()},
            operations=self._ledger.counters.running,
        )


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MESSAGE_CHARACTERS]
    except Exception:  # SGLang's or a library's own `__str__`; its class and frames are kept.
        return ""


def _frames(innermost: TracebackType | None) -> tuple[str, ...]:
    """Without the lines of code, which would be read from files."""
    frames = [
        f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(innermost)
    ]
    return tuple(frames[-FRAMES:])
