# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What arrives behind a real collector: spans, their table, and what they say without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from collectors import Backend, Rotel, attributes_of, table_rows_of
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from ranks import ExporterProcess, Rank, rows
from waiting import LIMIT, eventually

from sglang_weight_exporter.cli.trace_reader import tables_from_trace
from sglang_weight_exporter.export.otlp.spans import TableState, event_spans
from sglang_weight_exporter.records.contents import ContentChanges
from sglang_weight_exporter.weight_table import Row, table_rows

StartExporter = Callable[..., ExporterProcess]
PROTOCOLS = ("grpc", "http/protobuf")
MEBIBYTE = 2**20


def as_sent(row: Row) -> dict[str, Any]:
    """A row as the contract says that it is sent."""
    return {
        **row._asdict(),
        "data_ptr": hex(row.data_ptr),
        "storage_ptr": hex(row.storage_ptr),
        "shape": ",".join(map(str, row.shape)),
        "stride": ",".join(map(str, row.stride)),
    }


def arrived(backend: Backend, count: int) -> list[Span]:
    """The spans once there are so many."""
    eventually(lambda: len(backend.spans()) >= count, what=f"{count} spans")
    return backend.spans()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_load_and_an_update_arrive_with_their_tables(
    protocol: str, rank: Rank, rotel: Rotel, backend: Backend, start_exporter: StartExporter
) -> None:
    before, after = rows(20_000), rows(20_000, base=0x7E00_0000_0000)
    load = rank.load(before)
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=rotel.endpoint(protocol),
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=ci,host.name=named",
    )
    first = arrived(backend, 1)[0]
    update = rank.update(after)
    second = arrived(backend, 2)[1]
    eventually(lambda: not rank.waiting(), what="acknowledged")

    assert [first.name, second.name] == ["sglang.weights.load", "sglang.weights.update"]
    assert table_rows_of([first]) == [as_sent(row) for row in before]
    assert table_rows_of([second]) == [as_sent(row) for row in after]
    for span, event in ((first, load), (second, update)):
        summary = attributes_of(span)
        assert summary["sglang.weights.sha256"] == event.table.sha256 if event.table else ""
        assert summary["sglang.weights.table.sha256"] == summary["sglang.weights.sha256"]
        assert summary["sglang.weights.table.chunks"] == len(span.events)
        assert summary["sglang.weights.table.rows"] == 20_000
        assert span.trace_id.hex() == event.update.trace_id
        assert span.start_time_unix_nano == pytest.approx(event.update.started_at * 1e9, abs=1e3)
        assert span.end_time_unix_nano == pytest.approx(event.update.ended_at * 1e9, abs=1e3)
        assert span.status.code == Status.STATUS_CODE_UNSET
        assert len(span.events) <= 100
        for each in span.events:
            assert attributes_of(each)["row.count"] <= 2_000
            assert each.ByteSize() <= 500_000
    assert all(message.nbytes < 4 * MEBIBYTE for message in backend.messages)
    resource = backend.spans_with_resource()[0][1]
    assert resource["service.name"] == "sglang"
    assert resource["hw.id"] == "GPU-0"
    assert resource["sglang.engine.name"] == "30000"
    assert resource["deployment.environment.name"] == "ci"
    assert resource["host.name"] == "named"


def test_a_table_for_several_spans(
    rank: Rank, rotel: Rotel, backend: Backend, start_exporter: StartExporter
) -> None:
    table = rows(200_000)
    rank.load(table)
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=rotel.endpoint("grpc"))
    eventually(lambda: not rank.waiting(), what="acknowledged")
    # The collector has acknowledged them all and passes them on one by one.
    (first,) = eventually(lambda: backend.spans("sglang.weights.load"), what="the first one")
    announced = attributes_of(first)["sglang.weights.table.spans"]
    assert isinstance(announced, int)
    spans = arrived(backend, announced)

    further = [span for span in spans if span != first]
    assert len(further) > 2
    assert announced == len(spans)
    assert table_rows_of(spans) == [as_sent(row) for row in table]
    assert {link.span_id for link in first.links} == {span.span_id for span in further}
    assert {link.span_id for span in further for link in span.links} == {first.span_id}
    assert len({span.trace_id for span in spans}) == len(spans)
    assert all(len(span.events) <= 100 for span in spans)
    assert all(span.ByteSize() <= 3_000_000 for span in spans)
    assert all(message.nbytes < 4 * MEBIBYTE for message in backend.messages)


