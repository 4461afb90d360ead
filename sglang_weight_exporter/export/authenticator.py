# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The web configuration in force: which connection, which request and which user are admitted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Set
from contextlib import asynccontextmanager

from sglang_weight_exporter.export.web_configuration import WebConfiguration

#: bcrypt knows no more of a password.
_MOST_OF_A_PASSWORD = 72

#: How many passwords of one client wait to be checked, and of how many clients.
_WAITING_OF_A_CLIENT, _WAITING_CLIENTS = 16, 64


class BusyError(Exception):
    """More passwords wait to be checked than are admitted."""


class _Turns:
    """One check at a time, for it takes a core; clients take turns, so that whoever tries many
    passwords waits for those of his own."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._taken = False

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Raises :class:`BusyError`."""
        mine = self._waiting.get(client, deque())
        crowded = client not in self._waiting and len(self._waiting) >= _WAITING_CLIENTS
        if crowded or len(mine) >= _WAITING_OF_A_CLIENT:
            raise BusyError
        turn = asyncio.get_running_loop().create_future()
        mine.append(turn)
        self._waiting[client] = mine
        self._next()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._taken = False
                self._next()

    def _next(self) -> None:
        while not self._taken and self._waiting:
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            turn = queue.popleft()
            if queue:
                self._waiting[client] = queue  # Behind all others.
            if not turn.done():
                self._taken = True
                turn.set_result(None)


def _neighbourhood(address: str) -> str:
    """An IPv4 address, or the network of an IPv6 address that a single host has."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((parsed, 64), strict=False))
    return address


class Authenticator:
    """Asked by connections and requests of one event loop, for each of them anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turns = _Turns()
        self._secret = os.urandom(32)
        #: Of each user the credentials that were right last, as a keyed digest: bcrypt costs as
        #: much as some hundred scrapes.
        self._verified: dict[str, bytes] = {}
        self.configuration = WebConfiguration()
        self.use(self.configuration)

    def use(self, configuration: WebConfiguration) -> None:
        """Have another configuration in force from now on. Who was verified with a hash that stays
        is not checked again."""
        users, self.configuration = self.configuration.users, configuration
        self._tokens = float(configuration.burst)
        self._counted_at = self._clock()
        self._verified = {
            user: digest
            for user, digest in self._verified.items()
            if configuration.users.get(user) == users.get(user)
        }

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For the next connection; ``None``: plain HTTP."""
        return self.configuration.tls

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What each answer carries besides its own."""
        headers = self.configuration.headers
        return [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    def allows(self, alternative_names: Set[str]) -> bool:
        """Whether a client whose certificate has these names may connect."""
        allowed = self.configuration.allowed_sans
        return not allowed or bool(allowed & alternative_names)

    def is_within_rate(self) -> bool:
        """Whether one more request may come now: a token bucket."""
        interval, burst = self.configuration.interval, self.configuration.burst
        if not interval:
            return True
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._counted_at) / interval, burst)
        self._counted_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    async def admits(self, authorization: str, client: str = "") -> bool:
        """Whether a request with this header (RFC 7617) may see what is served. ``client``: its
        address. Raises :class:`BusyError`."""
        users = self.configuration.users
        if not users:
            return True
        user, password = _credentials(authorization)
        # Who is not known is checked like the others, so that the time it takes says nothing.
        hashed = users.get(user) or next(iter(users.values()))
        digest = hmac.digest(self._secret, hashed.encode() + b"\0" + password, hashlib.sha256)
        if hmac.compare_digest(self._verified.get(user, b""), digest):
            return True
        if not authorization:
            return False
        async with self._turns.turn(_neighbourhood(client)):
            right = await asyncio.to_thread(_matches, password, hashed)
        # The configuration may have become another meanwhile.
        if not right or self.configuration.users.get(user) != hashed:
            return False
        self._verified[user] = digest
        return True


def _credentials(authorization: str) -> tuple[str, bytes]:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return "", b""
    try:
        user, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return user.decode(), password
    except (binascii.Error, ValueError):
        return "", b""


def _matches(password: bytes, hashed: str) -> bool:
    # Of the extra `web`, without which no configuration with users is accepted.
    import bcrypt

    try:
        return bcrypt.checkpw(password[:_MOST_OF_A_PASSWORD], hashed.encode())
    except ValueError:  # A NUL, in which bcrypt's passwords end.
        return False
