# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP endpoint: ``/metrics``, ``/healthz`` and a landing page, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import html
import itertools
import re
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang_weight_exporter import __version__
from sglang_weight_exporter.settings import DEFAULT_PORT, PREFIX, Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: A client that has sent no whole request, or not taken its whole answer, in this time is
#: disconnected. Prometheus gives a scrape 10 seconds by default.
EXCHANGE_SECONDS = 15.0

#: All interfaces, IPv4 too, as Prometheus exporters do it.
_ALL = {"", "::", "0.0.0.0", "*"}  # noqa: S104


#: zlib's name for gzip's container around the stream.
_GZIP = 31

#: Ends a scrape in OpenMetrics, and so each family that is encoded alone.
_EOF = b"# EOF\n"

#: The lines in front of a family's samples.
_COMMENTS = re.compile(rb"\A(?:#.*\n)+")


class EndpointError(Exception):
    """The endpoint cannot be opened now; the message says why and what to do."""


class Endpoint:
    """The ASGI application."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        pages = {"/": self._landing, "/metrics": self._metrics, "/healthz": self._healthz}
        page = pages.get(scope["path"])
        if page is None:
            await _answer(send, 404, "Not found. Metrics are at /metrics.\n")
        elif scope["method"] not in {"GET", "HEAD"}:
            await _answer(send, 405, "Only GET and HEAD are served.\n", allow="GET, HEAD")
        else:
            await page(scope, send)

    async def _metrics(self, scope: Message, send: Send) -> None:
        """Part by part: the whole text of many ranks is megabytes, and others wait too."""
        encode, content_type = choose_encoder(_header(scope, b"accept"))
        headers = [(b"content-type", content_type.encode())]
        gzip = "gzip" in _header(scope, b"accept-encoding").lower()
        if gzip:
            headers.append((b"content-encoding", b"gzip"))
        families = self._registry.collect()
        first = next(iter(families), None)  # Reads the store: a failure is an answer of 500.
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        compressor = zlib.compressobj(wbits=_GZIP) if gzip else None
        ending, name = b"", ""
        for family in () if first is None else itertools.chain([first], families):
            text = encode(_OneFamily(family))
            ending = _EOF if text.endswith(_EOF) else b""
            text = text.removesuffix(_EOF)
            if family.name == name:  # A further part: its description has been said.
                text = _COMMENTS.sub(b"", text, count=1)
            name = family.name
            body = text if compressor is None else compressor.compress(text)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)
        if compressor is not None:
            ending = compressor.compress(ending) + compressor.flush()
        await send({"type": "http.response.body", "body": ending})

    async def _healthz(self, scope: Message, send: Send) -> None:
        await _answer(send, 200, "ok\n")

    async def _landing(self, scope: Message, send: Send) -> None:
        await _answer(
            send,
            200,
            "<!doctype html><html lang=en><title>SGLang weight exporter</title>"
            f"<h1>SGLang weight exporter {html.escape(__version__)}</h1>"
            "<p>Weights and KV pool of every SGLang rank of one user on this host.</p>"
            '<p><a href="/metrics">Metrics</a> · <a href="/healthz">Health</a></p></html>\n',
            content_type="text/html; charset=utf-8",
        )


class _OneFamily(Collector):
    """What prometheus_client's encoders take for a registry."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]


def _header(scope: Message, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


async def _answer(
    send: Send,
    status: int,
    body: str,
    *,
    content_type: str = "text/plain; charset=utf-8",
    allow: str = "",
) -> None:
    content = body.encode()
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(content)).encode()),
    ]
    if allow:
        headers.append((b"allow", allow.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class _PatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on how long one exchange may take.

    uvicorn closes a connection that idles *after* an answer; one that never asks, or never
    reads, would stay for good.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._next_look = self.loop.call_later(EXCHANGE_SECONDS, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        cycle = self.cycle
        # Closing means waiting for the client to take what it was sent, which it may never do.
        if (
            cycle is None
            or self.transport.is_closing()
            or (cycle is before and not cycle.response_complete)
        ):
            self.transport.abort()
        else:
            self._next_look = self.loop.call_later(EXCHANGE_SECONDS, self._look, cycle)


def bind(settings: Settings) -> socket.socket:
    """A listening socket. Raises :class:`EndpointError`."""
    everywhere = settings.address in _ALL
    try:
        if everywhere and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", settings.port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        family = socket.AF_INET6 if ":" in settings.address else socket.AF_INET
        host = "0.0.0.0" if everywhere else settings.address  # noqa: S104
        return socket.create_server(
            (host, settings.port), family=socket.AF_INET if everywhere else family
        )
    except OSError as error:
        where = "all interfaces" if everywhere else settings.address
        if error.errno == errno.EADDRINUSE:
            also = " dcgm-exporter's default port is 9400 too."
            also = also if settings.port == DEFAULT_PORT else ""
            problem = f"Port {settings.port} on {where} is in use by another program.{also}"
            remedy = f"Set {PREFIX}PORT to a free port, or stop that program."
        elif error.errno == errno.EACCES:
            problem = f"This user may not listen on port {settings.port}."
            remedy = f"Set {PREFIX}PORT to a port from 1024 up."
        else:
            problem = f"{where}, port {settings.port}, cannot be listened on ({error.strerror})."
            remedy = f"Set {PREFIX}ADDRESS to an address of this host."
        raise EndpointError(
            f"{problem} No metrics are served until that changes. {remedy}"
        ) from error


def configure(application: Endpoint, settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration, certificates loaded. Raises :class:`EndpointError`."""
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None) or (
        settings.tls_client_ca_file is not None and settings.tls_cert_file is None
    ):
        raise EndpointError(
            f"HTTPS needs a certificate and its key: set {PREFIX}TLS_CERT_FILE and "
            f"{PREFIX}TLS_KEY_FILE both (and {PREFIX}TLS_CLIENT_CA_FILE only with them). "
            "No metrics are served until that changes."
        )
    config = uvicorn.Config(
        application,
        http=_PatientProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        loop="asyncio",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        ssl_ca_certs=None
        if settings.tls_client_ca_file is None
        else str(settings.tls_client_ca_file),
        ssl_cert_reqs=ssl.CERT_NONE if settings.tls_client_ca_file is None else ssl.CERT_REQUIRED,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise EndpointError(
            f"The certificate, its key or the client CA cannot be used ({error}). No metrics are "
            f"served until that changes. Look at {PREFIX}TLS_CERT_FILE, {PREFIX}TLS_KEY_FILE and "
            f"{PREFIX}TLS_CLIENT_CA_FILE."
        ) from error
    return config


def url(settings: Settings) -> str:
    """Where the metrics are, for people."""
    scheme = "http" if settings.tls_cert_file is None else "https"
    host = "localhost" if settings.address in _ALL else settings.address
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}/metrics"


class Server:
    """uvicorn inside a running event loop; signals belong to the caller."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        self._server = _QuietServer(config)
        self._listener = listener

    async def run(self) -> None:
        """Serve until the task that runs this is cancelled."""
        await self._server.serve(sockets=[self._listener])


class _QuietServer(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """Before uvicorn 0.29: leave signals alone."""

    def capture_signals(self) -> Any:
        """From uvicorn 0.29: leave signals alone."""
        return contextlib.nullcontext()
