# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``OTEL_*`` and our own settings ask to be sent, where to, and how often."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Choice:
    """How one signal is sent."""

    exporter: Literal["otlp", "console"]
    #: ``grpc``, as in OpenTelemetry for Python and in SGLang, or ``http/protobuf``. Another one
    #: is kept, and refused when it is to be used.
    protocol: str
    #: For messages to people: without user, password and path.
    destination: str


def choose(environ: Mapping[str, str], signal: Signal) -> Choice | None:
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
        or "grpc"
    )
    if not names and (own or (general and signal == "traces")):
        names = {"otlp"}
    if "otlp" in names:
        default = (
            "http://localhost:4318" if protocol == "http/protobuf" else "http://localhost:4317"
        )
        return Choice("otlp", protocol, _without_secrets(own or general or default))
    if "console" in names:
        return Choice("console", "", "the console")
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
