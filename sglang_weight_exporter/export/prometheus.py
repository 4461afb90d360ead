# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments as Prometheus metric families, made anew at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from sglang_weight_exporter.export.instruments import Instrument, Sample
from sglang_weight_exporter.export.measurement import label_names, measure
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.records import DURATION_BUCKETS, Histogram

#: Roles of ranks in one part of a family. A family of 64 ranks is megabytes of Python objects.
PART = 8


class StoreCollector(Collector):
    """Reads the host at each scrape. Metrics are never kept: a rank that is gone is gone.

    A family comes in parts, one after the other under one name; the endpoint writes each and
    forgets it before the next is made.
    """

    def __init__(self, read: Callable[[], HostView], *, exemplars: Callable[[], bool]) -> None:
        self._read = read
        self._exemplars = exemplars

    def collect(self) -> Iterator[Metric]:
        exemplars = self._exemplars()
        for instrument, measurements in measure(self._read(), part=PART):
            family = _Family(instrument, exemplars)
            for each in measurements:
                family.add(each.labels, each.sample)
            yield family.metric

    def describe(self) -> list[Metric]:
        """Nothing: asking would read the store, and the names are ours alone."""
        return []


class _Family:
    def __init__(self, instrument: Instrument, exemplars: bool) -> None:
        make: dict[str, type[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]] = {
            "gauge": GaugeMetricFamily,
            "counter": CounterMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        self.metric = make[instrument.kind](
            instrument.name, instrument.description, labels=label_names(instrument)
        )
        self._exemplars = exemplars

    def add(self, labels: tuple[str, ...], sample: Sample) -> None:
        exemplar = None
        if self._exemplars and sample.trace_id and sample.seconds is not None:
            in_histogram = isinstance(self.metric, HistogramMetricFamily)
            value = sample.seconds if in_histogram else 1.0
            exemplar = Exemplar({"trace_id": sample.trace_id}, value, sample.at)
        if isinstance(self.metric, HistogramMetricFamily):
            assert isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, _buckets(sample.value, exemplar), sample.value.sum)
        elif isinstance(self.metric, CounterMetricFamily):
            assert not isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, sample.value, exemplar=exemplar)
        else:
            assert not isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, sample.value)


def _buckets(
    histogram: Histogram, exemplar: Exemplar | None
) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Cumulative buckets; the one that the exemplar fell into has it."""
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    total, lower = 0, float("-inf")
    for bound, count in zip((*DURATION_BUCKETS, float("inf")), histogram.counts, strict=True):
        total += count
        name = "+Inf" if bound == float("inf") else str(bound)
        if exemplar is not None and lower < exemplar.value <= bound:
            buckets.append((name, float(total), exemplar))
        else:
            buckets.append((name, float(total)))
        lower = bound
    return buckets
