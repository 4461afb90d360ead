# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real SGLang with two ranks and a real collector, from the load to the table in the span.

The engine starts no exporter process, so that one can follow the other with another protocol.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from collectors import Backend, Rotel, attributes_of, table_rows_of
from engines import Engine, http_get
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from ranks import ExporterProcess
from waiting import eventually


@pytest.fixture(scope="module")
def module_backend(traced_engine: Engine) -> Iterator[Backend]:
    """Where SGLang's own traces go to as well."""
    backend = Backend()
    backend.grpc_port = traced_engine.otlp_port
    backend.start()
    yield backend
    backend.stop()


@pytest.fixture(scope="module")
def module_rotel(module_backend: Backend) -> Iterator[Rotel]:
    rotel = Rotel(module_backend).start()
    yield rotel
    rotel.stop()


def live_tables(engine: Engine) -> dict[int, dict[str, Any]]:
    """By data-parallel rank, what the engine's own table says now."""
    answer = engine.exporter_cli("table", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    return {table["dp_rank"]: table for table in json.loads(answer.stdout)["tables"]}


def as_sent(tensor: dict[str, Any]) -> dict[str, Any]:
    texts = {key: ",".join(map(str, tensor[key])) for key in ("shape", "stride")}
    return {**tensor, **texts}


def by_rank(spans: list[Span]) -> dict[int, Span]:
    found = {attributes_of(span)["sglang.weights.dp_rank"]: span for span in spans}
    assert len(found) == len(spans) == 2
    return found


def test_load_and_reloads_of_two_ranks_over_both_protocols(
    traced_engine: Engine,
    checkpoints: tuple[Path, Path],
    module_backend: Backend,
    module_rotel: Rotel,
    tmp_path: Path,
) -> None:
    engine, backend = traced_engine, module_backend

    def ours(name: str, count: int) -> list[Span]:
        eventually(lambda: len(backend.spans(name)) >= count, what=f"{count} of {name}")
        return backend.spans(name)

    def exporter(protocol: str) -> ExporterProcess:
        return ExporterProcess(
            engine.runtime_dir,
            OTEL_EXPORTER_OTLP_ENDPOINT=module_rotel.endpoint(protocol),
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        ).start()

    first = exporter("grpc")
    try:
        loads = by_rank(ours("sglang.weights.load", 2))
        tables = live_tables(engine)
        assert set(tables) == set(loads) == {0, 1}
        for rank, table in tables.items():
            assert table_rows_of([loads[rank]]) == [as_sent(row) for row in table["tensors"]]
            assert attributes_of(loads[rank])["sglang.weights.sha256"] == table["sha256"]
        assert len({span.trace_id for span in loads.values()}) == 1
    finally:
        first.end(signal.SIGTERM)

    status, _ = engine.update_weights_from_disk(checkpoints[1])
    assert status == 200
    _, refused = engine.update_weights_from_disk(tmp_path / "nothing")
    assert refused["success"] is False

    second = exporter("http/protobuf")
    try:
        spans = ours("sglang.weights.update", 4)
        updates = by_rank([span for span in spans if span.status.code == Status.STATUS_CODE_UNSET])
        failed = by_rank([span for span in spans if span.status.code == Status.STATUS_CODE_ERROR])
        tables = live_tables(engine)
        for rank, table in tables.items():
            assert table_rows_of([updates[rank]]) == [as_sent(row) for row in table["tensors"]]
            assert failed[rank].status.message in refused["message"]
            assert not failed[rank].events
            path = attributes_of(updates[rank])["sglang.weights.model_path"]
            assert path == str(checkpoints[1])
        traces = [{span.trace_id for span in each.values()} for each in (updates, failed)]
        assert [len(trace) for trace in traces] == [1, 1]
        assert traces[0] != traces[1]
        status, _, body = http_get(
            f"http://127.0.0.1:{second.port}/metrics",
            headers={"Accept": "application/openmetrics-text; version=1.0.0"},
        )
        exemplars = {
            sample.exemplar.labels["trace_id"]
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
            if sample.exemplar
        }
        assert exemplars == {trace.hex() for trace in traces[0]}
    finally:
        second.end(signal.SIGTERM)

    file = backend.write_json(tmp_path / "traces.json")
    answer = engine.exporter_cli("table", "--from-trace", str(file), "--format", "json")
    assert answer.returncode == 0, answer.stderr
    from_trace = {table["dp_rank"]: table for table in json.loads(answer.stdout)["tables"]}
    for rank, table in live_tables(engine).items():
        assert from_trace[rank]["tensors"] == table["tensors"]
        assert from_trace[rank]["sha256"] == table["sha256"]


def test_sglangs_own_tracing_works_as_before(
    traced_engine: Engine, module_backend: Backend
) -> None:
    def scopes() -> set[str]:
        return {
            scope.scope.name
            for message in list(module_backend.messages)
            for part in message.request.resource_spans
            for scope in part.scope_spans
        }

    status, answer = traced_engine.post(
        "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}
    )
    assert status == 200, answer
    eventually(lambda: scopes() - {"sglang_weight_exporter"}, what="spans of requests")
