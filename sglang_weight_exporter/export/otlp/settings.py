# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``OTEL_*`` and our own settings ask to be sent, where to, and how often."""

from __future__ import annotations

import base64
import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from sglang_weight_exporter.settings import Settings

logger = logging.getLogger("sglang_weight_exporter")

Signal = Literal["traces", "metrics", "logs"]
Exporter = Literal["otlp", "console"]
Temporality = Literal["cumulative", "delta", "lowmemory"]

_DEFAULT_METRIC_INTERVAL = 60_000
_DEFAULT_METRIC_TIMEOUT = 30_000
_DEFAULT_GRPC = "http://localhost:4317"
_DEFAULT_HTTP = "http://localhost:4318"
_DEFAULT_TIMEOUT = 10.0

#: From here on ``OTEL_EXPORTER_OTLP_TIMEOUT`` is in milliseconds, as the specification has it; less
#: is in seconds, as OpenTelemetry for Python has it. Nobody waits for 1000 s or gives 0.99 s.
_MILLISECONDS_FROM = 1000.0
_LONGEST_TIMEOUT = 3_600_000.0

#: A name of a header (RFC 9110).
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")


@dataclass(frozen=True)
class ConnectionSettings:
    """How to reach the collector for one signal; the signal's own variables win."""

    #: Without user and password, which are in ``headers``.
    endpoint: str
    headers: dict[str, str]
    #: ``gzip``, ``deflate`` (HTTP only) or empty.
    compression: str
    #: Seconds that a message may take, all in all.
    timeout: float
    #: Paths of PEM files, or empty.
    certificate: str
    client_certificate: str
    client_key: str
    #: Only for gRPC; ``None``: what the endpoint's scheme says.
    insecure: bool | None
    #: For HTTP: the URL of a proxy, or empty.
    proxy: str


@dataclass(frozen=True)
class SignalConfig:
    """How one signal is sent."""

    exporters: tuple[Exporter, ...]
    #: ``grpc``, as in OpenTelemetry for Python and in SGLang, or ``http/protobuf``, which is the
    #: default where grpcio is not installed. Another one is kept, and refused when it is used.
    protocol: str
    #: For messages to people: without user, password and path.
    destination: str
    connection: ConnectionSettings


def choose(environ: Mapping[str, str], signal: Signal) -> SignalConfig | None:
    """What the standard variables ask for; ``None``: nothing is sent.

    ``OTEL_TRACES_EXPORTER`` and ``OTEL_METRICS_EXPORTER`` decide. Without the first, spans are
    sent if an endpoint is set, the general one or that of traces. Without the second, metrics are
    sent only if an endpoint of metrics is set: whoever scrapes has them already. Logs are as spans,
    and asked for only where they carry the table.
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
    if not names and (own or (general and signal != "metrics")):
        names = {"otlp"}
    known: tuple[Exporter, ...] = ("otlp", "console")
    exporters = tuple(name for name in known if name in names)
    if unknown := names - {*known, "none", "prometheus"}:
        logger.warning(
            "OTEL_%s_EXPORTER=%r names %s, which is no exporter that is known here. It may be "
            "otlp, console, both with a comma between them, or none.",
            upper,
            asked,
            " and ".join(map(repr, sorted(unknown))),
        )
    if not exporters:
        return None
    try:
        connection = connection_settings(environ, signal, protocol)
        urlsplit(connection.endpoint).port  # noqa: B018  # It raises.
    except ValueError:
        logger.error(
            "The endpoint for %s, as OTEL_EXPORTER_OTLP_ENDPOINT or its form for %s has it, is no "
            "URL, so none are sent.",
            signal,
            signal,
        )
        return None
    to = {"otlp": urlsplit(connection.endpoint).netloc or connection.endpoint, "console": "console"}
    destination = " and ".join(to[name] for name in exporters).replace("console", "the console")
    return SignalConfig(exporters, protocol, destination, connection)


def connection_settings(
    environ: Mapping[str, str], signal: Signal, protocol: str
) -> ConnectionSettings:
    """``OTEL_EXPORTER_OTLP_*``; a variable that is empty counts as unset."""

    def value(name: str) -> tuple[str, str]:
        """The variable that counts, and what it says."""
        own, general = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", f"OTEL_EXPORTER_OTLP_{name}"
        variable = own if environ.get(own, "").strip() else general
        return variable, environ.get(variable, "").strip()

    own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "").strip()
    general = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    if protocol == "grpc":
        endpoint, compressions = own or general or _DEFAULT_GRPC, {"gzip"}
    else:
        endpoint = own or (general or _DEFAULT_HTTP).rstrip("/") + f"/v1/{signal}"
        compressions = {"gzip", "deflate"}
    compression = value("COMPRESSION")[1].lower()
    if compression not in {"", "none", *compressions}:
        logger.warning(
            "OTEL_EXPORTER_OTLP_COMPRESSION=%r is not one of none and %s, so %s are sent "
            "uncompressed.",
            compression,
            " and ".join(sorted(compressions)),
            signal,
        )
    insecure = value("INSECURE")[1].lower()
    endpoint, credentials = without_user(endpoint)
    return ConnectionSettings(
        endpoint=endpoint,
        headers=credentials | _headers(*value("HEADERS")),
        compression=compression if compression in compressions else "",
        timeout=_timeout(*value("TIMEOUT")),
        certificate=value("CERTIFICATE")[1],
        client_certificate=value("CLIENT_CERTIFICATE")[1],
        client_key=value("CLIENT_KEY")[1],
        insecure=None if not insecure else insecure == "true",
        proxy=_proxy(environ, endpoint),
    )


def without_user(url: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header that says them."""
    scheme, slashes, rest = url.rpartition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    if not at:
        return url, {}
    encoded = base64.b64encode(unquote(user).encode()).decode()
    return f"{scheme}{slashes}{host}{slash}{path}", {"authorization": f"Basic {encoded}"}


