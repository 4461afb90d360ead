# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Spans of what is new in a rank's black box, sent when the rank is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collectors import Backend, attributes_of
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

from sglang_weight_exporter.records.black_box import BlackBox, Crash, Doing, OutOfMemory
from sglang_weight_exporter.records.memory import MemoryOwner
from sglang_weight_exporter.records.updates import UpdateInProgress
from sglang_weight_exporter.store.ended import ended_ranks

StartExporter = Callable[..., ExporterProcess]

AT = 1_700_000_000.5
ADDRESS = 0x7F30C2000000
DOING = Doing(
    updates={
        "target": UpdateInProgress(
            source="disk", started_at=AT - 1, last_call_at=AT, phase="load"
        )
    }
)  # fmt: skip
ERROR = OutOfMemory(
    at=AT,
    device="cuda:0",
    requested=3000,
    free=1000,
    limit=80_000,
    owners=(MemoryOwner(address=ADDRESS, nbytes=64, part="weights", name="embed (target)"),),
    doing=DOING,
)
CRASH = Crash(at=AT + 1, error="ValueError", message="illegal access", where=("a:1 in b",))


def box(rank: Rank, number: int, **fields: Any) -> BlackBox:
    return BlackBox(
        number=number,
        rank_id=rank.rank_id,
        pid=os.getpid(),
        engine=rank.engine,
        ranks=rank.ranks,
        **fields,
    )


def test_what_a_dead_rank_left_is_sent_and_then_put_away(
    rank: Rank, backend: Backend, start_exporter: StartExporter
) -> None:
    rank.load(rows(3))
    rank.store.leave_black_box(
        box(rank, 0, errors=(ERROR,)), box(rank, 1, errors=(ERROR,), count=7)
    )
    rank.store.leave_black_box(
        box(rank, 0, errors=(ERROR,), crash=CRASH), box(rank, 2, crash=CRASH, count=7)
    )
    rank.store.close()
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 3, what="the load and two of its end")
    (memory,) = backend.spans("sglang.rank.out_of_memory")
    (end,) = backend.spans("sglang.rank.crash")
    for span, at in ((memory, AT), (end, AT + 1)):
        assert span.start_time_unix_nano == span.end_time_unix_nano == int(at * 1e9)
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert attributes_of(span)["sglang.rank.engine"] == rank.engine.name
        assert attributes_of(span)["sglang.rank.out_of_memory"] == 7
    said = attributes_of(memory)
    assert said["error.type"] == "OutOfMemoryError"
    assert said["sglang.rank.requested_bytes"] == 3000
    assert said["sglang.rank.owners.name"] == ["embed (target)"]
    assert said["sglang.rank.updates.source"] == ["disk"]
    assert said["sglang.rank.updates.phase"] == ["load"]
    assert attributes_of(end)["exception.message"] == "illegal access"
    assert attributes_of(end)["exception.stacktrace"] == "a:1 in b"
    for message in backend.messages:
        assert hex(ADDRESS)[2:] not in str(message.request)
        assert str(ADDRESS) not in str(message.request)
    eventually(lambda: not list(rank.runtime_dir.ranks.iterdir()), what="it is put away")
    (ended,) = ended_ranks(rank.runtime_dir)
    assert ended.box is not None
    assert ended.box.crash == CRASH


def test_what_was_never_an_event_is_no_span(
    rank: Rank, backend: Backend, start_exporter: StartExporter, tmp_path: Path
) -> None:
    rank.load(rows(3))
    rank.store.leave_black_box(box(rank, 0, crash=CRASH), box(rank, 1, crash=CRASH))
    (file,) = rank.store.path.rglob("*black_box.event")
    file.write_bytes(b"\xc1" * 100)
    rank.update()
    exporter = start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 2, what="the load and the update")
    eventually(lambda: not rank.waiting(), what="nothing waits")
    assert exporter.metric("spans_dropped_total", reason="unreadable") == 1
