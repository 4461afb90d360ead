# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics over OTLP: the values of /metrics, in OpenTelemetry's names."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from collectors import Backend, Rotel, attributes_of
from engines import http_get
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.resources import Resource
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from ranks import ExporterProcess, Rank, rows
from waiting import LIMIT, eventually

from sglang_weight_exporter.export.gpu_account import GpuAccount
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.export.otlp.metrics import PeriodicMetrics, messages
from sglang_weight_exporter.export.otlp.temporality import Totals
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.records.engine import Device
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Histogram, UpdateCounts
from sglang_weight_exporter.records.weights import WeightUsage

StartExporter = Callable[..., ExporterProcess]
TRACE = "0af7651916cd43dd8448eb211c80319c"
UNITS = {"By": "bytes", "s": "seconds"}


class BusyRank(Rank):
    """A rank that has seen updates."""

    def __init__(self, runtime_dir: Path, *, started_at: float | None = None) -> None:
        self.started_at = time.time() - 100 if started_at is None else started_at
        self.updates = 3
        super().__init__(runtime_dir)

    def write_snapshot(self, table: Any = None) -> None:
        now = time.time()
        disk = UpdateCounts(
            updates=self.updates,
            failures=1,
            calls=4,
            # As after a week of updates of a terabyte a minute: no float counts them one by one.
            phases={"load": 2.0},
            nbytes=2**60 + 1,
            duration=Histogram().observe(0.05).observe(2.0).observe(2.5).observe(500.0),
            trace_id=TRACE,
            updated_at=now,
            seconds=2.5,
        )
        role = Role(
            name="target",
            device="cuda:0",
            weights=(
                WeightUsage(
                    device="cuda:0", kind="parameter", dtype="bfloat16", nbytes=2**40, tensors=7
                ),
            ),
            loaded_at=now - 60,
            updates={"disk": disk},
        )
        self.store.write_snapshot(
            Snapshot(
                rank_id=self.rank_id,
                pid=os.getpid(),
                started_at=self.started_at,
                engine=self.engine,
                ranks=self.ranks,
                devices=(Device(name="cuda:0", uuid="GPU-0"),),
                roles=(role,),
                weight_version="7",
            )
        )


@pytest.fixture
def busy_rank(runtime_dir: Path) -> Rank:
    return BusyRank(runtime_dir)


def prometheus_name(metric: Any) -> str:
    """As Prometheus and the collector translate a name of OpenTelemetry's."""
    name = metric.name.replace(".", "_")
    if metric.unit in UNITS:
        name += f"_{UNITS[metric.unit]}"
    if metric.WhichOneof("data") == "sum" and metric.sum.is_monotonic:
        name += "_total"
    return str(name)


def samples(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, str], float]]:
    for metric in metrics.values():
        name = prometheus_name(metric)
        kind = metric.WhichOneof("data")
        for point in getattr(metric, kind).data_points:
            labels = attributes_of(point)
            if kind == "histogram":
                yield f"{name}_count", labels, point.count
                yield f"{name}_sum", labels, point.sum
                total = 0
                bounds = [*map(str, point.explicit_bounds), "+Inf"]
                for bound, count in zip(bounds, point.bucket_counts, strict=True):
                    total += count
                    yield f"{name}_bucket", {**labels, "le": bound}, total
            else:
                yield name, labels, getattr(point, point.WhichOneof("value"))


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_same_values_as_a_scrape(
    protocol: str,
    busy_rank: Rank,
    rotel: Rotel,
    backend: Backend,
    start_exporter: StartExporter,
) -> None:
    exporter = start_exporter(
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_ENDPOINT=rotel.endpoint(protocol),
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_TRACES_EXPORTER="none",
        OTEL_METRIC_EXPORT_INTERVAL="500",
        OTEL_SERVICE_NAME="named",
    )
    metrics = eventually(backend.metrics, what="metrics")
    scrape = exporter.scrape()
    sent = {
        (name, tuple(sorted(labels.items()))): value for name, labels, value in samples(metrics)
    }
    changing = ("process_", "sglang_weight_exporter_scrape", "python_", "promhttp_")
    scraped = {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if v))): sample.value
        for sample in scrape.samples
        if not sample.name.startswith(changing)
    }
    assert {key for key, _ in sent} == {key for key, _ in scraped}
    assert sent == scraped
    assert not [name for name in metrics if name.endswith(("_total", "_bytes", "_seconds"))]
    assert {metric.unit for metric in metrics.values()} >= {"By", "s", "{tensor}"}
    updates = metrics["sglang.weight_updates"].sum
    assert updates.is_monotonic
    assert updates.aggregation_temporality == 2  # cumulative
    message = next(each for each in backend.messages if each.signal == "metrics")
    resource = attributes_of(message.request.resource_metrics[0].resource)
    assert resource["service.name"] == "named"
    assert "host.name" in resource
    assert not backend.spans()


