# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments as OTLP metrics, sent at an interval: the values of ``/metrics``.

Totals and histograms are sent as the records have them, not recorded anew. Names are
OpenTelemetry's: the unit stands beside them and not in them, and no counter ends in ``_total``. A
backend that translates names for Prometheus makes those of ``/metrics`` of them.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.instruments.base import DataPoint, Instrument
from sglang_weight_exporter.export.otlp.client import OtlpClient
from sglang_weight_exporter.export.otlp.settings import Temporality
from sglang_weight_exporter.export.otlp.spans import SCHEMA_URL, SCOPE
from sglang_weight_exporter.export.otlp.spans import resource as make_resource
from sglang_weight_exporter.export.otlp.temporality import Interval, Totals
from sglang_weight_exporter.export.views import HostView, role_views
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram
from sglang_weight_exporter.weight_table_events import AttributeValue

logger = logging.getLogger("sglang_weight_exporter")

#: Data points in a message, a few hundred kilobytes: collectors take 4 MiB, proxies 1 MiB.
MESSAGE_POINTS = 1_000
#: Roles of ranks whose data points are made at a time.
PART = 8


#: What is the GPU's own has names in OpenTelemetry's conventions too.
HARDWARE = {
    "sglang_gpu_memory_total_bytes": "hw.gpu.memory.limit",
    "sglang_gpu_memory_used_bytes": "hw.gpu.memory.usage",
}


def otlp_name(instrument: Instrument) -> str:
    """``sglang_weight_update_duration_seconds`` → ``sglang.weight_update_duration``."""
    suffix = {"By": "_bytes", "s": "_seconds"}.get(instrument.unit, "")
    return instrument.name.removesuffix(suffix).replace("_", ".", 1)


def messages(
    view: HostView,
    resource: Resource,
    totals: Totals,
    instruments: Sequence[Instrument] = INSTRUMENTS,
) -> Iterator[MetricsData]:
    """All instruments that have a value, in messages of at most :data:`MESSAGE_POINTS` points.

    ``totals`` has to know what became of each message before the next one is asked for.
    """
    metrics: list[Metric] = []
    count = 0
    for instrument, measurements in _measurements(view, instruments):
        for start in range(0, len(measurements), MESSAGE_POINTS):
            part = measurements[start : start + MESSAGE_POINTS]
            if count + len(part) > MESSAGE_POINTS:
                yield _message(metrics, resource)
                metrics, count = [], 0
            points = [
                _point(instrument.label_names, each.labels, interval, view.now)
                for each in part
                if (interval := totals.interval(instrument, each, view.now)) is not None
            ]
            if not points:
                continue
            metrics.append(
                Metric(
                    name=otlp_name(instrument),
                    description=instrument.description,
                    unit=instrument.unit,
                    data=_data(instrument, points, deltas=totals.are_deltas(instrument)),
                )
            )
            count += len(points)
            if (of_convention := HARDWARE.get(instrument.name)) is not None:
                metrics.append(_of_hardware(of_convention, instrument, points))
                count += len(points)
    if metrics:
        yield _message(metrics, resource)


def _measurements(
    view: HostView, instruments: Sequence[Instrument]
) -> Iterator[tuple[Instrument, list[DataPoint]]]:
    """Every instrument with the host's values, and with those of a few roles at a time."""
    roles = list(role_views(view.snapshots, view.now))
    for instrument in instruments:
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

    ``instance``: what distinguishes two exporters of one host. ``service.version`` is SGLang's,
    where all engines have the same.
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
    names: tuple[str, ...], labels: tuple[str, ...], interval: Interval, now: float
) -> NumberDataPoint | HistogramDataPoint:
    # What SGLang does not have is no attribute; to Prometheus an empty label is the same.
    attributes = {key: value for key, value in zip(names, labels, strict=True) if value}
    start = round(interval.started_at * 1e9)
    # A clock that was set back makes no interval that ends before it begins.
    end = max(start, round(now * 1e9))
    value = interval.value
    if isinstance(value, Histogram):
        return HistogramDataPoint(
            attributes=attributes,
            start_time_unix_nano=start,
            time_unix_nano=end,
            count=sum(value.counts),
            sum=value.sum,
            bucket_counts=value.counts,
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
        value=value if abs(value) < 2**53 else float(value),
    )


def _of_hardware(name: str, instrument: Instrument, points: list[Any]) -> Metric:
    """The same values as the conventions for hardware have them."""
    own = [
        replace(point, attributes={"hw.id": point.attributes.get("gpu_uuid", "")})
        for point in points
    ]
    return Metric(
        name=name,
        description=instrument.description,
        unit=instrument.unit,
        data=Sum(own, AggregationTemporality.CUMULATIVE, is_monotonic=False),
    )


def _data(
    instrument: Instrument, points: list[Any], *, deltas: bool
) -> Gauge | Sum | HistogramData:
    if instrument.kind == "gauge":
        return Gauge(points)
    temporality = AggregationTemporality.DELTA if deltas else AggregationTemporality.CUMULATIVE
    if instrument.kind == "counter":
        return Sum(points, temporality, is_monotonic=True)
    return HistogramData(points, temporality)


class PeriodicMetrics:
    """Sends the metrics at an interval, from a thread of its own.

    ``timeout``: seconds that all messages of one time may take.
    """

    def __init__(
        self,
        read: Callable[[], HostView],
        collector: OtlpClient,
        *,
        instance: str,
        seconds: float,
        timeout: float,
        temporality: Temporality,
        instruments: Sequence[Instrument],
        guard: Guard,
    ) -> None:
        self._read = read
        self._instruments = instruments
        self._guard = guard
        self._collector = collector
        self._instance = instance
        self._seconds = seconds
        self._timeout = timeout
        self._totals = Totals(temporality, since=time.time())
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
            with self._guard.step("Sending metrics"):
                self._send()
            if stopping:
                return

    def _send(self) -> None:
        if self._collector.wait_seconds:
            return None
        ends_at = time.monotonic() + self._timeout
        view = self._read()
        for message in messages(
            view, host_resource(view, self._instance), self._totals, self._instruments
        ):
            left = ends_at - time.monotonic()
            # What was not taken is in the next messages too.
            if left <= 0:
                logger.warning(
                    "Metrics took longer than OTEL_METRIC_EXPORT_TIMEOUT, %g s, so some were not "
                    "sent this time.",
                    self._timeout,
                )
                return self._totals.settle(settled=False)
            result = self._collector.take(encode_metrics(message).SerializeToString(), left)
            self._totals.settle(settled=result.settled)
            if not result.settled:
                return None
        return self._totals.forget_others()
