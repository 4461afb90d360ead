# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments as OTLP metrics, sent at an interval: the values of ``/metrics``.

Totals and histograms are sent as the records have them (cumulative), not recorded anew. Names are
OpenTelemetry's: the unit stands beside them and not in them, and no counter ends in ``_total``. A
backend that translates names for Prometheus makes those of ``/metrics`` of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource

from sglang_weight_exporter.export.instruments import Instrument
from sglang_weight_exporter.export.measurement import Measurement, label_names, measure
from sglang_weight_exporter.export.otlp.collector import Collector
from sglang_weight_exporter.export.otlp.spans import SCOPE
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.records import DURATION_BUCKETS, Histogram

logger = logging.getLogger("sglang_weight_exporter")


def otlp_name(instrument: Instrument) -> str:
    """``sglang_weight_update_duration_seconds`` → ``sglang.weight_update_duration``."""
    suffix = {"By": "_bytes", "s": "_seconds"}.get(instrument.unit, "")
    return instrument.name.removesuffix(suffix).replace("_", ".", 1)


def metrics_data(view: HostView, resource: Resource) -> MetricsData:
    """All instruments that have a value, as one message."""
    return MetricsData(
        [
            ResourceMetrics(
                resource=resource,
                scope_metrics=[ScopeMetrics(SCOPE, list(_metrics(view)), schema_url="")],
                schema_url="",
            )
        ]
    )


def _metrics(view: HostView) -> Iterator[Metric]:
    for instrument, measurements in measure(view):
        if measurements:
            names = label_names(instrument)
            yield Metric(
                name=otlp_name(instrument),
                description=instrument.description,
                unit=instrument.unit,
                data=_data(instrument, [_point(names, each, view.now) for each in measurements]),
            )


def _point(
    names: tuple[str, ...], measurement: Measurement, now: float
) -> NumberDataPoint | HistogramDataPoint:
    sample = measurement.sample
    # What SGLang does not have is no attribute; to Prometheus an empty label is the same.
    attributes = {key: value for key, value in zip(names, measurement.labels, strict=True) if value}
    start, end = round(measurement.started_at * 1e9), round(now * 1e9)
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
        value=sample.value,
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
        collector: Collector[MetricExporter],
        resource: Resource,
        *,
        seconds: float,
    ) -> None:
        self._read = read
        self._collector = collector
        self._resource = resource
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
            stopping = self._stop.wait(self._seconds)
            try:
                data = metrics_data(self._read(), self._resource)
                # What was not taken is in the next message too: totals are cumulative.
                self._collector.take(partial(_export, data))
            except Exception:
                logger.exception("Metrics could not be sent because of an error in the exporter.")
            if stopping:
                return


def _export(data: MetricsData, exporter: MetricExporter) -> bool:
    return exporter.export(data) is MetricExportResult.SUCCESS
