# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One signal's connection to a collector: made when it is needed, made anew after a failure.

What the collector answers decides: a message counts as taken when its answer is one of OTLP's, and
what it says that it dropped of it (OTLP's partial success) is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

logger = logging.getLogger("sglang_weight_exporter")

#: An ``ExportTraceServiceRequest`` or an ``ExportMetricsServiceRequest``.
Request: TypeAlias = Any

#: A collector that asks to be left alone is, for at most this long.
LONGEST_WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class ExportResult:
    """What a collector said to a message."""

    taken: bool
    #: Why it was not taken, or what the collector remarks though it was.
    reason: str = ""
    #: How many spans or data points of a message that was taken it dropped.
    rejected: int = 0
    #: In how many seconds it wants to be asked again; 0: it did not say.
    retry_after: float = 0.0


def partial_success(response: Any) -> ExportResult:
    """The answer of a collector that took a message, perhaps without some of what is in it."""
    partial = response.partial_success
    rejected = getattr(partial, "rejected_spans", 0) or getattr(partial, "rejected_data_points", 0)
    return ExportResult(True, partial.error_message, rejected=max(0, rejected))


class Transport(Protocol):
    """A way to a collector."""

    def send(self, request: Request) -> ExportResult:
        """Send a message. Blocks for as long as ``OTEL_EXPORTER_OTLP_TIMEOUT``; may raise."""

    def close(self) -> None:
        """Give the connection up, and a try that is under way in another thread."""


class OtlpClient:
    """Where one signal goes.

    ``connect`` reads certificates; what it raises counts as a failure, so that a file that appears
    later is found.
    """

    def __init__(
        self,
        connect: Callable[[], Transport],
        *,
        signal: str,
        destination: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.destination = destination
        self.signal = signal
        #: Whether it did not take what it was sent last.
        self.failing = False
        self._connect = connect
        self._clock = clock
        self._connection: Transport | None = None
        self._not_before = 0.0
        self._remark = ""

    @property
    def wait_seconds(self) -> float:
        """For how long it wants to be left alone (``Retry-After``)."""
        return max(0.0, self._not_before - self._clock())

    def take(self, request: Request) -> ExportResult:
        """What the collector answers to a message. Blocks for as long as
        ``OTEL_EXPORTER_OTLP_TIMEOUT``; never raises."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            answer = self._connection.send(request)
        except Exception as error:
            answer = ExportResult(False, f"{type(error).__name__}: {error}")
        self._not_before = self._clock() + min(answer.retry_after, LONGEST_WAIT_SECONDS)
        if not answer.taken:
            # Anew, because certificates may have changed and gRPC waits long to connect again.
            self.close()
        self._say(answer)
        self.failing = not answer.taken
        return answer

    def _say(self, answer: ExportResult) -> None:
        """One line when it stops taking what it is sent, one when it takes it again, and one for
        each new remark."""
        reason = answer.reason.rstrip(".") or "without a reason"
        if answer.taken and self.failing:
            logger.info("The collector at %s takes %s again.", self.destination, self.signal)
        elif not answer.taken and not self.failing:
            logger.warning(
                "The collector at %s does not take %s (%s). It is asked again, at most half a "
                "minute apart%s.",
                self.destination,
                self.signal,
                reason,
                ", and what waits is kept" if self.signal == "spans" else "",
            )
        if answer.taken and (answer.rejected or answer.reason) and reason != self._remark:
            logger.warning(
                "The collector at %s took a message and dropped %d of its %s (%s).",
                self.destination,
                answer.rejected,
                self.signal if self.signal == "spans" else "data points",
                reason,
            )
            self._remark = reason

    def close(self) -> None:
        """Give up the connection, and a try that is under way in another thread."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
