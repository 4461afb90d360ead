# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""OTLP over gRPC: a call a message, and what its answer means."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.otlp.client import ExportResult, partial_success
from sglang_weight_exporter.export.otlp.settings import ConnectionSettings

#: The codes after which OTLP allows to send a message again. ``RESOURCE_EXHAUSTED`` is one where
#: the collector says when.
_RETRYABLE = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class GrpcTransport:
    """``service``: the name of OTLP's service; ``response``: the type of its answer.

    Raises ``OSError`` where a certificate cannot be read.
    """

    def __init__(self, settings: ConnectionSettings, service: str, response: type[Any]) -> None:
        self._headers = tuple(settings.headers.items())
        parts = urlsplit(settings.endpoint)
        target = parts.netloc or settings.endpoint
        compression = (
            grpc.Compression.Gzip
            if settings.compression == "gzip"
            else grpc.Compression.NoCompression
        )
        options = (("grpc.primary_user_agent", f"sglang-weight-exporter/{__version__}"),)
        insecure = parts.scheme == "http" if settings.insecure is None else settings.insecure
        if insecure and parts.scheme != "https":
            self._channel = grpc.insecure_channel(target, options, compression)
        else:
            credentials = grpc.ssl_channel_credentials(
                _content(settings.certificate),
                _content(settings.client_key),
                _content(settings.client_certificate),
            )
            self._channel = grpc.secure_channel(target, credentials, options, compression)
        self._export: Any = self._channel.unary_unary(
            f"/{service}/Export", response_deserializer=response.FromString
        )

    def send(self, body: bytes, seconds: float) -> ExportResult:
        """Send a message."""
        try:
            response = self._export(body, metadata=self._headers, timeout=seconds)
        except grpc.RpcError as error:
            code, wait = error.code(), _retry_after(error)
            return ExportResult(
                False,
                f"{code.name}: {error.details()}",
                retry_after=wait or 0.0,
                retryable=code in _RETRYABLE
                or (code is grpc.StatusCode.RESOURCE_EXHAUSTED and wait is not None),
            )
        return partial_success(response)

    def close(self) -> None:
        self._channel.close()


def _content(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def _retry_after(error: Any) -> float | None:
    """Seconds from a ``google.rpc.RetryInfo`` in the details of a status, as OTLP has it; ``None``
    without one."""
    try:
        from google.rpc.error_details_pb2 import RetryInfo
        from google.rpc.status_pb2 import Status
    except ImportError:  # Some environments have grpcio without googleapis-common-protos.
        return None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return max(0.0, float(info.retry_delay.ToTimedelta().total_seconds()))
            except DecodeError:
                continue
    return None