def _headers(variable: str, text: str) -> dict[str, str]:
    """``name=value,name=value``, percent-encoded."""
    headers = {}
    for number, entry in enumerate(filter(str.strip, text.split(",")), start=1):
        name, _, value = entry.partition("=")
        name, value = unquote(name).strip().lower(), unquote(value).strip()
        if "=" in entry and _HEADER.fullmatch(name) and value.isascii() and value.isprintable():
            headers[name] = value
        else:
            # What it is instead may be a secret.
            logger.error(
                "%s: entry %d is not name=value as OpenTelemetry defines it, with values "
                "percent-encoded (authorization=Bearer%%20…), so it is not sent.",
                variable,
                number,
            )
    return headers


def _timeout(variable: str, text: str) -> float:
    """Seconds."""
    if not text:
        return _DEFAULT_TIMEOUT
    try:
        number = float(text)
        if not 0 < number <= _LONGEST_TIMEOUT:
            raise ValueError
    except ValueError:
        logger.warning(
            "%s=%r is not a number of milliseconds up to an hour, so a collector has %g s.",
            variable,
            text,
            _DEFAULT_TIMEOUT,
        )
        return _DEFAULT_TIMEOUT
    unit = "milliseconds" if number >= _MILLISECONDS_FROM else "seconds"
    seconds = number / 1000 if unit == "milliseconds" else number
    logger.info(
        "%s=%s is taken for %s: a collector has %g s for a message.", variable, text, unit, seconds
    )
    return seconds


def _proxy(environ: Mapping[str, str], endpoint: str) -> str:
    """The proxy that the environment names for an endpoint, as Python and curl understand it."""

    def value(name: str) -> str:
        return environ.get(name, "").strip() or environ.get(name.upper(), "").strip()

    parts = urlsplit(endpoint)
    for entry in filter(None, map(str.strip, value("no_proxy").lower().split(","))):
        name = entry.partition(":")[0] if entry.count(":") == 1 else entry
        if name == "*" or f".{parts.hostname}".endswith(f".{name.lstrip('*.')}"):
            return ""
    return value(f"{parts.scheme}_proxy") or value("all_proxy")


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
    """Seconds between two times at which metrics are sent."""
    return _seconds(environ, "OTEL_METRIC_EXPORT_INTERVAL", _DEFAULT_METRIC_INTERVAL)


def metric_timeout(environ: Mapping[str, str]) -> float:
    """Seconds that all messages of one time may take."""
    return _seconds(environ, "OTEL_METRIC_EXPORT_TIMEOUT", _DEFAULT_METRIC_TIMEOUT)


def _seconds(environ: Mapping[str, str], variable: str, default: float) -> float:
    text = environ.get(variable, "").strip()
    try:
        milliseconds = float(text or default)
        if not 0 < milliseconds < float("inf"):
            raise ValueError
    except ValueError:
        logger.warning(
            "%s=%r is not a number of milliseconds, so it is %d.", variable, text, default
        )
        milliseconds = default
    return milliseconds / 1000


def metric_temporality(environ: Mapping[str, str]) -> Temporality:
    """What totals count from. A histogram that is asked for in another form is refused in words."""
    histogram = environ.get("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "").strip()
    if histogram.lower() not in {"", "explicit_bucket_histogram"}:
        logger.warning(
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION=%r is not followed: ranks "
            "count in fixed buckets, and those are sent (explicit_bucket_histogram).",
            histogram,
        )
    variable = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    asked = environ.get(variable, "").strip().lower()
    if asked == "delta":
        return "delta"
    if asked == "lowmemory":
        return "lowmemory"
    if asked not in {"", "cumulative"}:
        logger.warning(
            "%s=%r is not one of cumulative, delta and lowmemory, so it is cumulative.",
            variable,
            asked,
        )
    return "cumulative"
