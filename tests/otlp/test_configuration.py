# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry's standard variables mean here what they mean everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trustme
from collectors import Backend, Tls
from ports import free_port
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

StartExporter = Callable[..., ExporterProcess]


def port_of(backend: Backend, protocol: str) -> int:
    return backend.grpc_port if protocol == "grpc" else backend.http_port


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_form_for_traces_wins_over_the_general_one(
    protocol: str, rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    path = "" if protocol == "grpc" else "/v1/traces"  # As it is, where it names a signal.
    rank.load(rows(2_500))
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=(f"http://127.0.0.1:{port_of(backend, protocol)}{path}"),
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc" if protocol != "grpc" else "http/protobuf",
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_HEADERS="tenant=general",
        OTEL_EXPORTER_OTLP_TRACES_HEADERS="tenant=traces",
        OTEL_EXPORTER_OTLP_TRACES_COMPRESSION="gzip",
        OTEL_SERVICE_NAME="weights",
    )
    eventually(backend.spans, what="the span")
    (message,) = backend.messages
    assert message.headers["tenant"] == "traces"
    if protocol == "http/protobuf":
        assert message.headers["content-encoding"] == "gzip"
    ((_, resource),) = backend.spans_with_resource()
    assert resource["service.name"] == "weights"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_certificates_of_both_sides(
    protocol: str, rank: Rank, start_exporter: StartExporter, tmp_path: Path
) -> None:
    authority = trustme.CA()
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key", "own", "own_key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    server = authority.issue_cert("localhost")
    server.cert_chain_pems[0].write_to_path(str(files["cert"]))
    server.private_key_pem.write_to_path(str(files["key"]))
    client = authority.issue_cert("exporter")
    backend = Backend(tls=Tls(files["cert"], files["key"], files["ca"])).start()
    rank.load(rows(10))
    try:
        exporter = start_exporter(
            OTEL_EXPORTER_OTLP_ENDPOINT=f"https://localhost:{port_of(backend, protocol)}",
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            OTEL_EXPORTER_OTLP_CERTIFICATE=str(files["ca"]),
            OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=str(files["own"]),
            OTEL_EXPORTER_OTLP_CLIENT_KEY=str(files["own_key"]),
        )
        # The client's certificate is written late, as a secret that is mounted: it is found.
        eventually(lambda: "does not take spans" in exporter.log(), what="a failed try")
        client.cert_chain_pems[0].write_to_path(str(files["own"]))
        client.private_key_pem.write_to_path(str(files["own_key"]))
        eventually(lambda: not rank.waiting(), what="acknowledged")
        assert len(backend.spans()) == 1
    finally:
        backend.stop()


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}],
    ids=["OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"],
)
def test_switched_off(
    variables: dict[str, str], rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}", **variables)
    eventually(lambda: not rank.waiting(), what="discarded")
    assert not backend.messages


def test_the_console(rank: Rank, start_exporter: StartExporter) -> None:
    rank.load(rows(2))
    exporter = start_exporter(OTEL_TRACES_EXPORTER="console")
    eventually(lambda: '"name": "sglang.weights.load"' in exporter.log(), what="the span")
    eventually(lambda: not rank.waiting(), what="acknowledged")


def test_an_exporter_that_is_not_known_is_named(rank: Rank, start_exporter: StartExporter) -> None:
    exporter = start_exporter(OTEL_TRACES_EXPORTER="zipkin")
    assert "OTEL_TRACES_EXPORTER='zipkin'" in exporter.log()


def test_credentials_in_the_endpoint_are_not_logged(
    rank: Rank, start_exporter: StartExporter
) -> None:
    rank.load(rows(2))
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://user:secret@127.0.0.1:{free_port()}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20secret",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    )
    eventually(lambda: "does not take spans" in exporter.log(), what="a failed try")
    assert "secret" not in exporter.log()


def test_opentelemetry_costs_nothing_where_it_is_not_used(
    rank: Rank, start_exporter: StartExporter
) -> None:
    exporter = start_exporter()
    assert exporter.process is not None
    process = psutil.Process(exporter.process.pid)
    loaded = {Path(mapped.path).name for mapped in process.memory_maps()}
    assert not [name for name in loaded if name.startswith("cygrpc")]
    assert process.memory_info().rss < 40 * 2**20
