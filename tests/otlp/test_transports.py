# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One message on its way: how long it may take, who is told what, what may be sent again.

Servers are sockets and threads of the test, because no real one does what these do.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from http_servers import Handler, LocalServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from waiting import eventually

from sglang_weight_exporter.export.otlp.client import ExportResult
from sglang_weight_exporter.export.otlp.console import ConsoleTransport
from sglang_weight_exporter.export.otlp.grpc_transport import GrpcTransport
from sglang_weight_exporter.export.otlp.http_transport import HttpTransport
from sglang_weight_exporter.export.otlp.settings import connection_settings

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
PROTOBUF = {"Content-Type": "application/x-protobuf"}
BODY = ExportTraceServiceRequest().SerializeToString()


def over_http(endpoint: str, **variables: str) -> HttpTransport:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}
    settings = connection_settings(environ, "traces", "http/protobuf")
    return HttpTransport(settings, ExportTraceServiceResponse)


class Server(LocalServer):
    """Answers every request with the same, and keeps what it was asked."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answer: tuple[int, dict[str, str], bytes] = (200, PROTOBUF, b"")
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        server = self

        class CollectorHandler(Handler):
            def do_POST(self) -> None:
                body = self.read_body()
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.path, headers, body))
                status, headers, content = server.answer
                with contextlib.suppress(OSError):
                    self.reply(content, status, headers)

            def do_CONNECT(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.path, headers, b""))
                host, _, port = self.path.rpartition(":")
                self.send_response(200)
                self.end_headers()
                with socket.create_connection((host, int(port))) as there:
                    ends = [(self.connection, there), (there, self.connection)]
                    threads = [threading.Thread(target=pump, args=pair) for pair in ends]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()

        super().__init__(CollectorHandler, context)


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


# How long a message may take.


def says_nothing(client: socket.socket, ended: threading.Event) -> None:
    ended.wait(60)


def dribbles_headers(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while not ended.wait(0.05):
        client.sendall(b"X-More: y\r\n")


def dribbles_content(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\n\r\n")
    while not ended.wait(0.05):
        client.sendall(b"\0")


@contextlib.contextmanager
def slow_server(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    behave(client, ended)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("behave", [says_nothing, dribbles_headers, dribbles_content])
def test_a_time_limit_is_one_for_the_whole_try(
    behave: Callable[[socket.socket, threading.Event], None], scheme: str
) -> None:
    """The server goes on until the test is over; that there is an end at all is the proof."""
    with (
        slow_server(behave) as place,
        pytest.raises((OSError, ssl.SSLError)) as raised,
    ):
        over_http(f"{scheme}://{place}").send(BODY, 0.5)
    if not isinstance(raised.value, ssl.SSLError):  # Headers are no handshake.
        assert "timed out after 0.5 s" in str(raised.value)


def test_a_reader_that_takes_nothing_is_dropped_in_time() -> None:
    with (
        slow_server(says_nothing) as place,
        pytest.raises(TimeoutError, match=r"timed out after 0.5 s"),
    ):
        over_http(f"http://{place}").send(b"x" * 50_000_000, 0.5)


def test_a_try_that_is_under_way_ends_when_the_exporter_does() -> None:
    with slow_server(dribbles_headers) as place:
        transport = over_http(f"http://{place}")
        raised: list[BaseException] = []

        def send() -> None:
            try:
                transport.send(BODY, 600)
            except OSError as error:
                raised.append(error)

        thread = threading.Thread(target=send)
        thread.start()

        def ends() -> bool:
            transport.close()
            return bool(raised)

        eventually(ends, what="an end")
        thread.join()


# Who is told what.


def test_only_what_opentelemetry_names_is_said(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("default login mallory password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    over_http(f"http://{server.place}").send(BODY, 30)
    over_http(
        f"http://{server.place}",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20token, X-Tenant = a%2Cb",
    ).send(BODY, 30)
    over_http(f"http://us%40er:pass@{server.place}/base?key=1").send(BODY, 30)
    bare, with_headers, with_user = (headers for _, headers, _ in server.asked)
    assert "authorization" not in bare
    assert (with_headers["authorization"], with_headers["x-tenant"]) == ("Bearer token", "a,b")
    basic = base64.b64encode(b"us@er:pass").decode()
    assert with_user["authorization"] == f"Basic {basic}"
    assert {headers["host"] for _, headers, _ in server.asked} == {server.place}
    assert [path for path, _, _ in server.asked][:2] == ["/v1/traces"] * 2


@pytest.mark.parametrize("compression", ["gzip", "deflate", "none"])
def test_a_message_is_compressed_as_it_says(compression: str, server: Server) -> None:
    import zlib

    over_http(f"http://{server.place}", OTEL_EXPORTER_OTLP_COMPRESSION=compression).send(
        b"content" * 100, 30
    )
    ((_, headers, body),) = server.asked
    unpack: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
    }
    assert headers.get("content-encoding", "none") == compression
    assert unpack.get(compression, bytes)(body) == b"content" * 100


def test_a_proxy_passes_on_what_is_not_encrypted(server: Server) -> None:
    transport = over_http("http://collector.example:4318", http_proxy=f"http://a:b@{server.place}")
    assert transport.send(BODY, 30).taken
    ((path, headers, _),) = server.asked
    assert path == "http://collector.example:4318/v1/traces"
    assert headers["host"] == "collector.example:4318"
    assert headers["proxy-authorization"] == f"Basic {base64.b64encode(b'a:b').decode()}"
    assert "authorization" not in headers


def test_a_proxy_reads_nothing_of_what_is_encrypted(server: Server, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    collector = Server(context)
    try:
        result = over_http(
            f"https://{collector.place}",
            HTTPS_PROXY=f"http://a:b@{server.place}",
            OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "ca.pem"),
            OTEL_EXPORTER_OTLP_HEADERS="authorization=token",
        ).send(BODY, 30)
        assert result.taken
        ((_, to_proxy, _),) = server.asked
        ((_, to_collector, _),) = collector.asked
        assert "proxy-authorization" in to_proxy
        assert "authorization" not in to_proxy
        assert to_collector["authorization"] == "token"
        assert "proxy-authorization" not in to_collector
    finally:
        collector.stop()


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "*", "example.org, 127.0.0.1:99"])
def test_no_proxy(no_proxy: str, server: Server) -> None:
    over_http(f"http://{server.place}", http_proxy="http://127.0.0.1:1", NO_PROXY=no_proxy).send(
        BODY, 30
    )
    assert len(server.asked) == 1


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://127.0.0.1", "http://"])
def test_an_endpoint_without_a_scheme_is_refused_in_words(endpoint: str) -> None:
    with pytest.raises(ValueError, match="has to begin with http:// or https://"):
        over_http(endpoint)


# What may be sent again.


@pytest.mark.parametrize("status", [429, 502, 503, 504, 302])
def test_what_may_be_sent_again_over_http(status: int, server: Server) -> None:
    server.answer = (status, {"Retry-After": "7"}, b"")
    result = over_http(f"http://{server.place}").send(BODY, 30)
    assert not result.taken
    assert result.retryable
    assert result.retry_after == 7


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 500, 501])
def test_what_may_not_be_sent_again_over_http(status: int, server: Server) -> None:
    server.answer = (status, {"Content-Type": "text/plain"}, b"because")
    result = over_http(f"http://{server.place}").send(BODY, 30)
    assert not result.settled or not result.taken
    assert not result.retryable
    assert "because" in result.reason


def test_an_answer_that_grows_takes_no_memory(server: Server) -> None:
    content = gzip.compress(bytes(300_000_000))
    server.answer = (200, {**PROTOBUF, "Content-Encoding": "gzip"}, content)
    assert "none of OTLP's" in over_http(f"http://{server.place}").send(BODY, 30).reason


def through_grpc(code: grpc.StatusCode, retry_after: float | None = None) -> ExportResult:
    """What is made of an answer with this code."""

    def export(request: bytes, context: grpc.ServicerContext) -> bytes:
        if retry_after is not None:
            status = Status(code=code.value[0])
            delay = Duration()
            delay.FromMilliseconds(int(retry_after * 1000))
            status.details.add().Pack(RetryInfo(retry_delay=delay))
            context.set_trailing_metadata(
                (("grpc-status-details-bin", status.SerializeToString()),)
            )
        context.abort(code, "because")
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers: Any = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    transport = GrpcTransport(
        connection_settings(environ, "traces", "grpc"), SERVICE, ExportTraceServiceResponse
    )
    try:
        return transport.send(BODY, 30)
    finally:
        transport.close()
        server.stop(0)


#: The table of OTLP's specification.
RETRYABLE = {
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNAVAILABLE",
    "DATA_LOSS",
}


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
)
def test_what_may_be_sent_again_over_grpc(code: grpc.StatusCode) -> None:
    result = through_grpc(code)
    assert not result.taken
    assert result.retryable == (code.name in RETRYABLE)
    assert f"{code.name}: because" in result.reason


def test_a_collector_without_room_is_asked_again_where_it_says_when() -> None:
    result = through_grpc(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=2.5)
    assert result.retryable
    assert result.retry_after == 2.5


def test_the_console_prints_what_the_collector_has(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ExportTraceServiceRequest()
    request.resource_spans.add().schema_url = "here"
    both = ConsoleTransport(ExportTraceServiceRequest, over_http(f"http://{server.place}"))
    server.answer = (503, {}, b"")
    both.send(request.SerializeToString(), 30)
    assert capsys.readouterr().out == ""
    server.answer = (200, PROTOBUF, b"")
    assert both.send(request.SerializeToString(), 30).taken
    assert '"schemaUrl": "here"' in capsys.readouterr().out
    assert len(server.asked) == 2
