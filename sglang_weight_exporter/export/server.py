# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP endpoint: ``/metrics``, ``/healthz`` and a landing page, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import html
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

import uvicorn

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.authenticator import Authenticator, BusyError
from sglang_weight_exporter.export.connections import ACCEPTED_AT_ONCE, HttpProtocol
from sglang_weight_exporter.export.prometheus import Exposition, content_type
from sglang_weight_exporter.settings import DEFAULT_PORT, METRIC_PRESETS, PREFIX, Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: All interfaces, IPv4 too, as Prometheus exporters do it. 0.0.0.0 is IPv4's alone.
_ALL = {"", "::", "*"}

#: As node_exporter has it; a scrape counts until its client has taken the answer.
SCRAPES_AT_ONCE = 40

#: Connections that wait to be accepted (listen(2)).
_BACKLOG = 128

#: An answer is sent in pieces of this size, each once the client has taken most of the one before.
_PIECE = 1 << 16


class EndpointError(Exception):
    """The endpoint cannot be opened now; the message says why and what to do."""


class MetricsApp:
    """The ASGI application."""

    def __init__(self, exposition: Exposition, authenticator: Authenticator) -> None:
        self._exposition = exposition
        self._authenticator = authenticator
        self._encoding = asyncio.Lock()
        self._scrapes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # At the end of the process; uvicorn would log it as an error.
            with contextlib.suppress(asyncio.CancelledError):
                await self._page(scope, send)

    async def _page(self, scope: Message, send: Send) -> None:
        if not self._authenticator.is_within_rate():
            await _answer(send, 429, "More requests than the configuration admits.\n")
            return
        send = functools.partial(_send_with, send, self._authenticator.headers)
        try:
            admitted = await self._authenticator.admits(
                _header(scope, b"authorization"), client=(scope.get("client") or ("",))[0]
            )
        except BusyError:
            await _answer(send, 429, "Too many passwords are to be checked.\n", retry_after="1")
            return
        if not admitted:
            await _answer(send, 401, "Unauthorized.\n", www_authenticate='Basic realm="metrics"')
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
        preset = _asked_for(scope, "metrics")[-1:]
        if not set(preset) <= set(METRIC_PRESETS):
            await _answer(send, 400, f"metrics is one of {', '.join(METRIC_PRESETS)}.\n")
            return
        self._scrapes += 1
        try:
            openmetrics = _prefers_openmetrics(_header(scope, b"accept"))
            gzip = _accepts_gzip(_header(scope, b"accept-encoding"))
            async with self._encoding:  # What one scrape encodes, those that wait have for nothing.
                content = await self._exposition.scrape(
                    openmetrics=openmetrics,
                    gzip=gzip,
                    names=_asked_for(scope, "name[]"),
                    preset="".join(preset),
                )
            await _answer(
                send,
                200,
                content,
                content_type=content_type(openmetrics=openmetrics),
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


def _entries(header: str) -> list[tuple[str, _Accepted]]:
    """What a client names, in lower case, one name as often as it comes. An entry that cannot be
    understood is left out."""
    found: list[tuple[str, _Accepted]] = []
    for entry in header.lower().split(","):
        name, *rest = (part.strip() for part in entry.split(";"))
        parameters = {
            key.strip(): value.strip().strip('"')
            for key, _, value in (part.partition("=") for part in rest)
        }
        with contextlib.suppress(ValueError):
            version, quality = parameters.get("version", ""), float(parameters.get("q", "1"))
            found.append((name, _Accepted(quality, version)))
    return found


def _accepts_gzip(header: str) -> bool:
    return any(name == "gzip" and each.quality > 0 for name, each in _entries(header))


def _prefers_openmetrics(header: str) -> bool:
    """Of OpenMetrics there is version 1.0.0, in whatever place it is offered."""
    offers = _entries(header)
    text = max((each.quality for name, each in offers if name == "text/plain"), default=0.0)
    return any(
        name == "application/openmetrics-text"
        and each.version in {"", "1.0.0"}
        and each.quality > 0
        and each.quality >= text
        for name, each in offers
    )


def _asked_for(scope: Message, parameter: str) -> list[str]:
    """What the query has of it, as often as it comes."""
    return parse_qs(scope["query_string"].decode("latin-1")).get(parameter, [])


def _header(scope: Message, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


async def _send_with(send: Send, headers: list[tuple[bytes, bytes]], message: Message) -> None:
    if message["type"] == "http.response.start":
        message["headers"] += headers
    await send(message)


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
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


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


def configure(application: MetricsApp, authenticator: Authenticator) -> uvicorn.Config:
    """uvicorn's configuration; TLS is the connections' own."""
    return uvicorn.Config(
        application,
        http=cast(Any, functools.partial(HttpProtocol, authenticator=authenticator)),
        ws="none",
        lifespan="off",
        interface="asgi3",
        loop="asyncio",
        log_config=None,
        log_level="warning",
        access_log=False,
        backlog=ACCEPTED_AT_ONCE,
        proxy_headers=False,
        server_header=False,
    )


def url(settings: Settings, *, tls: bool) -> str:
    """Where the metrics are, for people."""
    host = "localhost" if settings.address in {*_ALL, "0.0.0.0"} else settings.address  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{host}:{settings.port}/metrics"


class Server:
    """uvicorn inside a running event loop; signals belong to the caller."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        self._server = _QuietServer(config)
        self._listener = listener

    async def run(self) -> None:
        """Serve until the task that runs this is cancelled."""
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            await self._end()

    async def _end(self) -> None:
        """Let go of clients, and then of what they asked for."""
        state = self._server.server_state
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # In which connection_lost() is called.
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)


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
