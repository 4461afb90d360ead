# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""No secret of the environment, and none that a peer says, is ever in the log.

Secrets are thrown at everything that logs, and the log is what its handler writes.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from http_servers import Handler, LocalServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)
from ports import free_port
from ranks import Rank, rows
from waiting import eventually

from sglang_weight_exporter.export.following import Followers
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.otlp.pipeline import OtlpPipeline
from sglang_weight_exporter.export.otlp.settings import choose
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.process_log import HIDDEN, HidingFormatter, Secrets
from sglang_weight_exporter.publisher.exporter_process import Supervisor
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

#: What tokens and passwords are made of; long enough to be no ordinary word.
SECRETS = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=",;\"'<>()"),
    min_size=12,
    max_size=40,
).map(lambda text: f"s3{text}")


class Echo(LocalServer):
    """A peer that says what it was told, in every place that it has."""

    def __init__(self) -> None:
        self.status = 503
        self.text = ""
        echo = self

        class EchoHandler(Handler):
            def do_POST(self) -> None:
                self.read_body()
                told = f"{self.headers} {self.path} {echo.text}".replace("\n", " ")
                told = told.replace("\r", " ")
                body = f"You said {told}".encode()
                kind = "text/plain"
                if echo.status == 200:
                    partial = ExportTracePartialSuccess(rejected_spans=1, error_message=told)
                    body = ExportTraceServiceResponse(partial_success=partial).SerializeToString()
                    kind = "application/x-protobuf"
                location = f"http://{echo.text}@login?token={echo.text}"
                headers = {"Content-Type": kind, "Location": location}
                self.reply(body, echo.status, headers, told[:200])

        super().__init__(EchoHandler)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    started = Echo()
    yield started
    started.stop()


