# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""OTLP over HTTP (``http/protobuf``): a POST a message, and what its answer means."""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.util.re import parse_env_headers

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.otlp.client import ExportResult, Request, partial_success
from sglang_weight_exporter.export.otlp.settings import ConnectionSettings

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}

#: An answer says whether a message was taken and is a few bytes long.
_LARGEST_ANSWER = 2**20


class HttpTransport:
    """``response``: the type of the answer, ``ExportTraceServiceResponse`` or
    ``ExportMetricsServiceResponse``."""

    def __init__(self, settings: ConnectionSettings, response: type[Any]) -> None:
        self._settings = settings
        self._response = response
        self._session = requests.Session()
        self._session.headers.update(
            {
                "User-Agent": f"sglang-weight-exporter/{__version__}",
                "Content-Type": "application/x-protobuf",
                **parse_env_headers(settings.headers, liberal=True),
            }
        )
        self._compress = _COMPRESS.get(settings.compression)
        if self._compress is not None:
            self._session.headers["Content-Encoding"] = settings.compression
        if settings.client_certificate and settings.client_key:
            self._session.cert = (settings.client_certificate, settings.client_key)
        elif settings.client_certificate:
            self._session.cert = settings.client_certificate

    def send(self, request: Request) -> ExportResult:
        """Send a message. Raises ``OSError`` (as ``requests.RequestException`` is one)."""
        body = request.SerializeToString()
        with self._session.post(
            self._settings.endpoint,
            data=body if self._compress is None else self._compress(body),
            timeout=self._settings.timeout,
            # A login page is where a redirect leads, and it answers 200.
            allow_redirects=False,
            # Here and not in the session, where REQUESTS_CA_BUNDLE would win.
            verify=self._settings.certificate or None,
            stream=True,
        ) as response:
            content = response.raw.read(_LARGEST_ANSWER, decode_content=True)
            if 200 <= response.status_code < 300:
                return self._success(response, content)
            reason = f"it answered {response.status_code} {response.reason}"
            if location := response.headers.get("Location"):
                reason += f" and refers to {location.partition('?')[0]}, which is not followed"
            if content and "text/plain" in response.headers.get("Content-Type", ""):
                reason += f": {content[:500].decode(errors='replace').strip()}"
            return ExportResult(False, reason, retry_after=_retry_after(response))

    def _success(self, response: requests.Response, content: bytes) -> ExportResult:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        message = self._response()
        try:
            if kind == "application/json":
                json_format.Parse(content or b"{}", message, ignore_unknown_fields=True)
            elif kind == "application/x-protobuf" or not (kind or content):
                message.ParseFromString(content)
            else:
                return ExportResult(
                    False,
                    f"it answered {response.status_code} with {kind or 'something'} and not with "
                    "an answer of OTLP's, so it is no collector",
                )
        except (DecodeError, json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
            return ExportResult(False, f"its answer is none of OTLP's ({error})")
        return partial_success(message)

    def close(self) -> None:
        self._session.close()


def _retry_after(response: requests.Response) -> float:
    """``Retry-After`` in seconds from now; it may be a time as well."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
