# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where OTLP goes in tests: rotel, a real collector, and a backend behind it that keeps it all.

The backend decodes with OpenTelemetry's own protobufs. Tests that need a collector which refuses
or counts bytes let the exporter talk to the backend directly.
"""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToJson
from http_servers import Handler
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from ports import free_port
from waiting import eventually, forget, watch


@dataclass(frozen=True)
class Message:
    """One request that the backend took."""

    signal: str
    via: str
    nbytes: int
    request: Any
    headers: dict[str, str]


@dataclass(frozen=True)
class Tls:
    """Files (PEM) of a server that asks clients for a certificate."""

    certificate: Path
    key: Path
    client_ca: Path

    def grpc(self) -> grpc.ServerCredentials:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair], self.client_ca.read_bytes(), require_client_auth=True
        )

    def http(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.client_ca))
        context.load_cert_chain(self.certificate, self.key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


class Backend:
    """Takes OTLP over gRPC (with gRPC's limit of 4 MiB a message) and over HTTP."""

    def __init__(self, *, tls: Tls | None = None, address: str = "127.0.0.1") -> None:
        self.address = address
        self.grpc_port, self.http_port = free_port(), free_port()
        self._tls = tls
        self.messages: list[Message] = []
        #: Asked before a request is taken; a sentence refuses it.
        self.refuses: Callable[[Message], str] = lambda message: ""
        #: Whether what it refuses may be sent again.
        self.retryable = False
        self._grpc: grpc.Server | None = None
        self._http: http.server.ThreadingHTTPServer | None = None

    def start(self) -> Backend:
        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(
            _Service(self, "traces", trace_service_pb2.ExportTraceServiceResponse), self._grpc
        )
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(
            _Service(self, "metrics", metrics_service_pb2.ExportMetricsServiceResponse), self._grpc
        )
        logs_service_pb2_grpc.add_LogsServiceServicer_to_server(
            _Service(self, "logs", logs_service_pb2.ExportLogsServiceResponse), self._grpc
        )
        address = f"{self.address}:{self.grpc_port}"
        if self._tls is None:
            self._grpc.add_insecure_port(address)
        else:
            self._grpc.add_secure_port(address, self._tls.grpc())
        self._grpc.start()
        handler = type("Handler", (_Handler,), {"backend": self})
        self._http = http.server.ThreadingHTTPServer((self.address, self.http_port), handler)
        if self._tls is not None:
            self._http.socket = self._tls.http().wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        if self._grpc is not None:
            self._grpc.stop(0).wait()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()

    def take(self, message: Message) -> str:
        """Keep a request, or say why not."""
        reason = self.refuses(message)
        if not reason:
            self.messages.append(message)
        return reason

    def spans(self, name: str = "") -> list[Span]:
        """All spans that arrived, in order, with those that arrived twice."""
        return [span for span, _ in self.spans_with_resource() if name in {"", span.name}]

    def spans_with_resource(self) -> list[tuple[Span, dict[str, Any]]]:
        return [
            (span, attributes_of(part.resource))
            for message in list(self.messages)
            if message.signal == "traces"
            for part in message.request.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> dict[str, Any]:
        """The last message with metrics, by name."""
        for message in reversed(list(self.messages)):
            if message.signal == "metrics":
                return {
                    metric.name: metric
                    for part in message.request.resource_metrics
                    for scope in part.scope_metrics
                    for metric in scope.metrics
                }
        return {}

    def write_json(self, path: Path) -> Path:
        """What arrived, as a collector's file exporter writes it: one request a line."""
        with path.open("w") as file:
            for message in self.messages:
                if message.signal in {"traces", "logs"}:
                    file.write(MessageToJson(message.request, indent=None) + "\n")
        return path


class _Service:
    def __init__(self, backend: Backend, signal: str, answer: type) -> None:
        self._backend, self._signal, self._answer = backend, signal, answer

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        message = Message(self._signal, "grpc", request.ByteSize(), request, metadata)
        if reason := self._backend.take(message):
            code = grpc.StatusCode
            context.abort(
                code.UNAVAILABLE if self._backend.retryable else code.INVALID_ARGUMENT, reason
            )
        return self._answer()


class _Handler(Handler):
    backend: Backend

    def do_POST(self) -> None:
        body = self.read_body()
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        signal = self.path.rpartition("/")[2]
        kinds: dict[str, Any] = {
            "traces": trace_service_pb2.ExportTraceServiceRequest,
            "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
            "logs": logs_service_pb2.ExportLogsServiceRequest,
        }
        headers = {key.lower(): value for key, value in self.headers.items()}
        message = Message(signal, "http", len(body), kinds[signal].FromString(body), headers)
        reason = self.backend.take(message)
        status = 503 if self.backend.retryable else 400
        headers = {"Content-Type": "application/x-protobuf"}
        self.reply(status=status if reason else 200, headers=headers)


class Rotel:
    """The collector rotel 0.0.1a15, forwarding each message as it came to a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.grpc_port, self.http_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def endpoint(self, protocol: str) -> str:
        port = self.grpc_port if protocol == "grpc" else self.http_port
        return f"http://127.0.0.1:{port}"

    def start(self) -> Rotel:
        spec = importlib.util.find_spec("rotel")
        assert spec is not None, "the collector is missing: install the group `test`"
        assert spec.origin is not None
        binary = Path(spec.origin).with_name("rotel-agent")
        self._directory = Path(tempfile.mkdtemp(prefix="rotel-"))
        with watch(self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(binary),
                    "start",
                    "--otlp-grpc-endpoint",
                    f"127.0.0.1:{self.grpc_port}",
                    "--otlp-http-endpoint",
                    f"127.0.0.1:{self.http_port}",
                    "--disable-batching",
                    "--exporter",
                    "otlp",
                    "--otlp-exporter-endpoint",
                    f"http://127.0.0.1:{self.backend.grpc_port}",
                    "--otlp-exporter-protocol",
                    "grpc",
                    "--pid-file",
                    str(self._directory / "pid"),
                    "--log-file",
                    str(self._directory / "agent.log"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        eventually(self._listens, what="rotel listening")
        return self

    def _listens(self) -> bool:
        for port in (self.grpc_port, self.http_port):
            with socket.create_connection(("127.0.0.1", port), 1):
                pass
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            forget(self._directory / "log")
            shutil.rmtree(self._directory, ignore_errors=True)


def value_of(value: Any) -> Any:
    """A protobuf AnyValue as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes_of(owner: Any) -> dict[str, Any]:
    """Attributes of a span, an event, a resource or a data point."""
    return {each.key: value_of(each.value) for each in owner.attributes}


def table_rows_of(spans: Iterator[Span] | list[Span]) -> list[dict[str, Any]]:
    """The rows in the events of spans, decoded here and not by the code under test."""
    chunks: dict[int, list[dict[str, Any]]] = {}
    for span in spans:
        assert span.dropped_attributes_count == 0
        assert span.dropped_events_count == 0
        for event in span.events:
            assert event.name == "sglang.weights.table"
            assert event.dropped_attributes_count == 0
            columns = attributes_of(event)
            rows = []
            for index in range(columns["row.count"]):
                row = {
                    column: columns[column][index]
                    for column in (
                        "name",
                        "data_ptr",
                        "nbytes",
                        "stride",
                        "kind",
                        "storage_ptr",
                        "storage_nbytes",
                    )
                }
                for column in ("dtype", "shape", "device"):
                    row[column] = columns[f"{column}.values"][columns[column][index]]
                rows.append(row)
            chunks[columns["row.offset"]] = rows
    return [row for offset in sorted(chunks) for row in chunks[offset]]
