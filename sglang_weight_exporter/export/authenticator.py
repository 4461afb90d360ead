# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The web configuration in force: which connection, which request and which user are admitted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import ssl
import time
from collections.abc import Callable, Set

from sglang_weight_exporter.export.web_configuration import WebConfiguration

#: bcrypt knows no more of a password.
_MOST_OF_A_PASSWORD = 72


class Authenticator:
    """Asked by connections and requests of one event loop, for each of them anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checking = asyncio.Lock()
        self._secret = os.urandom(32)
        self.use(WebConfiguration())

    def use(self, configuration: WebConfiguration) -> None:
        """Have another configuration in force from now on."""
        self.configuration = configuration
        self._tokens = float(configuration.burst)
        self._counted_at = self._clock()
        #: Of each user the credentials that were right last, as a keyed digest: bcrypt costs as
        #: much as some hundred scrapes.
        self._verified: dict[str, bytes] = {}

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

    async def admits(self, authorization: str) -> bool:
        """Whether a request with this header (RFC 7617) may see what is served."""
        users = self.configuration.users
        if not users:
            return True
        user, password = _credentials(authorization)
        # Who is not known is checked like the others, so that time tells nothing.
        hashed = users.get(user) or next(iter(users.values()))
        digest = hmac.digest(self._secret, hashed.encode() + b"\0" + password, hashlib.sha256)
        if hmac.compare_digest(self._verified.get(user, b""), digest):
            return True
        if not authorization:
            return False
        async with self._checking:  # One at a time: it takes a core.
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
