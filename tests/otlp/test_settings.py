# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Variables of OpenTelemetry: understood as the specification has them, or refused in words."""

from __future__ import annotations

import logging

import pytest

from sglang_weight_exporter.export.otlp.settings import (
    choose,
    connection_settings,
    metric_interval,
    metric_temporality,
    metric_timeout,
)

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("text", "seconds", "unit"),
    [
        ("10000", 10.0, "milliseconds"),  # The specification's default.
        ("1000", 1.0, "milliseconds"),
        ("2500.5", 2.5005, "milliseconds"),
        ("10", 10.0, "seconds"),  # That of OpenTelemetry for Python.
        ("0.5", 0.5, "seconds"),
        ("1e4", 10.0, "milliseconds"),
    ],
)
def test_a_timeout_is_in_the_unit_that_its_value_makes_sense_in(
    text: str, seconds: float, unit: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = connection_settings({"OTEL_EXPORTER_OTLP_TIMEOUT": text}, "traces", "grpc")
    assert settings.timeout == seconds
    assert caplog.messages == [
        f"OTEL_EXPORTER_OTLP_TIMEOUT={text} is taken for {unit}: a collector has {seconds:g} s for "
        "a message."
    ]


@pytest.mark.parametrize("text", ["0", "-1", "10s", "nan", "inf", "1e300"])
def test_a_timeout_that_is_none_is_refused_in_words(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": text}
    assert connection_settings(environ, "traces", "grpc").timeout == 10.0
    assert f"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT='{text}' is not a number" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer hunter2",
        "authorization=Bearer%20hunter2%0Ax",
        "authorization=hunter2%E2%82%AC",
        "hunter2",
        "=hunter2",
        "api key=hunter2",
    ],
)
def test_headers_in_another_form_are_refused_and_not_printed(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": f"tenant=one,{text}"}
    assert connection_settings(environ, "traces", "grpc").headers == {"tenant": "one"}
    (line,) = caplog.messages
    assert line.startswith("OTEL_EXPORTER_OTLP_HEADERS: entry 2 is not name=value")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("asked", "exporters"),
    [
        ("otlp", ("otlp",)),
        (" OTLP ", ("otlp",)),
        ("otlp,console", ("otlp", "console")),
        ("console, otlp", ("otlp", "console")),
        ("console", ("console",)),
        ("none,otlp", ("otlp",)),
        ("otlp,zipkin", ("otlp",)),
        ("", ("otlp",)),
        ("none", None),
        ("prometheus", None),
        ("zipkin", None),
    ],
)
def test_exporters(
    asked: str, exporters: tuple[str, ...] | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = choose({**ENDPOINT, "OTEL_TRACES_EXPORTER": asked}, "traces")
    assert (config and config.exporters) == exporters
    assert ("'zipkin', which is no exporter" in caplog.text) == ("zipkin" in asked)


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://collector:hunter2/", "http://a:99999"])
def test_an_endpoint_that_is_no_url_is_refused_and_not_printed(
    endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}, "traces") is None
    (line,) = caplog.messages
    assert "is no URL" in line
    assert "hunter2" not in line


def test_metrics_settings_are_followed_or_refused_in_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prefix = "OTEL_EXPORTER_OTLP_METRICS_"
    assert metric_interval({"OTEL_METRIC_EXPORT_INTERVAL": "1500"}) == 1.5
    assert metric_timeout({}) == 30.0
    assert metric_timeout({"OTEL_METRIC_EXPORT_TIMEOUT": "1500"}) == 1.5
    for asked in ("cumulative", "Delta", "LowMemory"):
        assert metric_temporality({f"{prefix}TEMPORALITY_PREFERENCE": asked}) == asked.lower()
    aggregation = f"{prefix}DEFAULT_HISTOGRAM_AGGREGATION"
    assert metric_temporality({aggregation: "explicit_bucket_histogram"}) == "cumulative"
    assert not caplog.messages
    assert metric_timeout({"OTEL_METRIC_EXPORT_TIMEOUT": "soon"}) == 30.0
    assert metric_temporality({f"{prefix}TEMPORALITY_PREFERENCE": "both"}) == "cumulative"
    assert metric_temporality({aggregation: "base2_exponential_bucket_histogram"}) == "cumulative"
    assert [line.partition("=")[0] for line in caplog.messages] == [
        "OTEL_METRIC_EXPORT_TIMEOUT",
        f"{prefix}TEMPORALITY_PREFERENCE",
        aggregation,
    ]
