# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What reads bytes that others wrote takes what is valid, refuses the rest in words, and does
nothing else.

Each test tries some hundred inputs. For longer: `FUZZ_EXAMPLES=1000000 pytest tests/fuzz`. An input
that broke something stays here as an `@example`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from google.protobuf.json_format import MessageToDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import as_json, changed_bytes, changed_values, filled, packed
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from ranks import rows
from serving import Exporter
from waiting import LIMIT

from sglang_weight_exporter.cli.status import _print_rank
from sglang_weight_exporter.cli.status_last import _rank as _lines_of
from sglang_weight_exporter.cli.table_at import ended_places, print_owners
from sglang_weight_exporter.cli.trace_reader import TraceError, tables_from_trace
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.otlp.black_box_spans import black_box_spans
from sglang_weight_exporter.export.otlp.metrics import messages
from sglang_weight_exporter.export.otlp.spans import event_spans
from sglang_weight_exporter.export.otlp.temporality import Totals
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.export.web_configuration import (
    WebConfigurationError,
    WebConfigurationSource,
)
from sglang_weight_exporter.records.base import SCHEMA_VERSION
from sglang_weight_exporter.records.black_box import BlackBox
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.records.updates import Histogram
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.decoding import UnreadableError, decode, decode_snapshot
from sglang_weight_exporter.store.ended import EndedRank
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.weight_table import (
    WeightTable,
    compare_tables,
    table_of_rows,
    table_regions,
    table_rows,
)
from sglang_weight_exporter.weight_table_events import encode_table

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

pytestmark = pytest.mark.slow

PATH = Path("file")
HISTOGRAM = msgspec.to_builtins(Histogram().observe(0.5))
TABLE = table_of_rows(rows(5), role="target", captured_at=1.0)


