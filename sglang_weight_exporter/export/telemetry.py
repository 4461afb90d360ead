# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``OTEL_*`` asks this process to send, and nothing of OpenTelemetry unless it asks.

OpenTelemetry and gRPC take 40 MB: they are imported only once something is to be sent. No global
provider is set, and the exporters read ``OTEL_EXPORTER_OTLP_*`` themselves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from sglang_weight_exporter.export.collector import Collector, Complaint
from sglang_weight_exporter.export.instruments import HostView, SpanCounts
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    from sglang_weight_exporter.export.delivery import Delivery
    from sglang_weight_exporter.export.otlp_metrics import PeriodicMetrics

logger = logging.getLogger("sglang_weight_exporter")

Signal = Literal["traces", "metrics"]

#: How long the end of this process waits for what is under way.
STOP_SECONDS = 5.0

_DEFAULT_METRIC_INTERVAL = 60_000


@dataclass(frozen=True)
class Choice:
    """How one signal is sent."""

    exporter: Literal["otlp", "console"]
    #: ``grpc``, as in OpenTelemetry for Python and in SGLang, or ``http/protobuf``. Another one
    #: is kept, and refused when it is to be used.
    protocol: str
    #: For messages to people: without user, password and path.
    destination: str


def choose(environ: Mapping[str, str], signal: Signal) -> Choice | None:
    """What the standard variables ask for; ``None``: nothing is sent.

    ``OTEL_TRACES_EXPORTER`` and ``OTEL_METRICS_EXPORTER`` decide. Without the first, spans are
    sent if an endpoint is set, the general one or that of traces. Without the second, metrics are
    sent only if an endpoint of metrics is set: whoever scrapes has them already.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    upper = signal.upper()
    own = environ.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT", "").strip()
    general = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    asked = environ.get(f"OTEL_{upper}_EXPORTER", "").strip().lower()
    names = {name.strip() for name in asked.split(",")} - {""}
    protocol = (
        environ.get(f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL", "").strip()
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip()
        or "grpc"
    )
    if not names and (own or (general and signal == "traces")):
        names = {"otlp"}
    if "otlp" in names:
        default = (
            "http://localhost:4318" if protocol == "http/protobuf" else "http://localhost:4317"
        )
        return Choice("otlp", protocol, _without_secrets(own or general or default))
    if "console" in names:
        return Choice("console", "", "the console")
    unknown = names - {"none", "prometheus"}
    if unknown:
        logger.warning(
            "OTEL_%s_EXPORTER=%r names no exporter that is known here, so no %s are sent. Set it "
            "to otlp, console or none.",
            upper,
            asked,
            signal,
        )
    return None


def _without_secrets(endpoint: str) -> str:
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    return parts.netloc.rpartition("@")[2] or endpoint


class ProtocolError(Exception):
    """A protocol that no exporter speaks."""


def _otlp(choice: Choice, signal: Signal) -> Any:
    """The exporter of a signal; it reads the rest of its configuration from the environment."""
    if choice.protocol == "grpc":
        if signal == "traces":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
                OTLPSpanExporter as GrpcSpanExporter,
            )

            return GrpcSpanExporter()
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
            OTLPMetricExporter as GrpcMetricExporter,
        )

        return GrpcMetricExporter()
    if choice.protocol == "http/protobuf":
        if signal == "traces":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter as HttpSpanExporter,
            )

            return HttpSpanExporter()
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
            OTLPMetricExporter as HttpMetricExporter,
        )

        return HttpMetricExporter()
    raise ProtocolError(
        f"the protocol {choice.protocol!r} is not one of grpc and http/protobuf; set "
        "OTEL_EXPORTER_OTLP_PROTOCOL to one of them"
    )


def _console(signal: Signal) -> Any:
    if signal == "traces":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    return ConsoleMetricExporter()


class Telemetry:
    """Sends spans and metrics if they are asked for."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        settings: Settings,
        environ: Mapping[str, str],
        *,
        read: Callable[[], HostView],
        counts: SpanCounts,
    ) -> None:
        self._collectors: list[Collector[Any]] = []
        self._complaint = Complaint()
        self._delivery: Delivery | None = None
        self._metrics: PeriodicMetrics | None = None
        if (choice := choose(environ, "traces")) is not None:
            from sglang_weight_exporter.export.delivery import Delivery

            table, names = _what_of_the_table(settings)
            self._delivery = Delivery(
                runtime_dir,
                self._collector(choice, "traces"),
                counts,
                table=table,
                names=names,
            )
        if (choice := choose(environ, "metrics")) is not None:
            from sglang_weight_exporter.export.otlp_metrics import PeriodicMetrics
            from sglang_weight_exporter.export.spans import host_name, resource

            if environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").lower() not in (
                "",
                "cumulative",
            ):
                logger.warning(
                    "Metrics are sent with cumulative temporality only, so "
                    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE is not followed."
                )
            self._metrics = PeriodicMetrics(
                read,
                self._collector(choice, "metrics"),
                resource({"service.name": "sglang", "service.instance.id": host_name()}),
                seconds=_metric_interval(environ),
            )

    def _collector(self, choice: Choice, signal: Signal) -> Collector[Any]:
        def make() -> Any:
            return _otlp(choice, signal) if choice.exporter == "otlp" else _console(signal)

        collector = Collector[Any](
            make,
            signal="spans" if signal == "traces" else "metrics",
            destination=choice.destination,
            complaint=self._complaint,
        )
        self._collectors.append(collector)
        logger.info("%s are sent to %s", collector.signal, choice.destination)
        return collector

    @property
    def exports_spans(self) -> bool:
        return self._delivery is not None

    def start(self) -> None:
        if self._collectors:
            opentelemetry = logging.getLogger("opentelemetry")
            opentelemetry.addHandler(self._complaint)
            opentelemetry.propagate = False
        if self._delivery is not None:
            self._delivery.start()
        if self._metrics is not None:
            self._metrics.start()

    def stop(self) -> None:
        """Send what can be sent soon. The rest waits in the store for the next exporter."""
        for collector in self._collectors:
            if collector.failing:
                collector.close()
        for sender in (self._delivery, self._metrics):
            if sender is not None:
                sender.stop(STOP_SECONDS)
        for collector in self._collectors:
            collector.close()

    def is_done_with(self, directory: RankDirectory) -> bool:
        """Whether what a dead rank left may be removed."""
        return self._delivery is None or not directory.events.waiting()

    def discard(self, directory: RankDirectory) -> None:
        """Without a collector nothing waits for one: let the rank's queue not fill up and count
        events as dropped that nobody asked for."""
        if self._delivery is None:
            for path in directory.events.waiting():
                directory.events.acknowledge(path)


def _what_of_the_table(settings: Settings) -> tuple[bool, re.Pattern[str] | None]:
    """Whether spans carry the table, and the names it is cut down to."""
    if not settings.span_table or not settings.span_table_names:
        return settings.span_table, None
    try:
        return True, re.compile(settings.span_table_names)
    except re.error as error:
        logger.error(
            "SGLANG_WEIGHT_EXPORTER_SPAN_TABLE_NAMES=%r is not a regular expression (%s), so spans "
            "carry no table: more than was asked for must not leave this host.",
            settings.span_table_names,
            error,
        )
        return False, None


def _metric_interval(environ: Mapping[str, str]) -> float:
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    try:
        milliseconds = float(text or _DEFAULT_METRIC_INTERVAL)
        if not 0 < milliseconds < float("inf"):
            raise ValueError
    except ValueError:
        logger.warning(
            "OTEL_METRIC_EXPORT_INTERVAL=%r is not a number of milliseconds, so metrics are sent "
            "once a minute.",
            text,
        )
        milliseconds = _DEFAULT_METRIC_INTERVAL
    return milliseconds / 1000
