# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The start and the end of what is sent, and nothing of OpenTelemetry unless it is asked for.

OpenTelemetry and gRPC take 40 MB: they are imported only once something is to be sent. No global
provider is set.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sglang_weight_exporter.export.otlp.client import OtlpClient, Transport
from sglang_weight_exporter.export.otlp.settings import (
    Signal,
    SignalConfig,
    choose,
    connection_settings,
    metric_interval,
    table_selection,
)
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics
    from sglang_weight_exporter.export.otlp.span_sender import SpanSender

logger = logging.getLogger("sglang_weight_exporter")

#: How long the end of this process waits for what is under way.
STOP_SECONDS = 5.0


class ProtocolError(Exception):
    """A protocol that is not spoken here."""


def _connect(choice: SignalConfig, signal: Signal, environ: Mapping[str, str]) -> Transport:
    """The connection of a signal. Raises :class:`ProtocolError` and ``OSError``."""
    if choice.exporter == "console":
        from sglang_weight_exporter.export.otlp.console import ConsoleConnection

        return ConsoleConnection()
    if choice.protocol not in {"grpc", "http/protobuf"}:
        raise ProtocolError(
            f"the protocol {choice.protocol!r} is not one of grpc and http/protobuf; set "
            "OTEL_EXPORTER_OTLP_PROTOCOL to one of them"
        )
    settings = connection_settings(environ, signal, choice.protocol)
    if choice.protocol == "grpc":
        if not importlib.util.find_spec("grpc"):
            raise ProtocolError(
                "gRPC takes grpcio, which is not installed here: pip install "
                "'sglang-weight-exporter[grpc]', or set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"
            )
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
            MetricsServiceStub,
        )
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

        from sglang_weight_exporter.export.otlp.grpc_transport import GrpcTransport

        return GrpcTransport(
            settings, TraceServiceStub if signal == "traces" else MetricsServiceStub
        )
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceResponse,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    from sglang_weight_exporter.export.otlp.http_transport import HttpTransport

    return HttpTransport(
        settings,
        ExportTraceServiceResponse if signal == "traces" else ExportMetricsServiceResponse,
    )


class OtlpPipeline:
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
        self._environ = environ
        self._collectors: list[OtlpClient] = []
        self._delivery: SpanSender | None = None
        self._metrics: PeriodicMetrics | None = None
        try:
            self._choose(runtime_dir, settings, read=read, counts=counts)
        except ImportError as error:
            logger.warning(
                "Nothing is sent by OTLP, because %s is not installed here: pip install "
                "opentelemetry-sdk opentelemetry-exporter-otlp-proto-common. Metrics are served.",
                error.name,
            )

    def _choose(
        self,
        runtime_dir: RuntimeDir,
        settings: Settings,
        *,
        read: Callable[[], HostView],
        counts: SpanCounts,
    ) -> None:
        """Raises ``ImportError`` where OpenTelemetry is not installed."""
        environ = self._environ
        if (choice := choose(environ, "traces")) is not None:
            from sglang_weight_exporter.export.otlp.span_sender import SpanSender

            table, names = table_selection(settings)
            self._delivery = SpanSender(
                runtime_dir,
                self._collector(choice, "traces"),
                counts,
                table=table,
                names=names,
            )
        if (choice := choose(environ, "metrics")) is not None:
            from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics

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
                instance=str(runtime_dir.path),
                seconds=metric_interval(environ),
            )

    def _collector(self, choice: SignalConfig, signal: Signal) -> OtlpClient:
        collector = OtlpClient(
            lambda: _connect(choice, signal, self._environ),
            signal="spans" if signal == "traces" else "metrics",
            destination=choice.destination,
        )
        self._collectors.append(collector)
        logger.info("%s are sent to %s", collector.signal, choice.destination)
        return collector

    @property
    def exports_spans(self) -> bool:
        return self._delivery is not None

    def start(self) -> None:
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
