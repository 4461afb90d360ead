# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Connections to the endpoint: how many there are, how long each may take, and TLS.

uvicorn closes a connection that idles *after* an answer. One that never greets, never asks, never
ends its question or never reads would stay for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import resource
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang_weight_exporter.export.authenticator import Authenticator

#: A client that has sent no whole request, or not taken its whole answer, in this time is
#: disconnected. Prometheus gives a scrape 10 seconds by default.
EXCHANGE_SECONDS = 15.0

#: A client that has not taken most of a piece of its answer in this time is disconnected.
TAKE_SECONDS = 5.0

#: What the kernel keeps of answers that clients have not taken; it would take megabytes each.
_SEND_BUFFER = 1 << 17

#: Beyond it the connection that is open for the longest is let go for each new one; of those that
#: are being answered only where there are no others.
MOST_CONNECTIONS = 512

#: Connections that asyncio accepts in one go. It takes up to four goes until the first of them is
#: counted, or one that was let go is closed.
ACCEPTED_AT_ONCE = 16

#: Descriptors that connections never take: they are for the store, the collector and what waits
#: in the listening socket's queue.
_KEPT_DESCRIPTORS = 128


class HttpProtocol(H11Protocol):
    """HTTP/1.1, over TLS where the web configuration says so at the time of the connection.

    TLS is begun here and not by the event loop, so that a new certificate is that of the next
    connection, and a client that never ends its handshake counts like any other.
    """

    def __init__(self, *arguments: Any, authenticator: Authenticator, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._authenticator = authenticator
        self._handshake: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.connections.add(self)
        self._made_at = self.loop.time()
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER
        )
        self._next_check = self.loop.call_later(EXCHANGE_SECONDS, self._check, None)
        if len(self.connections) > _most_connections():
            oldest = min(
                (each for each in self.connections if isinstance(each, HttpProtocol)),
                key=lambda each: (each._is_answered, each._made_at),
            )
            self.connections.discard(oldest)  # connection_lost() comes only later.
            oldest.transport.abort()
        context = self._authenticator.tls
        if context is None:
            super().connection_made(transport)
        else:
            self._handshake = self.loop.create_task(self._greet(transport, context))

    async def _greet(self, transport: Any, context: ssl.SSLContext) -> None:
        try:
            # No time-out of its own: `_check` is one for all that a client may not do.
            secured: Any = await self.loop.start_tls(transport, self, context, server_side=True)
            names = _alternative_names(secured.get_extra_info("peercert") or {})
        except Exception:  # Of TLS, or of a certificate that is strange.
            secured = None
        if secured is None or not self._authenticator.allows(names):
            self._forget()
            transport.abort()
            return
        self._handshake = None
        super().connection_made(secured)
        # What came with the end of the handshake.
        for data in self._early:
            super().data_received(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._early.append(data)
        else:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    @property
    def _is_answered(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _forget(self) -> None:
        self._next_check.cancel()
        if self._taking is not None:
            self._taking.cancel()
        self.connections.discard(self)

    def _check(self, before: object) -> None:
        cycle = self.cycle
        # Closing means waiting for the client to take what it was sent, which it may never do.
        # A finished exchange that no other has followed: uvicorn closes what idles, so bytes come,
        # which make no request.
        if cycle is before or self.transport.is_closing():
            self.transport.abort()
        else:
            self._next_check = self.loop.call_later(EXCHANGE_SECONDS, self._check, cycle)


def _most_connections() -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(min(MOST_CONNECTIONS, descriptors - _KEPT_DESCRIPTORS), 1)


def _alternative_names(certificate: Mapping[str, Any]) -> set[str]:
    """As they are written in ``client_allowed_sans``; ``ssl`` writes IPv6 addresses in full. An
    address of a length that none has is no name."""
    names = set()
    for kind, name in certificate.get("subjectAltName", ()):
        if kind == "IP Address":
            with contextlib.suppress(ValueError):
                names.add(str(ipaddress.ip_address(name.strip())))
        elif kind in {"DNS", "email", "URI"}:
            names.add(name)
    return names
