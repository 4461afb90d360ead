# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""OTLP over HTTP (``http/protobuf``): a POST a message, and what its answer means.

With the standard library: a time limit of a whole try ends a server that sends a byte now and then
too, and for that one needs the socket. Spans are rare, so each message has a connection of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import importlib.util
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.otlp.client import ExportResult, partial_success
from sglang_weight_exporter.export.otlp.settings import ConnectionSettings, without_user

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}

#: An answer says whether a message was taken and is a few bytes long.
_LARGEST_ANSWER = 2**20

#: The answers after which OTLP allows to send a message again. What is no answer of OTLP's, such
#: as a redirect or a login page, comes from something else in the collector's place.
_RETRYABLE = {429, 502, 503, 504}


class HttpTransport:
    """``response``: the type of the answer, ``ExportTraceServiceResponse`` or
    ``ExportMetricsServiceResponse``.

    Raises ``OSError`` where a certificate cannot be read, and ``ValueError`` for an endpoint that
    is none.
    """

    def __init__(self, settings: ConnectionSettings, response: type[Any]) -> None:
        parts = urlsplit(settings.endpoint)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("the endpoint has to begin with http:// or https://")
        self._response = response
        self._compress = _COMPRESS.get(settings.compression)
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._target = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
        self._headers = {
            "Host": parts.netloc,
            "User-Agent": f"sglang-weight-exporter/{__version__}",
            "Content-Type": "application/x-protobuf",
            **settings.headers,
            **({"Content-Encoding": settings.compression} if self._compress else {}),
        }
        self._tls = _tls(settings) if parts.scheme == "https" else None
        self._proxy, self._proxy_headers = without_user(settings.proxy)
        if self._proxy and self._tls is None:
            self._target = settings.endpoint
            self._headers |= {f"Proxy-{name}": text for name, text in self._proxy_headers.items()}
        self._limit: _TimeLimit | None = None

    def send(self, body: bytes, seconds: float) -> ExportResult:
        """Send a message. Raises ``OSError`` and ``http.client.HTTPException``."""
        self._limit = limit = _TimeLimit(seconds)
        try:
            with contextlib.closing(self._connect(limit)) as connection:
                content = body if self._compress is None else self._compress(body)
                connection.request("POST", self._target, content, self._headers)
                with connection.getresponse() as response:
                    answer = response.read(_LARGEST_ANSWER)
                limit.check()
                return self._result(response, answer)
        except (OSError, http.client.HTTPException):
            limit.check()
            raise
        finally:
            limit.close()

    def close(self) -> None:
        if self._limit is not None:
            self._limit.end()

    def _connect(self, limit: _TimeLimit) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, self._port)
        if self._proxy:
            proxy = urlsplit(self._proxy if "//" in self._proxy else f"//{self._proxy}")
            if proxy.scheme not in {"", "http"} or not proxy.hostname:
                raise OSError("of proxies, only those with http:// are known here")
            connection.sock = limit.connect(proxy.hostname, proxy.port or 80)
            if self._tls is not None:
                self._tunnel(connection.sock)
        else:
            connection.sock = limit.connect(self._host, self._port)
        if self._tls is not None:
            connection.sock = self._tls.wrap_socket(connection.sock, server_hostname=self._host)
        return connection

    def _tunnel(self, sock: socket.socket) -> None:
        """Have the proxy pass on what comes, to the collector and unread."""
        to = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        headers = {"Host": to}
        headers |= {f"Proxy-{name}": text for name, text in self._proxy_headers.items()}
        lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        sock.sendall(f"CONNECT {to} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        with http.client.HTTPResponse(sock, method="CONNECT") as response:
            response.begin()
            if response.status != 200:
                raise OSError(f"the proxy answered {response.status} {response.reason}")

    def _result(self, response: http.client.HTTPResponse, content: bytes) -> ExportResult:
        if 200 <= response.status < 300:
            return self._success(response, content)
        reason = f"it answered {response.status} {response.reason}"
        if location := response.headers.get("Location"):
            reason += f" and refers to {location.partition('?')[0]}, which is not followed"
        if content and "text/plain" in response.headers.get("Content-Type", ""):
            reason += f": {content.decode(errors='replace').strip()}"
        return ExportResult(
            False,
            reason,
            retry_after=_retry_after(response.headers.get("Retry-After", "").strip()),
            retryable=response.status in _RETRYABLE or response.status < 400,
        )

    def _success(self, response: http.client.HTTPResponse, content: bytes) -> ExportResult:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        message = self._response()
        if not (content or _is_whole(response)):
            return ExportResult(False, "its answer ended before it was whole")
        try:
            if response.headers.get("Content-Encoding", "").lower() in {"gzip", "deflate"}:
                content = zlib.decompressobj(47).decompress(content, _LARGEST_ANSWER)
            if kind == "application/json":
                json_format.Parse(content or b"{}", message, ignore_unknown_fields=True)
            elif kind == "application/x-protobuf" or not (kind or content):
                message.ParseFromString(content)
            else:
                return ExportResult(
                    False,
                    f"it answered {response.status} with {kind or 'something'} and not with "
                    "an answer of OTLP's, so it is no collector",
                )
        except (
            DecodeError,
            json_format.ParseError,
            UnicodeDecodeError,
            RecursionError,
            zlib.error,
        ) as error:
            return ExportResult(False, f"its answer is none of OTLP's ({error})")
        return partial_success(message)


class _TimeLimit:
    """Of a whole try: what its sockets do ends when the time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends_at = time.monotonic() + seconds
        self._is_over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self.end)
        self._timer.daemon = True
        self._timer.start()

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first address that takes one."""
        problem: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                # TLS takes the socket away from its object.
                self._sockets.append(sock.dup())
                sock.settimeout(max(0.001, self._ends_at - time.monotonic()))
                sock.connect(address)
                sock.settimeout(None)
                return sock
            except OSError as error:
                problem = error
                sock.close()
        raise problem or OSError(f"{host} has no address")

    def check(self) -> None:
        """Raises ``TimeoutError``. To a reader, a connection that was ended is one that has."""
        if self._is_over:
            raise TimeoutError(f"timed out after {self._seconds:g} s")

    def end(self) -> None:
        self._is_over = True
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._timer.cancel()
        for sock in self._sockets:
            sock.close()


def _is_whole(response: http.client.HTTPResponse) -> bool:
    """Whether an answer without content is one, and not the beginning of one."""
    lengths = ("Content-Length", "Transfer-Encoding")
    return response.status == 204 or any(name in response.headers for name in lengths)


def _tls(settings: ConnectionSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.certificate or None)
    if not settings.certificate and importlib.util.find_spec("certifi"):
        import certifi  # A slim image may have no certificates of its own.

        context.load_verify_locations(certifi.where())
    if settings.client_certificate:
        context.load_cert_chain(settings.client_certificate, settings.client_key or None)
    return context


def _retry_after(text: str) -> float:
    """``Retry-After`` in seconds from now; it may be a time as well."""
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
