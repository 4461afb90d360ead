# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a collector answers decides whether a span counts as exported.

The server is one of the standard library: a real collector gives none of these answers on demand.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_servers import Handler, LocalServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

StartExporter = Callable[..., ExporterProcess]

HTML = {"Content-Type": "text/html"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}


class Server(LocalServer):
    """Answers every POST with the same; what is at /login answers 200 to everything."""

    def __init__(self) -> None:
        self.answer: tuple[int, dict[str, str], bytes] = (200, PROTOBUF, b"")
        self.asked: list[float] = []
        server = self

        class CollectorHandler(Handler):
            def do_POST(self) -> None:
                self.read_body()
                server.asked.append(time.monotonic())
                status, headers, content = server.answer
                self.reply(content, status, headers)

            def do_GET(self) -> None:
                self.reply(b"<html>log in</html>", headers=HTML)

        super().__init__(CollectorHandler)


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


def start(start_exporter: StartExporter, server: Server, **variables: str) -> ExporterProcess:
    return start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        **variables,
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((302, {"Location": "/login"}, b""), "302"),
        ((200, HTML, b"<html>log in</html>"), "text/html"),
        ((200, PROTOBUF, b"\xff\xff\xff"), "none of OTLP's"),
    ],
    ids=["redirect", "html", "garbage"],
)
def test_what_is_no_answer_of_a_collector_exports_nothing(
    answer: tuple[int, dict[str, str], bytes],
    said: str,
    rank: Rank,
    server: Server,
    start_exporter: StartExporter,
) -> None:
    rank.load(rows(3))
    server.answer = answer
    exporter = start(start_exporter, server)
    eventually(lambda: exporter.metric("span_failures_total") >= 1, what="a failed try")
    assert said in exporter.log()
    assert rank.waiting()
    assert exporter.metric("spans_exported_total") == 0
    server.answer = (200, PROTOBUF, b"")
    eventually(lambda: exporter.metric("spans_exported_total") == 1, what="exported")


def test_what_a_collector_dropped_is_logged_and_counted_and_not_sent_again(
    rank: Rank, server: Server, start_exporter: StartExporter
) -> None:
    rank.load(rows(3))
    partial = ExportTracePartialSuccess(rejected_spans=1, error_message="too many attributes")
    body = ExportTraceServiceResponse(partial_success=partial).SerializeToString()
    server.answer = (200, PROTOBUF, body)
    exporter = start(start_exporter, server)
    eventually(
        lambda: exporter.metric("spans_dropped_total", reason="refused") == 1, what="counted"
    )
    assert exporter.metric("spans_exported_total") == 0
    assert "too many attributes" in exporter.log()
    assert not rank.waiting()
    assert len(server.asked) == 1


def test_a_collector_that_never_answers_keeps_nobody_waiting(
    rank: Rank, start_exporter: StartExporter
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = start_exporter(
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_EXPORTER_OTLP_TIMEOUT="2",
        )
        rank.load(rows(3))
        asked, _ = silent.accept()
        for _ in range(5):  # While it is waited for.
            assert exporter.metric("ranks") == 1
            rank.update()
        eventually(lambda: exporter.metric("span_failures_total") >= 1, what="a failed try")
        asked.close()
        assert "timed out" in exporter.log()
        assert len(rank.waiting()) == 6


def test_retry_after_is_honoured(rank: Rank, server: Server, start_exporter: StartExporter) -> None:
    rank.load(rows(3))
    server.answer = (503, {"Retry-After": "5"}, b"")
    start(start_exporter, server)
    eventually(lambda: len(server.asked) >= 2, what="a second try")
    assert server.asked[1] - server.asked[0] >= 4.9


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_empty_compression_is_none(
    protocol: str, rank: Rank, backend: Any, start_exporter: StartExporter
) -> None:
    rank.load(rows(3))
    port = backend.grpc_port if protocol == "grpc" else backend.http_port
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_COMPRESSION="",
    )
    eventually(lambda: not rank.waiting(), what="acknowledged")


def test_what_the_queue_dropped_is_counted_once_over_restarts(
    runtime_dir: Any, server: Server, start_exporter: StartExporter
) -> None:
    rank = Rank(runtime_dir, event_count=2)
    rank.load(rows(3))
    for _ in range(4):
        rank.update()
    exporter = start(start_exporter, server)
    eventually(lambda: exporter.metric("spans_dropped_total", reason="queue_full") == 3)
    eventually(lambda: exporter.metric("spans_exported_total") == 2)
    exporter.end(signal.SIGKILL)
    exporter = start(start_exporter, server)
    rank.update()
    eventually(lambda: exporter.metric("spans_exported_total") == 1)
    assert exporter.metric("spans_dropped_total", reason="queue_full") == 0
