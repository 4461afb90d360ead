# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One signal's connection to a collector: made when it is needed, made anew after a failure."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger("sglang_weight_exporter")


class _Exporter(Protocol):
    def shutdown(self) -> Any: ...


Exporter = TypeVar("Exporter", bound=_Exporter)


class Complaint(logging.Handler):
    """Keeps what OpenTelemetry's exporters first complain about when they fail.

    They write a line for every try, the first with the cause; here one line says that the
    collector is gone and one that it is back.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._here = threading.local()

    @property
    def text(self) -> str:
        """This thread's: each signal is sent from one of its own."""
        return getattr(self._here, "text", "")

    @text.setter
    def text(self, text: str) -> None:
        self._here.text = text

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


class Collector(Generic[Exporter]):
    """Where one signal goes.

    ``make`` reads certificates and connects lazily; what it raises counts as a failure, so that a
    file that appears later is found.
    """

    def __init__(
        self,
        make: Callable[[], Exporter],
        *,
        signal: str,
        destination: str,
        complaint: Complaint,
    ) -> None:
        self.destination = destination
        #: Whether it did not take what it was sent last.
        self.failing = False
        self._make = make
        self.signal = signal
        self._complaint = complaint
        self._exporter: Exporter | None = None

    def take(self, send: Callable[[Exporter], bool]) -> bool:
        """Whether the collector acknowledged what ``send`` sent. Blocks for as long as
        ``OTEL_EXPORTER_OTLP_TIMEOUT``; never raises."""
        self._complaint.text = ""
        try:
            if self._exporter is None:
                self._exporter = self._make()
            taken = send(self._exporter)
        except Exception as error:
            self._complaint.text = f"{type(error).__name__}: {error}"
            taken = False
        if not taken:
            # Anew, because certificates may have changed and gRPC waits long to connect again.
            self.close()
        if taken and self.failing:
            logger.info("The collector at %s takes %s again.", self.destination, self.signal)
        elif not taken and not self.failing:
            logger.warning(
                "The collector at %s does not take %s (%s). It is asked again, at most half a "
                "minute apart%s.",
                self.destination,
                self.signal,
                self.last_error(),
                ", and what waits is kept" if self.signal == "spans" else "",
            )
        self.failing = not taken
        return taken

    def last_error(self) -> str:
        """Why something was not taken, as OpenTelemetry's exporter said it."""
        return self._complaint.text.rstrip(".") or "without a reason"

    def close(self) -> None:
        """Give up the connection, and a try that is under way in another thread."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.shutdown()
