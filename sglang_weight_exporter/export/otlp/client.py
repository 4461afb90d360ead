# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One signal's connection to a collector: made when it is needed, made anew after a failure.

What the collector answers decides: a message counts as taken when its answer is one of OTLP's, and
what it says that it dropped of it (OTLP's partial success) is logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

logger = logging.getLogger("sglang_weight_exporter")

#: A collector that asks to be left alone is, for at most this long.
LONGEST_WAIT_SECONDS = 600.0

#: Of what a collector says, a log gets so many characters.
LONGEST_REASON = 500


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
    #: Whether OTLP allows to send the message again.
    retryable: bool = True

    @property
    def settled(self) -> bool:
        """Whether nothing more can become of the message."""
        return self.taken or not self.retryable


def partial_success(response: Any) -> ExportResult:
    """The answer of a collector that took a message, perhaps without some of what is in it."""
    partial = response.partial_success
    names = ("rejected_spans", "rejected_data_points", "rejected_log_records")
    rejected = max(getattr(partial, name, 0) for name in names)
    return ExportResult(True, partial.error_message, rejected=max(0, rejected))


class Transport(Protocol):
    """A way to a collector."""

    def send(self, body: bytes, seconds: float) -> ExportResult:
        """Send a message, in at most so many seconds for all of it; may raise.

        ``body``: an ``ExportTraceServiceRequest`` or an ``ExportMetricsServiceRequest``.
        """

    def close(self) -> None:
        """Close the connection, and end a try that is under way in another thread."""


class OtlpClient:
    """Where one signal goes.

    ``connect`` reads certificates; what it raises counts as a failure, so that a file that appears
    later is found. ``seconds``: what a message may take. ``hide``: takes secrets out of a text.
    """

    def __init__(
        self,
        connect: Callable[[], Transport],
        *,
        signal: str,
        destination: str,
        seconds: float,
        hide: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.destination = destination
        self.signal = signal
        #: Whether it did not answer what it was sent last, or asked for it again.
        self.failing = False
        self._connect = connect
        self._seconds = seconds
        self._hide = hide
        self._clock = clock
        self._connection: Transport | None = None
        self._not_before = 0.0
        self._remark = ""

    @property
    def wait_seconds(self) -> float:
        """For how long it wants to be left alone (``Retry-After``)."""
        return max(0.0, self._not_before - self._clock())

    def take(self, body: bytes, seconds: float | None = None) -> ExportResult:
        """What the collector answers to a message, or that it did not in so many seconds or in
        what its setting says. Blocks for that long; never raises."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            within = self._seconds if seconds is None else min(seconds, self._seconds)
            result = self._connection.send(body, within)
        except Exception as error:
            result = ExportResult(False, f"{type(error).__name__}: {error}")
        # Before it is cut: half a secret is one that nobody finds.
        reason = " ".join(self._hide(result.reason).split())[:LONGEST_REASON]
        result = replace(result, reason=reason)
        self._not_before = self._clock() + min(result.retry_after, LONGEST_WAIT_SECONDS)
        if not result.taken:
            # Anew, because certificates may have changed and gRPC waits long to connect again.
            self.close()
        self._log(result)
        self.failing = not result.settled
        return result

    def _log(self, result: ExportResult) -> None:
        """One line when it stops taking what it is sent, one when it takes it again, and one for
        each new remark."""
        reason = result.reason.rstrip(".") or "without a reason"
        what = "data points" if self.signal == "metrics" else self.signal
        if result.settled and self.failing:
            logger.info("The collector at %s takes %s again.", self.destination, self.signal)
        elif not result.settled and not self.failing:
            logger.warning(
                "The collector at %s does not take %s (%s). It is asked again, at most half a "
                "minute apart%s.",
                self.destination,
                self.signal,
                reason,
                "" if self.signal == "metrics" else ", and what waits is kept",
            )
        if not result.retryable:
            logger.warning(
                "The collector at %s refused %s for good (%s). OTLP forbids to send them again, so "
                "they are dropped.",
                self.destination,
                what,
                reason,
            )
        elif result.taken and (result.rejected or result.reason) and reason != self._remark:
            logger.warning(
                "The collector at %s took a message and dropped %d of its %s (%s).",
                self.destination,
                result.rejected,
                what,
                reason,
            )
            self._remark = reason

    def close(self) -> None:
        """Close the connection, and end a try that is under way in another thread."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
