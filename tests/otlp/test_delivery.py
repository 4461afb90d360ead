# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Collectors that are down, refuse, or come back; exporters that are killed; ranks that die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from collectors import Backend, Message, attributes_of
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from ports import free_port
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.otlp import span_sender
from sglang_weight_exporter.export.otlp.client import OtlpClient
from sglang_weight_exporter.export.otlp.http_transport import HttpTransport
from sglang_weight_exporter.export.otlp.settings import connection_settings
from sglang_weight_exporter.export.otlp.span_sender import SpanSender
from sglang_weight_exporter.export.otlp.spans import EventSpans, event_spans
from sglang_weight_exporter.export.views import SpanCounts
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import SpoolReader

StartExporter = Callable[..., ExporterProcess]


def test_twenty_updates_outlive_a_dead_collector_and_a_killed_exporter(
    rank: Rank, start_exporter: StartExporter
) -> None:
    backend = Backend()  # Not started: nobody listens.
    endpoint = f"http://127.0.0.1:{backend.grpc_port}"
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    rank.load(rows(50))
    for _ in range(9):
        rank.update()
    eventually(lambda: exporter.metric("span_failures_total") >= 2, what="failed tries")
    said = f"The collector at 127.0.0.1:{backend.grpc_port} does not take spans"
    assert exporter.log().count(said) == 1
    exporter.end(signal.SIGKILL)
    for _ in range(10):
        rank.update()
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    eventually(lambda: exporter.metric("spans_waiting") == 20, what="20 waiting")
    assert len(rank.waiting()) == 20

    backend.start()
    try:
        eventually(lambda: not rank.waiting(), what="acknowledged")
        numbers = [attributes_of(span)["sglang.weights.event.number"] for span in backend.spans()]
        assert numbers == list(range(1, 21))
        assert len({span.span_id for span in backend.spans()}) == 20
        eventually(lambda: exporter.metric("spans_exported_total") == 20)
        assert exporter.metric("spans_waiting") == 0
        for reason in ("queue_full", "refused", "unreadable"):
            assert exporter.metric("spans_dropped_total", reason=reason) == 0
    finally:
        backend.stop()


