# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The start and the end of what is sent, and nothing of OpenTelemetry unless it is asked for.

OpenTelemetry and gRPC take 40 MB: they are imported only once something is to be sent. No global
provider is set, and the exporters read ``OTEL_EXPORTER_OTLP_*`` themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_weight_exporter.export.otlp.collector import Collector, Complaint
from sglang_weight_exporter.export.otlp.settings import (
    Choice,
    Signal,
    choose,
    metric_interval,
    table_selection,
)
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    from sglang_weight_exporter.export.otlp.delivery import Delivery
    from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics

logger = logging.getLogger("sglang_weight_exporter")

#: How long the end of this process waits for what is under way.
STOP_SECONDS = 5.0


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
            from sglang_weight_exporter.export.otlp.delivery import Delivery

            table, names = table_selection(settings)
            self._delivery = Delivery(
                runtime_dir,
                self._collector(choice, "traces"),
                counts,
                table=table,
                names=names,
            )
        if (choice := choose(environ, "metrics")) is not None:
            from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics
            from sglang_weight_exporter.export.otlp.spans import host_name, resource

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
                seconds=metric_interval(environ),
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