def test_deltas_where_a_backend_takes_nothing_else(
    runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    start_exporter(
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        OTEL_TRACES_EXPORTER="none",
        OTEL_METRIC_EXPORT_INTERVAL="300",
        OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE="delta",
    )
    rank = BusyRank(runtime_dir, started_at=time.time())

    def points(name: str) -> list[Any]:
        return [
            point
            for message in list(backend.messages)
            for scope in message.request.resource_metrics[0].scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in getattr(metric, metric.WhichOneof("data")).data_points
            if attributes_of(point).get("source") == "disk"
        ]

    def arrived(count: int) -> bool:
        return len(points("sglang.weight_updates")) >= count

    eventually(lambda: arrived(2), what="two messages")
    rank.updates = 5
    rank.write_snapshot()
    eventually(lambda: sum(point.as_int for point in points("sglang.weight_updates")) == 5)
    first, *more = points("sglang.weight_updates")
    assert first.as_int == 3
    for before, after in zip((first, *more), more, strict=False):
        assert after.start_time_unix_nano == before.time_unix_nano
    assert sum(point.count for point in points("sglang.weight_update_duration")) == 4
    metrics = backend.metrics()
    assert metrics["sglang.weight_updates"].sum.aggregation_temporality == 1
    assert metrics["sglang.weight_update_duration"].histogram.aggregation_temporality == 1


def test_an_error_while_metrics_are_sent_is_counted_and_they_are_sent_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard, tries = Guard(), threading.Semaphore(0)

    def read() -> HostView:
        tries.release()
        raise ValueError("odd")

    sender = PeriodicMetrics(
        read,
        cast(Any, SimpleNamespace(wait_seconds=0.0)),
        instance="one",
        seconds=0.001,
        timeout=1.0,
        temporality="cumulative",
        instruments=INSTRUMENTS,
        guard=guard,
    )
    sender.start()
    for _ in range(3):
        assert tries.acquire(timeout=LIMIT)
    sender.stop(LIMIT)
    assert guard.errors >= 3
    (line,) = [each for each in caplog.messages if "Sending metrics failed" in each]
    assert "ValueError: odd" in line


def test_memory_of_a_gpu_has_the_names_of_the_conventions_too() -> None:
    gpu = GpuMemory(uuid="GPU-1", index=0, total_bytes=80, used_bytes=30)
    account = GpuAccount(gpu=gpu, ranks=(), parts=None, most_used=30)
    view = HostView(snapshots=(), gpus=(account,))
    (message,) = messages(view, Resource({}), Totals("cumulative", since=0.0))
    request = encode_metrics(message)
    found = {
        metric.name: metric
        for scope in request.resource_metrics[0].scope_metrics
        for metric in scope.metrics
    }
    for name, ours, value in (
        ("hw.gpu.memory.limit", "sglang.gpu_memory_total", 80),
        ("hw.gpu.memory.usage", "sglang.gpu_memory_used", 30),
    ):
        (point,) = found[name].sum.data_points
        assert not found[name].sum.is_monotonic
        assert found[name].unit == "By"
        assert attributes_of(point) == {"hw.id": "GPU-1"}
        assert point.as_int == value == found[ours].gauge.data_points[0].as_int


def test_metrics_are_sent_only_when_asked_for(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(3))
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        OTEL_METRIC_EXPORT_INTERVAL="100",
    )
    eventually(backend.spans, what="the span")
    assert {message.signal for message in backend.messages} == {"traces"}


def openmetrics(exporter: ExporterProcess) -> list[Any]:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    status, _, body = http_get(f"http://127.0.0.1:{exporter.port}/metrics", headers=accept)
    assert status == 200
    return [
        sample
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    ]


def test_exemplars_name_the_trace_where_spans_are_sent(
    busy_rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    with_exemplar = [sample for sample in openmetrics(exporter) if sample.exemplar]
    found = {
        (sample.name, sample.labels["source"], sample.labels.get("le")): sample.exemplar
        for sample in with_exemplar
    }
    assert set(found) == {
        ("sglang_weight_updates_total", "disk", None),
        ("sglang_weight_update_duration_seconds_bucket", "disk", "3.0"),
    }
    assert {exemplar.labels["trace_id"] for exemplar in found.values()} == {TRACE}
    bucket = found["sglang_weight_update_duration_seconds_bucket", "disk", "3.0"]
    assert bucket.value == 2.5


def test_no_exemplar_where_no_span_is_sent(busy_rank: Rank, start_exporter: StartExporter) -> None:
    assert not [sample for sample in openmetrics(start_exporter()) if sample.exemplar]