def test_a_killed_exporter_sends_the_same_span_again(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    """Killed after the collector has taken a span and before it has said so."""
    rank.load(rows(10))
    exporter: ExporterProcess

    def kill(message: Message) -> str:
        backend.messages.append(message)
        exporter.end(signal.SIGKILL)
        return "nobody hears this"

    backend.refuses = kill
    endpoint = f"http://127.0.0.1:{backend.grpc_port}"
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    eventually(lambda: len(backend.spans()) == 1, what="taken")
    backend.refuses = lambda message: ""
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    eventually(lambda: not rank.waiting(), what="acknowledged")
    first, again = backend.spans()
    assert first == again


def test_events_of_a_rank_that_has_died_arrive(
    runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    rank = Rank(runtime_dir)
    rank.load(rows(10))
    rank.store.close()
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 1, what="the span")
    eventually(lambda: not rank.store.path.exists(), what="removed")


def test_a_span_that_is_refused_does_not_keep_others_waiting(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    def refuses(message: Message) -> str:
        spans = [
            span
            for part in message.request.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]
        return "too odd" if attributes_of(spans[0])["sglang.weights.event.number"] == 1 else ""

    backend.refuses, backend.retryable = refuses, True
    rank.load(rows(10))
    for _ in range(12):
        rank.update()
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 12, what="all others")
    assert exporter.metric("spans_dropped_total", reason="refused") == 0

    def dropped() -> bool:
        rank.update()
        return exporter.metric("spans_dropped_total", reason="refused") == 1

    eventually(dropped, every=0.5, what="dropped")
    eventually(lambda: not rank.waiting(), what="nothing waiting")
    assert "too odd" in exporter.log()
    # The table was not in the span that was refused only: the next one carries it.
    states = Counter(attributes_of(span)["sglang.weights.table.state"] for span in backend.spans())
    assert states["included"] == 1
    assert states["unchanged"] >= 11


def refuses_first(message: Message) -> str:
    (span,) = message.request.resource_spans[0].scope_spans[0].spans
    return "too odd" if attributes_of(span)["sglang.weights.event.number"] == 1 else ""


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_what_is_refused_for_good_is_dropped_at_once_and_its_table_comes_with_the_next(
    protocol: str, rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    backend.refuses = refuses_first
    rank.load(rows(10))
    rank.update()
    port = backend.grpc_port if protocol == "grpc" else backend.http_port
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
    )
    eventually(lambda: not rank.waiting(), what="nothing waiting")
    assert exporter.metric("spans_dropped_total", reason="refused") == 1
    assert exporter.metric("span_failures_total") == 1
    assert exporter.metric("spans_exported_total") == 1
    assert "refused spans for good" in exporter.log()
    (span,) = backend.spans()
    assert attributes_of(span)["sglang.weights.table.state"] == "included"
    assert span.events


def stray_file(rank: Rank, ranks: Path) -> None:
    (ranks / "x").write_text("")


def stray_link(rank: Rank, ranks: Path) -> None:
    (ranks / "x").symlink_to("/dev/zero")


def lock_that_is_a_link(rank: Rank, ranks: Path) -> None:
    (ranks / "x").mkdir()
    (ranks / "x" / "lock").symlink_to("/nowhere")


def event_that_is_a_directory(rank: Rank, ranks: Path) -> None:
    (rank.store.path / "events" / "000000000000-none.event").mkdir()


def event_that_is_a_pipe(rank: Rank, ranks: Path) -> None:
    os.mkfifo(rank.store.path / "events" / "000000000000-none.event")


def events_that_are_a_file(rank: Rank, ranks: Path) -> None:
    shutil.rmtree(rank.store.path / "events")
    (rank.store.path / "events").write_text("")


def note_that_is_a_directory(rank: Rank, ranks: Path) -> None:
    (rank.store.path / "exported").mkdir()


def table_that_is_a_directory(rank: Rank, ranks: Path) -> None:
    rank.load(rows(3))
    for table in (rank.store.path / "events").glob("*.table"):
        table.unlink()
        table.mkdir()


def table_that_is_huge(rank: Rank, ranks: Path) -> None:
    rank.load(rows(3))
    for table in (rank.store.path / "events").glob("*.table"):
        os.truncate(table, 2**40)


def event_that_is_huge(rank: Rank, ranks: Path) -> None:
    rank.load(rows(3))
    os.truncate(rank.store.path / "events" / rank.waiting()[0], 2**40)


@pytest.mark.parametrize(
    "make",
    [
        stray_file,
        stray_link,
        lock_that_is_a_link,
        event_that_is_a_directory,
        event_that_is_a_pipe,
        events_that_are_a_file,
        note_that_is_a_directory,
        table_that_is_a_directory,
        table_that_is_huge,
        event_that_is_huge,
    ],
)
def test_what_is_odd_in_one_rank_keeps_no_span_of_another_waiting(
    make: Callable[[Rank, Path], None],
    rank: Rank,
    runtime_dir: Path,
    backend: Backend,
) -> None:
    other = Rank(runtime_dir, tp=1)
    make(rank, runtime_dir / "ranks")
    sender, counts = sender_to(backend, runtime_dir)
    for number in range(1, 4):
        other.load(rows(number))
        assert sender.deliver()  # There is no pause.
        assert not other.waiting()
    sent = [attributes_of(span)["sglang.weights.tp_rank"] for span in backend.spans()]
    assert sent.count(1) == 3
    assert not SpoolReader(rank.store.path / "events").waiting()
    assert counts.waiting == 0


def test_a_problem_of_one_rank_is_named_once(
    rank: Rank, runtime_dir: Path, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    (runtime_dir / "ranks" / "x").write_text("")
    sender, _ = sender_to(backend, runtime_dir)
    for _ in range(3):
        sender.deliver()
    (line,) = [each for each in caplog.messages if "ranks/x" in each]
    assert "All else goes on" in line


def sender_to(
    backend: Backend | None, runtime_dir: Path, **options: Any
) -> tuple[SpanSender, SpanCounts]:
    """What sends spans to a backend over HTTP, or to where nobody is, and what it counts."""
    port = free_port() if backend is None else backend.http_port
    settings = connection_settings(
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}, "traces", "http/protobuf"
    )
    client = OtlpClient(
        lambda: HttpTransport(settings, ExportTraceServiceResponse),
        signal="spans",
        destination="here",
        seconds=30.0,
        hide=str,
    )
    counts = SpanCounts()
    snapshots = SnapshotReader(RuntimeDir(runtime_dir))
    return SpanSender(snapshots, client, counts, Guard(), **options), counts


def test_what_waits_is_encoded_once_and_not_at_each_try(
    rank: Rank, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(event: Event, *arguments: Any, **options: Any) -> EventSpans:
        encoded.append(event.number)
        return event_spans(event, *arguments, **options)

    monkeypatch.setattr(span_sender, "event_spans", counted)
    rank.load(rows(10))
    for number in range(20):
        rank.update(rows(10, base=(number + 1) << 32))
    sender, counts = sender_to(None, runtime_dir)
    for _ in range(15):  # Seven minutes of an outage.
        assert not sender.deliver()
    assert counts.failures == 15
    # The oldest, and another one to find out whether it is the first's fault.
    assert encoded == [1, 2]


def test_a_damaged_event_is_counted_and_the_others_arrive(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    rank.update()
    (rank.store.path / "events" / rank.waiting()[0]).write_bytes(b"damaged")
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: not rank.waiting(), what="nothing waiting")
    assert [span.name for span in backend.spans()] == ["sglang.weights.update"]
    assert exporter.metric("spans_dropped_total", reason="unreadable") == 1


def test_a_directory_that_became_read_only_sends_nothing_twice(
    rank: Rank, runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    poison = rank.load(rows(10))
    rank.update()
    update = msgspec.structs.replace(poison.update, trace_id="no hexadecimal number")
    content = msgspec.msgpack.encode(msgspec.structs.replace(poison, update=update))
    events = rank.store.path / "events"
    (events / rank.waiting()[0]).write_bytes(content)
    tried = subprocess.run(["chattr", "+i", events], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"needs a file system with immutable directories: {tried.stderr.strip()}")
    try:
        endpoint = f"http://127.0.0.1:{backend.grpc_port}"
        exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        eventually(lambda: exporter.metric("spans_exported_total") == 1, what="sent")
        other = Rank(runtime_dir)
        for _ in range(3):  # Each pass that finds one finds those that cannot be removed, too.
            other.load(rows(1))
            eventually(lambda: not other.waiting(), what="sent from another directory")
    finally:
        subprocess.run(["chattr", "-i", events], check=True)
    eventually(lambda: not rank.waiting(), what="removed when it can be")
    assert exporter.metric("spans_dropped_total", reason="unreadable") == 1
    assert Counter(span.name for span in backend.spans()) == {
        "sglang.weights.update": 1,
        "sglang.weights.load": 3,
    }


def test_an_event_of_which_no_span_can_be_made_is_counted_and_the_others_arrive(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    poison = rank.load(rows(10))
    rank.update()
    update = msgspec.structs.replace(poison.update, trace_id="no hexadecimal number")
    content = msgspec.msgpack.encode(msgspec.structs.replace(poison, update=update))
    (rank.store.path / "events" / rank.waiting()[0]).write_bytes(content)
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: not rank.waiting(), what="nothing waiting")
    assert [span.name for span in backend.spans()] == ["sglang.weights.update"]
    assert exporter.metric("spans_dropped_total", reason="unreadable") == 1


def test_a_queue_that_was_full_counts_what_it_dropped(
    runtime_dir: Path, backend: Backend, start_exporter: StartExporter
) -> None:
    rank = Rank(runtime_dir, event_count=5)
    rank.load(rows(10))
    for _ in range(7):
        rank.update()
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 5, what="5 spans")
    assert exporter.metric("spans_dropped_total", reason="queue_full") == 3
    # The load is gone and its table with it; the oldest that is left carries it.
    assert backend.spans()[0].events


def test_without_a_collector_the_queue_stays_empty_and_nothing_counts_as_dropped(
    rank: Rank, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    exporter = start_exporter()
    eventually(lambda: not rank.waiting(), what="discarded")
    rank.update()
    eventually(lambda: not rank.waiting(), what="discarded")
    for reason in ("queue_full", "refused", "unreadable"):
        assert exporter.metric("spans_dropped_total", reason=reason) == 0
    assert exporter.metric("spans_exported_total") == 0


def test_a_collector_that_was_configured_wrongly_loses_nothing(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(10))
    exporter = start_exporter(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/json",
    )
    eventually(lambda: "http/json" in exporter.log(), what="said so")
    assert "grpc and http/protobuf" in exporter.log()
    assert rank.waiting()
    exporter.end(signal.SIGTERM)
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 1, what="the span")
