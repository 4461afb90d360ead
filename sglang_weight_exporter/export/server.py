# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP endpoint: ``/metrics``, ``/healthz`` and a landing page, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import html
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.settings import DEFAULT_PORT, PREFIX, Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: A client that has sent no whole request, or not taken its whole answer, in this time is
#: disconnected. Prometheus gives a scrape 10 seconds by default.
EXCHANGE_SECONDS = 15.0

#: All interfaces, IPv4 too, as Prometheus exporters do it. 0.0.0.0 is IPv4's alone.
_ALL = {"", "::", "*"}


#: As node_exporter has it; a scrape counts until its client has taken the answer.
SCRAPES_AT_ONCE = 40

#: Beyond it the connection that is open for the longest is let go for each new one.
MOST_CONNECTIONS = 512

#: Descriptors that connections never take: they are for the store, the collector and what waits
#: in the listening socket's queue.
_KEPT_DESCRIPTORS = 128

#: Connections that asyncio accepts in one go. It takes up to four goes until the first of them is
#: counted, or one that was let go is closed.
_ACCEPTED_AT_ONCE = 16

#: Connections that wait to be accepted (listen(2)).
_BACKLOG = 128


class EndpointError(Exception):
    """The endpoint cannot be opened now; the message says why and what to do."""


class Endpoint:
    """The ASGI application."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition
        self._encoding = asyncio.Lock()
        self._scrapes = 0

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
        if self._scrapes >= SCRAPES_AT_ONCE:
            await _answer(
                send, 503, f"More than {SCRAPES_AT_ONCE} scrapes at once are not served.\n"
            )
            return
        self._scrapes += 1
        try:
            openmetrics = _prefers_openmetrics(_header(scope, b"accept"))
            encodings = _accepted(_header(scope, b"accept-encoding"))
            gzip = encodings.get("gzip", _Accepted()).quality > 0
            async with self._encoding:  # What one scrape encodes, those that wait have for nothing.
                content = await self._exposition.scrape(openmetrics=openmetrics, gzip=gzip)
            await _answer(
                send,
                200,
                content,
                content_type=self._exposition.content_type(openmetrics=openmetrics),
                **({"content_encoding": "gzip"} if gzip else {}),
            )
        finally:
            self._scrapes -= 1

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


@dataclass(frozen=True)
class _Accepted:
    """One entry of an Accept header (RFC 9110, 12.4.2)."""

    quality: float = 0.0
    version: str = ""


def _accepted(header: str) -> dict[str, _Accepted]:
    """What a client names, in lower case. An entry that cannot be understood is not named."""
    found: dict[str, _Accepted] = {}
    for entry in header.lower().split(","):
        name, *rest = (part.strip() for part in entry.split(";"))
        parameters = {
            key.strip(): value.strip().strip('"')
            for key, _, value in (part.partition("=") for part in rest)
        }
        with contextlib.suppress(ValueError):
            found.setdefault(
                name,
                _Accepted(float(parameters.get("q", "1")), parameters.get("version", "")),
            )
    return found


def _prefers_openmetrics(header: str) -> bool:
    accepted = _accepted(header)
    openmetrics = accepted.get("application/openmetrics-text", _Accepted())
    text = accepted.get("text/plain", _Accepted())
    return (
        openmetrics.version in {"", "1.0.0"}
        and openmetrics.quality > 0
        and openmetrics.quality >= text.quality
    )


def _header(scope: Message, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


async def _answer(
    send: Send,
    status: int,
    body: str | bytes,
    *,
    content_type: str = "text/plain; charset=utf-8",
    **more: str,
) -> None:
    content = body.encode() if isinstance(body, str) else body
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(content)).encode()),
    ]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class _PatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on how long one exchange may take, and on how many there are.

    uvicorn closes a connection that idles *after* an answer; one that never asks, never ends its
    question or never reads would stay for good.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._made_at = self.loop.time()
        self._next_look = self.loop.call_later(EXCHANGE_SECONDS, self._look, None)
        if len(self.connections) > _most_connections():
            oldest = min(
                (each for each in self.connections if isinstance(each, _PatientProtocol)),
                key=lambda each: each._made_at,
            )
            self.connections.discard(oldest)  # It is told that it is lost only later.
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        cycle = self.cycle
        # Closing means waiting for the client to take what it was sent, which it may never do.
        # A finished exchange that no other has followed: uvicorn closes what idles, so bytes come,
        # which make no request.
        if cycle is before or self.transport.is_closing():
            self.transport.abort()
        else:
            self._next_look = self.loop.call_later(EXCHANGE_SECONDS, self._look, cycle)


def _most_connections() -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(min(MOST_CONNECTIONS, descriptors - _KEPT_DESCRIPTORS), 1)


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
        backlog=_ACCEPTED_AT_ONCE,
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
    host = "localhost" if settings.address in {*_ALL, "0.0.0.0"} else settings.address  # noqa: S104
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
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)  # asyncio has one number for this and for what it accepts.

    def install_signal_handlers(self) -> None:
        """Before uvicorn 0.29: leave signals alone."""

    def capture_signals(self) -> Any:
        """From uvicorn 0.29: leave signals alone."""
        return contextlib.nullcontext()
