# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments as OTLP metrics, sent at an interval: the values of ``/metrics``.

Totals and histograms are sent as the records have them (cumulative), not recorded anew. Names are
OpenTelemetry's: the unit stands beside them and not in them, and no counter ends in ``_total``. A
backend that translates names for Prometheus makes those of ``/metrics`` of them.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource

from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.instruments.base import DataPoint, Instrument
from sglang_weight_exporter.export.otlp.client import OtlpClient
from sglang_weight_exporter.export.otlp.spans import SCHEMA_URL, SCOPE
from sglang_weight_exporter.export.otlp.spans import resource as make_resource
from sglang_weight_exporter.export.views import HostView, role_views
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram
from sglang_weight_exporter.weight_table_events import AttributeValue

logger = logging.getLogger("sglang_weight_exporter")

#: Data points in a message, a few hundred kilobytes: collectors take 4 MiB, proxies 1 MiB.
MESSAGE_POINTS = 1_000
#: Roles of ranks whose data points are made at a time.
PART = 8


def otlp_name(instrument: Instrument) -> str:
    """``sglang_weight_update_duration_seconds`` → ``sglang.weight_update_duration``."""
    suffix = {"By": "_bytes", "s": "_seconds"}.get(instrument.unit, "")
    return instrument.name.removesuffix(suffix).replace("_", ".", 1)


def messages(view: HostView, resource: Resource) -> Iterator[MetricsData]:
    """All instruments that have a value, in messages of at most :data:`MESSAGE_POINTS` points."""
    metrics: list[Metric] = []
    count = 0
    for instrument, measurements in _measurements(view):
        names = instrument.label_names
        for start in range(0, len(measurements), MESSAGE_POINTS):
            part = measurements[start : start + MESSAGE_POINTS]
            if count + len(part) > MESSAGE_POINTS:
                yield _message(metrics, resource)
                metrics, count = [], 0
            points = [_point(names, each, view.now) for each in part]
            metrics.append(
                Metric(
                    name=otlp_name(instrument),
                    description=instrument.description,
                    unit=instrument.unit,
                    data=_data(instrument, points),
                )
            )
            count += len(part)
    if metrics:
        yield _message(metrics, resource)


def _measurements(view: HostView) -> Iterator[tuple[Instrument, list[DataPoint]]]:
    """Every instrument with the host's values, and with those of a few roles at a time."""
    roles = list(role_views(view.snapshots, view.now))
    for instrument in INSTRUMENTS:
        yield instrument, instrument.of_host(view)
        for start in range(0, len(roles), PART):
            yield instrument, instrument.of_roles(roles[start : start + PART])


def _message(metrics: list[Metric], resource: Resource) -> MetricsData:
    return MetricsData(
        [
            ResourceMetrics(
                resource=resource,
                scope_metrics=[ScopeMetrics(SCOPE, metrics, schema_url=SCHEMA_URL)],
                schema_url=SCHEMA_URL,
            )
        ]
    )


def host_resource(view: HostView, instance: str) -> Resource:
    """What the metrics of this host are about.

    ``instance``: what tells two exporters of one host apart. ``service.version`` is SGLang's, where
    all engines have the same.
    """
    attributes: dict[str, AttributeValue] = {
        "service.name": "sglang",
        "service.instance.id": str(
            uuid.uuid5(uuid.NAMESPACE_URL, f"file://{socket.gethostname()}{instance}")
        ),
    }
    versions = {snapshot.engine.sglang_version for snapshot in view.snapshots}
    if len(versions) == 1:
        attributes["service.version"] = versions.pop()
    return make_resource(attributes)


def _point(
    names: tuple[str, ...], measurement: DataPoint, now: float
) -> NumberDataPoint | HistogramDataPoint:
    sample = measurement.sample
    # What SGLang does not have is no attribute; to Prometheus an empty label is the same.
    attributes = {key: value for key, value in zip(names, measurement.labels, strict=True) if value}
    start = round(measurement.started_at * 1e9)
    # A clock that was set back makes no interval that ends before it begins.
    end = max(start, round(now * 1e9))
    if isinstance(sample.value, Histogram):
        return HistogramDataPoint(
            attributes=attributes,
            start_time_unix_nano=start,
            time_unix_nano=end,
            count=sum(sample.value.counts),
            sum=sample.value.sum,
            bucket_counts=sample.value.counts,
            explicit_bounds=DURATION_BUCKETS,
            # Optional in OTLP, and not known.
            min=None,  # type: ignore[arg-type]
            max=None,  # type: ignore[arg-type]
        )
    return NumberDataPoint(
        attributes=attributes,
        start_time_unix_nano=start,
        time_unix_nano=end,
        # OTLP's integers have 64 bits, and sums of such numbers may have more.
        value=sample.value if abs(sample.value) < 2**53 else float(sample.value),
    )


def _data(instrument: Instrument, points: list[Any]) -> Gauge | Sum | HistogramData:
    if instrument.kind == "gauge":
        return Gauge(points)
    if instrument.kind == "counter":
        return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    return HistogramData(points, AggregationTemporality.CUMULATIVE)


class PeriodicMetrics:
    """Sends the metrics at an interval, from a thread of its own."""

    def __init__(
        self,
        read: Callable[[], HostView],
        collector: OtlpClient,
        *,
        instance: str,
        seconds: float,
    ) -> None:
        self._read = read
        self._collector = collector
        self._instance = instance
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="sglang-weight-exporter-metrics", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Send once more, for at most this long."""
        self._stop.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(max(self._seconds, self._collector.wait_seconds))
            try:
                self._send()
            except Exception:
                logger.exception("Metrics could not be sent because of an error in the exporter.")
            if stopping:
                return

    def _send(self) -> None:
        if self._collector.wait_seconds:
            return
        view = self._read()
        for message in messages(view, host_resource(view, self._instance)):
            if not self._collector.take(encode_metrics(message)).taken:
                return  # Totals are cumulative: what was not taken is in the next messages too.