class Log:
    """What comes out of a handler, as `serve` sets it up."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._stream = io.StringIO()
        self._handler = logging.StreamHandler(self._stream)
        self._handler.setFormatter(HidingFormatter("%(levelname)s %(message)s", Secrets(environ)))

    def __enter__(self) -> Log:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        root.addHandler(self._handler)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)

    @property
    def text(self) -> str:
        return self._stream.getvalue()


def environments(secret: str, place: str) -> Iterator[dict[str, str]]:
    """Every way in which a secret gets into the settings, in the right form and in wrong ones."""
    endpoint, headers = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"
    encoded = quote(secret, safe="")
    plain = {endpoint: f"http://{place}"}
    basic = base64.b64encode(f"user:{secret}".encode()).decode()
    yield {**plain, headers: f"authorization=Bearer%20{encoded}"}
    yield {**plain, headers: f"Authorization: Bearer {secret}"}
    yield {**plain, headers: f"authorization=Basic%20{basic}"}
    yield {**plain, headers: f"x-scope=one,api-key={encoded}"}
    yield {**plain, "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"api-key={encoded}%0D%0Ax"}
    yield {endpoint: f"http://user:{encoded}@{place}"}
    yield {endpoint: f"http://{encoded}@{place}"}
    yield {endpoint: f"user:{encoded}@{place}"}
    yield {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{place}/v1/traces?api_key={encoded}"}
    yield {endpoint: f"http://host:{encoded}/"}
    yield {endpoint: "http://elsewhere.invalid", "http_proxy": f"http://user:{encoded}@{place}"}
    yield {**plain, "HF_TOKEN": secret, "SGLANG_API_KEY": secret}


def said_in(secret: str) -> set[str]:
    """What would give it away."""
    return {secret, quote(secret), quote(secret, safe="")}


@settings(fuzzed, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10")))
@given(secret=SECRETS, status=st.sampled_from([200, 302, 401, 503]), listens=st.booleans())
@example(secret="s3CRETTOKEN1234", status=503, listens=False)
def test_no_secret_is_in_the_log_whatever_a_collector_says(
    secret: str, status: int, listens: bool, echo: Echo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    echo.status, echo.text = status, secret
    place = echo.place if listens else "127.0.0.1:1"
    for protocol in ("http/protobuf", "grpc" if status == 503 else "http/protobuf"):
        for environ in environments(secret, place):
            environ |= {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
            environ |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "5"}
            with Log(environ) as log:
                snapshots = SnapshotReader(RuntimeDir(tmp_path_factory.getbasetemp() / "none"))
                pipeline = OtlpPipeline(
                    snapshots,
                    Settings(),
                    environ,
                    read=lambda: HostView(snapshots=()),
                    counts=SpanCounts(),
                    guard=Guard(),
                    followers=Followers(),
                )
                for client in pipeline.clients:
                    client.take(b"")
                    client.close()
                logging.getLogger("urllib3").warning("Retry after %s", environ)
                try:
                    raise ValueError(environ)
                except ValueError:
                    logging.getLogger("asyncio").exception("Something went wrong")
            for form in said_in(secret):
                assert form not in log.text
            assert "Something went wrong" in log.text
            assert choose(environ, "metrics") is None


@fuzzed
@given(secret=SECRETS, before=st.integers(0, 600))
def test_no_half_of_a_secret_is_left_where_a_reason_is_cut(secret: str, before: int) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": f"api-key={quote(secret, safe='')}"}
    hidden = Secrets(environ).hide("x" * before + secret + "y" * 600)
    assert secret[:6] not in hidden[:500] or HIDDEN in hidden


def test_what_an_interpreter_says_of_a_crash_comes_without_secrets(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes past the exporter's log into the pipe, and the rank that reads it knows them too."""
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=s3CRETTOKEN1234"}
    crash = [sys.executable, "-c", "raise KeyError('s3CRETTOKEN1234')"]
    supervisor = Supervisor(RuntimeDir(runtime_dir), environ, come_back=lambda: None)
    with subprocess.Popen(
        crash, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        supervisor._relay(process)
    assert f"KeyError: '{HIDDEN}'" in caplog.text
    assert "s3CRETTOKEN1234" not in caplog.text


def test_an_address_without_a_port_is_no_secret() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.monitoring"}
    said = "The collector at collector.monitoring does not answer."
    assert Secrets(environ).hide(said) == said


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("GET http://user:pw@host/a?b=c d", f"GET http://{HIDDEN}@host/a?{HIDDEN} d"),
        ("with url: /v1/traces?api_key=k (Caused by", f"with url: /v1/traces?{HIDDEN} (Caused by"),
        ("{'authorization': 'Bearer abc'}", f"{{'authorization': 'Bearer {HIDDEN}'}}"),
        ("Proxy-Authorization: Basic abc", f"Proxy-Authorization: Basic {HIDDEN}"),
        ("it answered \x1b[31mred\x1b[0m", "it answered \ufffd[31mred\ufffd[0m"),
        ("Is it there? Yes, a=b.", "Is it there? Yes, a=b."),
        (
            "metrics are at http://127.0.0.1:9400/metrics",
            "metrics are at http://127.0.0.1:9400/metrics",
        ),
        ("Traceback:\n  line\tcolumn", "Traceback:\n  line\tcolumn"),
    ],
)
def test_secrets_of_others_are_told_by_their_form(text: str, hidden: str) -> None:
    assert Secrets({}).hide(text) == hidden


def test_ordinary_words_stay(tmp_path: Any) -> None:
    environ = {"TOKENIZERS_PARALLELISM": "false", "OTEL_EXPORTER_OTLP_HEADERS": "x-scope=1"}
    assert Secrets(environ).hide("1 of 2 is false") == "1 of 2 is false"


def test_a_process_prints_none(runtime_dir: Any, rank: Rank, start_exporter: Any) -> None:
    rank.load(rows(2))
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://user:secret-pw@127.0.0.1:{free_port()}",
        OTEL_EXPORTER_OTLP_HEADERS="Authorization: Bearer secret-token",
    )
    eventually(lambda: "does not take spans" in exporter.log(), what="a failed try")
    assert "entry 1 is not name=value" in exporter.log()
    assert "secret" not in exporter.log()
