# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The pointer table as log records, and back out of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collectors import Backend, attributes_of
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

from sglang_weight_exporter.cli.trace_reader import tables_from_trace
from sglang_weight_exporter.weight_table import table_rows

StartExporter = Callable[..., ExporterProcess]


def records(backend: Backend) -> list[Any]:
    return [
        record
        for message in list(backend.messages)
        if message.signal == "logs"
        for part in message.request.resource_logs
        for scope in part.scope_logs
        for record in scope.log_records
    ]


def start(start_exporter: StartExporter, port: int, form: str, protocol: str) -> ExporterProcess:
    return start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        SGLANG_WEIGHT_EXPORTER_TABLE=form,
        SGLANG_WEIGHT_EXPORTER_SPAN_BYTES="500000",
    )


@pytest.mark.parametrize("form", ["logs", "both"])
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_table_comes_as_log_records_of_its_span_and_is_read_back(
    protocol: str,
    form: str,
    rank: Rank,
    backend: Backend,
    start_exporter: StartExporter,
    tmp_path: Path,
) -> None:
    table = rows(10_000)
    rank.load(table)
    rank.update()
    port = backend.grpc_port if protocol == "grpc" else backend.http_port
    exporter = start(start_exporter, port, form, protocol)
    eventually(lambda: not rank.waiting(), what="acknowledged")
    load, update = (
        span for span in backend.spans() if span.name.rpartition(".")[2] in {"load", "update"}
    )
    assert attributes_of(load)["sglang.weights.table.state"] == "included"
    assert attributes_of(update)["sglang.weights.table.state"] == "unchanged"
    assert attributes_of(update)["sglang.weights.table.span_id"] == load.span_id.hex()
    found = records(backend)
    assert {each.event_name for each in found} == {"sglang.weights.table"}
    assert {(each.trace_id, each.span_id) for each in found} == {(load.trace_id, load.span_id)}
    assert sum(attributes_of(each)["row.count"] for each in found) == 10_000
    assert max(message.nbytes for message in backend.messages) <= 500_000
    assert bool([event for span in backend.spans() for event in span.events]) == (form == "both")
    assert len(backend.spans()) == (
        2 if form == "logs" else exporter.metric("spans_exported_total")
    )
    if form == "logs":
        assert not load.links
        assert attributes_of(load)["sglang.weights.table.spans"] == 1
    (read,) = tables_from_trace(backend.write_json(tmp_path / "both.json"))
    assert list(table_rows(read.columns)) == table


def test_a_table_whose_records_were_refused_is_not_referred_to(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    refused: list[object] = []

    def refuses(message: Any) -> str:
        if message.signal == "logs" and not refused:
            refused.append(message)
            return "too many"
        return ""

    backend.refuses = refuses
    rank.load(rows(10))
    rank.update()
    exporter = start(start_exporter, backend.http_port, "logs", "http/protobuf")
    eventually(lambda: not rank.waiting(), what="nothing waiting")
    assert exporter.metric("spans_dropped_total", reason="refused") == 1
    (span,) = backend.spans()
    assert attributes_of(span)["sglang.weights.table.state"] == "included"
    assert len(records(backend)) == 1


def test_where_nobody_takes_logs_the_table_stays_at_home(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        OTEL_LOGS_EXPORTER="none",
        SGLANG_WEIGHT_EXPORTER_TABLE="logs",
    )
    eventually(lambda: not rank.waiting(), what="acknowledged")
    (span,) = backend.spans()
    assert attributes_of(span)["sglang.weights.table.state"] == "disabled"
    assert not span.events
    assert "OTEL_LOGS_EXPORTER for none, so the table is not sent" in exporter.log()