def valid(kind: Any) -> Any:
    """Every field of a record, so that it is read without a complaint."""
    document = json.loads(
        json.dumps(filled(kind), default=lambda value: value.hex())
        .replace('"trace_id": "a"', f'"trace_id": "{"a" * 32}"')
        .replace('"sha256": "a"', f'"sha256": "{"a" * 64}"')
        .replace('"fingerprint": "a"', f'"fingerprint": "{"a" * 32}"')
    )
    document["schema"] = SCHEMA_VERSION

    def mend(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == set(HISTOGRAM):
                return HISTOGRAM
            return {key: mend(each) for key, each in node.items()}
        return [mend(each) for each in node] if isinstance(node, list) else node

    return mend(document)


SNAPSHOT, EVENT, BLACK_BOX = valid(Snapshot), valid(Event), valid(BlackBox)

#: Each number is one that can be sent, and their sum is none.
ROLE_OF_HUGE_NUMBERS = json.loads(
    json.dumps(SNAPSHOT["roles"][0]).replace('"nbytes": 1', f'"nbytes": {2**63 - 1}')
)


#: What is in use elsewhere is more than can be sent.
HUGE_BLACK_BOX = json.loads(
    json.dumps(BLACK_BOX)
    .replace('"released": 1', f'"released": {2**63 - 1}')
    .replace('"total": 1', f'"total": {2**63 - 1}')
)

#: Of whose lists no entry may count twice.
TWICE = {name: value * 2 if isinstance(value, list) else value for name, value in SNAPSHOT.items()}
ROLE_TWICE = {
    name: value * 2 if isinstance(value, list) else value
    for name, value in SNAPSHOT["roles"][0].items()
}


def test_what_is_changed_is_valid_before() -> None:
    assert len(decode_snapshot(packed(SNAPSHOT), PATH).roles) == 1
    assert decode(packed(EVENT), Event, PATH).update.trace_id == "a" * 32
    assert len(decode(packed(BLACK_BOX), BlackBox, PATH).errors) == 1
    assert decode(msgspec.msgpack.encode(TABLE), WeightTable, PATH) == TABLE


@fuzzed
@given(st.one_of(changed_values(SNAPSHOT).map(packed), changed_bytes(packed(SNAPSHOT))))
@example(content=packed({**SNAPSHOT, "roles": [ROLE_OF_HUGE_NUMBERS]}))
@example(content=packed(TWICE))
@example(content=packed({**SNAPSHOT, "roles": [ROLE_TWICE]}))
@example(
    content=packed(SNAPSHOT).replace(b"a" * 32 + b"\xb3fingerprint", b"x" * 32 + b"\xb3fingerprint")
)
def test_a_snapshot_is_refused_or_can_be_scraped_sent_and_printed(content: bytes) -> None:
    try:
        snapshot = decode_snapshot(content, PATH)
    except UnreadableError:
        return
    view = HostView(snapshots=(snapshot,))
    exposition = Exposition(
        lambda: view, CollectorRegistry(), exemplars=lambda: True, guard=Guard()
    )
    text = asyncio.run(exposition.scrape(openmetrics=True, gzip=False)).decode()
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    assert "sglang_weight_exporter_ranks" in {each.name for each in samples}
    series = [(each.name, *sorted(each.labels.items())) for each in samples]
    assert len(series) == len(set(series))
    for message in messages(view, Resource({}), Totals("cumulative", since=0.0)):
        assert encode_metrics(message).SerializeToString()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _print_rank(snapshot, time.time(), verbose=True)
    printed.getvalue().encode()


@fuzzed
@given(st.one_of(changed_values(EVENT).map(packed), changed_bytes(packed(EVENT))))
def test_an_event_is_refused_or_becomes_a_span(content: bytes) -> None:
    try:
        event = decode(content, Event, PATH)
    except UnreadableError:
        return
    spans = event_spans(event, None, state="missing").spans
    spans += event_spans(event, TABLE, state="included").spans
    for span in spans:
        assert encode_spans([span]).SerializeToString()


@fuzzed
@given(st.one_of(changed_values(BLACK_BOX).map(packed), changed_bytes(packed(BLACK_BOX))))
@example(content=packed(HUGE_BLACK_BOX))
def test_a_black_box_is_refused_or_becomes_spans_and_lines(content: bytes) -> None:
    try:
        box = decode(content, BlackBox, PATH)
    except UnreadableError:
        return
    for span in black_box_spans(box):
        assert encode_spans([span]).SerializeToString()
    ended = EndedRank(RankDirectory(PATH), box, None, at=1.0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print(ended, *_lines_of(ended, time.time()), sep="\n")
        print_owners(1, ended_places(ended))
    printed.getvalue().encode()


@fuzzed
@given(
    st.one_of(
        changed_values({**msgspec.structs.asdict(TABLE), "schema": SCHEMA_VERSION}).map(packed),
        changed_bytes(msgspec.msgpack.encode(TABLE)),
    )
)
def test_a_table_is_refused_or_can_be_read_compared_and_sent(content: bytes) -> None:
    try:
        table = decode(content, WeightTable, PATH)
    except UnreadableError:
        return
    assert len(list(table_rows(table))) == table.rows
    list(table_regions(table))
    compare_tables(TABLE, table)
    spans = encode_table(table, captured_at=1.0)
    chunks = [dict(chunk) for span in spans for chunk in span]
    assert sum(chunk["row.count"] for chunk in chunks) == table.rows  # type: ignore[misc]


EVENT_OF_TABLE = msgspec.convert(
    {**EVENT, "table": {**EVENT["table"], "sha256": TABLE.sha256, "fingerprint": ""}}, Event
)
TRACE = MessageToDict(
    encode_spans(list(event_spans(EVENT_OF_TABLE, TABLE, state="included").spans))
)


def test_the_trace_that_is_changed_holds_the_table_before(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(TRACE))
    (table,) = tables_from_trace(tmp_path / "trace.json")
    assert list(table_rows(table.columns)) == rows(5)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.json"


@fuzzed
@given(
    content=st.one_of(
        changed_values(TRACE).map(as_json),
        changed_bytes(as_json(TRACE)),
    )
)
def test_a_trace_is_refused_or_holds_the_table_that_was_sent(content: bytes, trace: Path) -> None:
    trace.write_bytes(content)
    try:
        tables = tables_from_trace(trace)
    except TraceError:
        return
    for table in tables:
        assert len(list(table_rows(table.columns))) == table.columns.rows
        json.dumps(table.engine.model_name).encode()


WEB = {
    "tls_server_config": {
        "cert_file": "cert.pem",
        "key_file": "key.pem",
        "client_auth_type": "RequireAndVerifyClientCert",
        "client_ca_file": "ca.pem",
        "client_allowed_sans": ["prometheus"],
        "min_version": "TLS12",
        "max_version": "TLS13",
    },
    "http_server_config": {"http2": True, "headers": {"X-Frame-Options": "deny"}},
    "basic_auth_users": {
        "prometheus": "$2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi"
    },
    "rate_limit": {"interval": "1s", "burst": 5},
}


@fuzzed
@given(
    content=st.one_of(
        changed_values(WEB).map(lambda document: yaml.safe_dump(document).encode(errors="replace")),
        changed_values({**WEB, "tls_server_config": {}}).map(as_json),
        changed_bytes(yaml.safe_dump(WEB).encode()),
        st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#\n \t~<=\\u0").map(str.encode),
    )
)
@example(content=b'tls_server_config: {cert_file: "\\0", key_file: key.pem}')
@example(content=b'tls_server_config: {cert: "\\ud800", key: "\\ud800"}')
def test_a_web_configuration_is_refused_or_says_who_may_come(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "web.yml"
    path.write_bytes(content)
    source = WebConfigurationSource(Settings(web_config_file=path), {})
    try:
        configuration = source.read()
    except WebConfigurationError:
        return
    finally:
        assert not source.has_changed()
    assert all(hashed.startswith("$2") for hashed in configuration.users.values())
    assert all("\n" not in value for value in configuration.headers.values())


HEAD = (
    b"GET /metrics HTTP/1.1\r\nHost: localhost:9400\r\nUser-Agent: Prometheus/2.42.0\r\n"
    b"Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4\r\n"
    b"Accept-Encoding: gzip\r\nAuthorization: Basic cHJvbWV0aGV1czp4\r\n"
    b"X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)


@pytest.fixture
def served(serve: Callable[..., Exporter], rank: RankStore) -> Iterator[Exporter]:
    started = serve()
    started.line("metrics are at")
    yield started
    assert started.request("/metrics")[0] == 200
    said = "".join(started.lines.queue)
    assert "Traceback" not in said
    assert "Exception" not in said


@fuzzed
@given(
    data=st.one_of(
        changed_bytes(HEAD),
        st.lists(changed_bytes(HEAD), min_size=2, max_size=3).map(b"".join),
        st.text(alphabet=st.characters(codec="latin-1"), max_size=100).map(
            lambda accept: (
                b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: "
                + accept.replace("\r", "").replace("\n", "").encode("latin-1")
                + b"\r\n\r\n"
            )
        ),
        st.binary(max_size=200),
    )
)
def test_a_request_gets_an_answer_that_is_no_failure(data: bytes, served: Exporter) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := client.recv(65536):
                answer += more
    if answer:
        assert answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer[:200]
    assert served.process.poll() is None
