# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The start and the end of what is sent, and nothing of OpenTelemetry unless it is asked for.

OpenTelemetry and gRPC take 40 MB: they are imported only once something is to be sent. No global
provider is set.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_weight_exporter.export.following import Followers
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import chosen
from sglang_weight_exporter.export.otlp.client import OtlpClient, Transport
from sglang_weight_exporter.export.otlp.settings import (
    Signal,
    SignalConfig,
    choose,
    metric_interval,
    metric_temporality,
    metric_timeout,
    table_selection,
)
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.process_log import Secrets
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.weight_table_events import Limits

if TYPE_CHECKING:
    from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics
    from sglang_weight_exporter.export.otlp.span_sender import SpanSender

logger = logging.getLogger("sglang_weight_exporter")

#: How long the end of this process waits for what is under way.
STOP_SECONDS = 5.0


class ProtocolError(Exception):
    """A protocol that is not spoken here."""


def _connect(config: SignalConfig, signal: Signal) -> Transport:
    """The connection of a signal. Raises :class:`ProtocolError`, ``OSError``, ``ValueError``."""
    name = "trace" if signal == "traces" else signal
    package = f"opentelemetry.proto.collector.{name}.v1"
    messages = importlib.import_module(f"{package}.{name}_service_pb2")
    service = f"{package}.{name.title()}Service"
    request = getattr(messages, f"Export{name.title()}ServiceRequest")
    response = getattr(messages, f"Export{name.title()}ServiceResponse")
    collector = _collector(config, service, response) if "otlp" in config.exporters else None
    if "console" not in config.exporters:
        assert collector is not None
        return collector
    from sglang_weight_exporter.export.otlp.console import ConsoleTransport

    return ConsoleTransport(request, collector)


def _collector(config: SignalConfig, service: str, response: type[Any]) -> Transport:
    if config.protocol == "http/protobuf":
        from sglang_weight_exporter.export.otlp.http_transport import HttpTransport

        return HttpTransport(config.connection, response)
    if config.protocol != "grpc":
        raise ProtocolError(
            f"the protocol {config.protocol!r} is not one of grpc and http/protobuf; set "
            "OTEL_EXPORTER_OTLP_PROTOCOL to one of them"
        )
    if not importlib.util.find_spec("grpc"):
        raise ProtocolError(
            "gRPC takes grpcio, which is not installed here: pip install "
            "'sglang-weight-exporter[grpc]', or set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"
        )
    from sglang_weight_exporter.export.otlp.grpc_transport import GrpcTransport

    return GrpcTransport(config.connection, service, response)


class OtlpPipeline:
    """Sends spans and metrics if they are asked for."""

    def __init__(
        self,
        snapshots: SnapshotReader,
        settings: Settings,
        environ: Mapping[str, str],
        *,
        read: Callable[[], HostView],
        counts: SpanCounts,
        guard: Guard,
        followers: Followers,
    ) -> None:
        self._environ = environ
        self._secrets = Secrets(environ)
        self.clients: list[OtlpClient] = []
        self._spans: SpanSender | None = None
        self._metrics: PeriodicMetrics | None = None
        try:
            self._spans = self._choose_spans(snapshots, settings, counts, guard, followers)
            self._metrics = self._choose_metrics(snapshots, settings, read, guard)
        except ImportError as error:
            logger.warning(
                "Nothing is sent by OTLP, because %s is not installed here: pip install "
                "opentelemetry-sdk opentelemetry-exporter-otlp-proto-common. Metrics are served.",
                error.name,
            )

    def _choose_spans(
        self,
        snapshots: SnapshotReader,
        settings: Settings,
        counts: SpanCounts,
        guard: Guard,
        followers: Followers,
    ) -> SpanSender | None:
        """Raises ``ImportError`` where OpenTelemetry is not installed."""
        config = choose(self._environ, "traces")
        if config is None:
            return None
        from sglang_weight_exporter.export.otlp.span_sender import SpanSender

        table, names = table_selection(settings)
        logs = None
        if table and settings.table != "span_events":
            if (of_logs := choose(self._environ, "logs")) is not None:
                logs = self._client(of_logs, "logs")
            else:
                table = settings.table == "both"
                logger.warning(
                    "SGLANG_WEIGHT_EXPORTER_TABLE=%s asks for log records, and "
                    "OTEL_LOGS_EXPORTER for none, so %s.",
                    settings.table,
                    "spans alone carry the table" if table else "the table is not sent",
                )
        return SpanSender(
            snapshots,
            self._client(config, "traces"),
            counts,
            guard,
            table=table,
            names=names,
            logs=logs,
            in_spans=settings.table != "logs",
            followers=followers,
            limits=Limits(settings.span_event_bytes, settings.span_bytes),
        )

    def _choose_metrics(
        self,
        snapshots: SnapshotReader,
        settings: Settings,
        read: Callable[[], HostView],
        guard: Guard,
    ) -> PeriodicMetrics | None:
        """Raises ``ImportError`` where OpenTelemetry is not installed."""
        config = choose(self._environ, "metrics")
        if config is None:
            return None
        from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics

        return PeriodicMetrics(
            read,
            self._client(config, "metrics"),
            instance=str(snapshots.runtime_dir.path),
            seconds=metric_interval(self._environ),
            timeout=metric_timeout(self._environ),
            temporality=metric_temporality(self._environ),
            instruments=chosen(settings.metrics),
            guard=guard,
        )

    def _client(self, config: SignalConfig, signal: Signal) -> OtlpClient:
        client = OtlpClient(
            lambda: _connect(config, signal),
            signal="spans" if signal == "traces" else signal,
            destination=config.destination,
            seconds=config.connection.timeout,
            hide=self._secrets.hide,
        )
        self.clients.append(client)
        logger.info("%s are sent to %s", client.signal, config.destination)
        return client

    @property
    def exports_spans(self) -> bool:
        return self._spans is not None

    def start(self) -> None:
        if self._spans is not None:
            self._spans.start()
        if self._metrics is not None:
            self._metrics.start()

    def stop(self) -> None:
        """Send what can be sent soon. The rest waits in the store for the next exporter."""
        for client in self.clients:
            if client.failing:
                client.close()
        for sender in (self._spans, self._metrics):
            if sender is not None:
                sender.stop(STOP_SECONDS)
        for client in self.clients:
            client.close()

    def is_done_with(self, directory: RankDirectory) -> bool:
        """Whether what a dead rank left may be removed."""
        return self._spans is None or not directory.events.waiting()

    def discard(self, directory: RankDirectory) -> None:
        """Without a collector nothing waits for one: let the rank's queue not fill up and count
        events as dropped that nobody asked for."""
        if self._spans is None:
            for path in directory.events.waiting():
                directory.events.acknowledge(path)
