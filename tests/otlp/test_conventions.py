# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What OpenTelemetry's conventions ask of a resource and of a failed span, and what a proxy asks of
a message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from collectors import Backend, attributes_of
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

StartExporter = Callable[..., ExporterProcess]

EXCEPTION = "RuntimeError: Error(s) in loading state_dict"


def parts(backend: Backend, signal: str) -> list[Any]:
    """What has a resource of its own, of all that arrived."""
    return [
        part
        for message in list(backend.messages)
        if message.signal == signal
        for part in (
            message.request.resource_spans
            if signal == "traces"
            else message.request.resource_metrics
        )
    ]


def test_a_failed_span_has_a_type_and_each_resource_a_version_and_a_schema(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(3))
    rank.update(message=EXCEPTION)
    rank.update(message="the cache was not flushed")
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 3, what="three spans")
    types = [attributes_of(span).get("error.type") for span in backend.spans()]
    assert types == [None, "RuntimeError", "_OTHER"]
    for part in parts(backend, "traces"):
        attributes = attributes_of(part.resource)
        assert attributes["service.version"] == "0.5.23"
        assert attributes["service.instance.id"] == rank.rank_id
        assert part.schema_url.startswith("https://opentelemetry.io/schemas/")


def test_two_exporters_of_a_host_have_an_instance_each(
    tmp_path: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    ranks = [Rank(directory) for directory in (tmp_path / "runtime", tmp_path / "other")]
    for rank in ranks:
        directory = rank.runtime_dir.path
        start_exporter(
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_TRACES_EXPORTER="none",
            OTEL_METRIC_EXPORT_INTERVAL="200",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
            SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR=str(directory),
        )
        rank.load(rows(3))

    def instances() -> set[str]:
        return {
            attributes_of(part.resource)["service.instance.id"]
            for part in parts(backend, "metrics")
        }

    eventually(lambda: len(instances()) == 2, what="metrics of both")
    for part in parts(backend, "metrics"):
        assert attributes_of(part.resource)["service.version"] == "0.5.23"
        assert part.schema_url.startswith("https://opentelemetry.io/schemas/")


def test_the_metrics_of_many_ranks_come_in_messages_that_every_proxy_takes(
    runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    ranks = [Rank(runtime_dir, tp=number) for number in range(64)]
    start_exporter(
        OTEL_METRICS_EXPORTER="otlp",
        OTEL_TRACES_EXPORTER="none",
        OTEL_METRIC_EXPORT_INTERVAL="500",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
    )

    def described() -> set[str]:
        return {
            attributes_of(point)["tp_rank"]
            for part in parts(backend, "metrics")
            for metric in part.scope_metrics[0].metrics
            if metric.name == "sglang.weight_info"
            for point in metric.gauge.data_points
        }

    eventually(lambda: len(described()) == len(ranks), what="metrics of all ranks")
    largest = max(message.nbytes for message in backend.messages)
    assert largest < 2**20  # nginx's client_max_body_size, unless it is set.
