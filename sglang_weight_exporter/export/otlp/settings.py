# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``OTEL_*`` and our own settings ask to be sent, where to, and how often."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from sglang_weight_exporter.settings import Settings

logger = logging.getLogger("sglang_weight_exporter")

Signal = Literal["traces", "metrics"]

_DEFAULT_METRIC_INTERVAL = 60_000
_DEFAULT_GRPC = "http://localhost:4317"
_DEFAULT_HTTP = "http://localhost:4318"
_DEFAULT_TIMEOUT = 10.0


@dataclass(frozen=True)
class SignalConfig:
    """How one signal is sent."""

    exporter: Literal["otlp", "console"]
    #: ``grpc``, as in OpenTelemetry for Python and in SGLang, or ``http/protobuf``, which is the
    #: default where grpcio is not installed. Another one is kept, and refused when it is used.
    protocol: str
    #: For messages to people: without user, password and path.
    destination: str


def choose(environ: Mapping[str, str], signal: Signal) -> SignalConfig | None:
    """What the standard variables ask for; ``None``: nothing is sent.

    ``OTEL_TRACES_EXPORTER`` and ``OTEL_METRICS_EXPORTER`` decide. Without the first, spans are
    sent if an endpoint is set, the general one or that of traces. Without the second, metrics are
    sent only if an endpoint of metrics is set: whoever scrapes has them already.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    upper = signal.upper()
    own = environ.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT", "").strip()
    general = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    asked = environ.get(f"OTEL_{upper}_EXPORTER", "").strip().lower()
    names = {name.strip() for name in asked.split(",")} - {""}
    protocol = (
        environ.get(f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL", "").strip()
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip()
        or ("grpc" if importlib.util.find_spec("grpc") else "http/protobuf")
    )
    if not names and (own or (general and signal == "traces")):
        names = {"otlp"}
    if "otlp" in names:
        default = _DEFAULT_HTTP if protocol == "http/protobuf" else _DEFAULT_GRPC
        return SignalConfig("otlp", protocol, _without_secrets(own or general or default))
    if "console" in names:
        return SignalConfig("console", "", "the console")
    unknown = names - {"none", "prometheus"}
    if unknown:
        logger.warning(
            "OTEL_%s_EXPORTER=%r names no exporter that is known here, so no %s are sent. Set it "
            "to otlp, console or none.",
            upper,
            asked,
            signal,
        )
    return None


@dataclass(frozen=True)
class ConnectionSettings:
    """How to reach the collector for one signal; the signal's own variables win."""

    endpoint: str
    #: As the variable has them: ``name=value,name=value``, percent-encoded.
    headers: str
    #: ``gzip``, ``deflate`` (HTTP only) or empty.
    compression: str
    #: Seconds, as in OpenTelemetry for Python.
    timeout: float
    #: Paths of PEM files, or empty.
    certificate: str
    client_certificate: str
    client_key: str
    #: Only for gRPC; ``None``: what the endpoint's scheme says.
    insecure: bool | None


def connection_settings(
    environ: Mapping[str, str], signal: Signal, protocol: str
) -> ConnectionSettings:
    """``OTEL_EXPORTER_OTLP_*``; a variable that is empty counts as unset."""

    def value(name: str) -> str:
        own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", "").strip()
        return own or environ.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()

    own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "").strip()
    general = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    if protocol == "grpc":
        endpoint, compressions = own or general or _DEFAULT_GRPC, {"gzip"}
    else:
        path = f"/v1/{signal}"
        endpoint = own or (general or _DEFAULT_HTTP).rstrip("/") + path
        compressions = {"gzip", "deflate"}
    compression = value("COMPRESSION").lower()
    if compression not in {"", "none", *compressions}:
        logger.warning(
            "OTEL_EXPORTER_OTLP_COMPRESSION=%r is not one of none and %s, so %s are sent "
            "uncompressed.",
            compression,
            " and ".join(sorted(compressions)),
            signal,
        )
    insecure = value("INSECURE").lower()
    return ConnectionSettings(
        endpoint=endpoint,
        headers=value("HEADERS"),
        compression=compression if compression in compressions else "",
        timeout=_timeout(value("TIMEOUT")),
        certificate=value("CERTIFICATE"),
        client_certificate=value("CLIENT_CERTIFICATE"),
        client_key=value("CLIENT_KEY"),
        insecure=None if not insecure else insecure == "true",
    )


def _timeout(text: str) -> float:
    try:
        seconds = float(text or _DEFAULT_TIMEOUT)
        if not 0 < seconds < float("inf"):
            raise ValueError
    except ValueError:
        logger.warning(
            "OTEL_EXPORTER_OTLP_TIMEOUT=%r is not a number of seconds, so a collector has %d.",
            text,
            _DEFAULT_TIMEOUT,
        )
        return _DEFAULT_TIMEOUT
    return seconds


def _without_secrets(endpoint: str) -> str:
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    return parts.netloc.rpartition("@")[2] or endpoint


def table_selection(settings: Settings) -> tuple[bool, re.Pattern[str] | None]:
    """Whether spans carry the table, and the names it is cut down to."""
    if not settings.span_table or not settings.span_table_names:
        return settings.span_table, None
    try:
        return True, re.compile(settings.span_table_names)
    except re.error as error:
        logger.error(
            "SGLANG_WEIGHT_EXPORTER_SPAN_TABLE_NAMES=%r is not a regular expression (%s), so spans "
            "carry no table: more than was asked for must not leave this host.",
            settings.span_table_names,
            error,
        )
        return False, None


def metric_interval(environ: Mapping[str, str]) -> float:
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    try:
        milliseconds = float(text or _DEFAULT_METRIC_INTERVAL)
        if not 0 < milliseconds < float("inf"):
            raise ValueError
    except ValueError:
        logger.warning(
            "OTEL_METRIC_EXPORT_INTERVAL=%r is not a number of milliseconds, so metrics are sent "
            "once a minute.",
            text,
        )
        milliseconds = _DEFAULT_METRIC_INTERVAL
    return milliseconds / 1000