def test_no_message_is_larger_than_a_pipeline_takes(
    rank: Rank, backend: Backend, start_exporter: StartExporter, tmp_path: Path
) -> None:
    """Kafka's limit is 1,000,000 bytes: a collector before it acknowledges what is lost there."""
    table = rows(20_000)
    rank.load(table)
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        SGLANG_WEIGHT_EXPORTER_SPAN_BYTES="1000000",
        SGLANG_WEIGHT_EXPORTER_SPAN_EVENT_BYTES="200000",
    )
    eventually(lambda: not rank.waiting(), what="acknowledged")
    sizes = [message.nbytes for message in backend.messages]
    assert max(sizes) <= 1_000_000
    assert len(sizes) > 2
    assert max(event.ByteSize() for span in backend.spans() for event in span.events) <= 200_000
    assert table_rows_of(backend.spans()) == [as_sent(row) for row in table]
    (found,) = tables_from_trace(backend.write_json(tmp_path / "trace.json"))
    assert list(table_rows(found.columns)) == table


def test_ranks_of_one_update_share_a_trace(
    runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    ranks = [Rank(runtime_dir, tp=tp, instance="ab" * 8) for tp in range(2)]
    other = Rank(runtime_dir, instance="cd" * 8)
    for each in (*ranks, other):
        each.load(rows(3))
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    spans = arrived(backend, 3)
    traces = [span.trace_id for span in spans]
    assert len(set(traces)) == 2
    assert len({span.span_id for span in spans}) == 3
    by_rank = {attributes_of(span)["sglang.weights.tp_rank"] for span in spans}
    assert by_rank == {0, 1}


def test_an_update_in_place_refers_to_the_table_that_was_sent(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    rank.update()
    rank.update(message="The checkpoint is not there.")
    load, update, failed = arrived(backend, 3)
    assert attributes_of(load)["sglang.weights.table.state"] == "included"
    for span in (update, failed):
        summary = attributes_of(span)
        assert not span.events
        assert summary["sglang.weights.table.state"] == "unchanged"
        assert summary["sglang.weights.table.sha256"] == rank.table.sha256 if rank.table else ""
        assert summary["sglang.weights.table.span_id"] == load.span_id.hex()
        assert [link.span_id for link in span.links] == [load.span_id]
    assert update.status.code == Status.STATUS_CODE_UNSET
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert failed.status.message == "The checkpoint is not there."

    # Another collector has not seen the table.
    exporter.process.terminate() if exporter.process else None
    exporter.process.wait(LIMIT) if exporter.process else None
    exporter.process = None
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://localhost:{backend.grpc_port}")
    rank.update()
    assert attributes_of(arrived(backend, 4)[3])["sglang.weights.table.state"] == "included"


def test_a_span_says_what_an_update_changed_and_at_home_no_names(rank: Rank) -> None:
    rank.load(rows(4))
    event = rank.update()
    contents = ContentChanges(
        tensors={"mlp": 2, "experts": 0}, nbytes={"mlp": 8192, "experts": 0}, names=("a", "b")
    )
    update = msgspec.structs.replace(event.update, contents=contents)
    event = msgspec.structs.replace(event, update=update)
    expected: tuple[tuple[TableState, Any], ...] = (("missing", ("a", "b")), ("disabled", None))
    for state, names in expected:
        (span,) = event_spans(event, None, state=state).spans
        attributes = dict(span.attributes or {})
        found = {
            name: attributes.get(f"sglang.weights.changed.{name}")
            for name in ("layers", "tensors", "bytes", "names")
        }
        assert found == {
            "layers": ["mlp", "experts"],
            "tensors": [2, 0],
            "bytes": [8192, 0],
            "names": names,
        }


def test_the_table_can_be_kept_at_home(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        SGLANG_WEIGHT_EXPORTER_SPAN_TABLE="off",
    )
    (span,) = arrived(backend, 1)
    summary = attributes_of(span)
    assert not span.events
    assert summary["sglang.weights.table.state"] == "disabled"
    assert summary["sglang.weights.bytes"] == 4096
    assert "0x7f" not in str(span)


def test_the_table_can_be_cut_down_to_names(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    table = rows(700)
    rank.load(table)
    start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        SGLANG_WEIGHT_EXPORTER_SPAN_TABLE_NAMES=r"^model\.layers\.1\.",
    )
    (span,) = arrived(backend, 1)
    expected = [as_sent(row) for row in table if row.name.startswith("model.layers.1.")]
    assert table_rows_of([span]) == expected
    assert len(expected) == 300
    summary = attributes_of(span)
    assert summary["sglang.weights.table.rows"] == 300
    assert summary["sglang.weights.table.sha256"] != summary["sglang.weights.sha256"]


def test_a_filter_that_cannot_be_used_sends_no_table(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}",
        SGLANG_WEIGHT_EXPORTER_SPAN_TABLE_NAMES="(",
    )
    (span,) = arrived(backend, 1)
    assert not span.events
    assert "SGLANG_WEIGHT_EXPORTER_SPAN_TABLE_NAMES='('" in exporter.log()
