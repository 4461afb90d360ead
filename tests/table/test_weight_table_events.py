# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A table as events of spans, and back."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_exporter.weight_table import (
    Row,
    WeightTable,
    table_fingerprints,
    table_of_rows,
    table_rows,
    with_names,
)
from sglang_weight_exporter.weight_table_events import (
    DEFAULT_LIMITS,
    EVENT_ROWS,
    SPAN_EVENTS,
    Limits,
    MissingRowsError,
    TableEventsError,
    decode_table,
    encode_table,
)

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n"), min_size=1)
DIMENSIONS = st.lists(st.integers(0, 2**63 - 1), max_size=5).map(tuple)
ROWS = st.lists(
    st.builds(
        Row,
        name=TEXT,
        data_ptr=U64,
        nbytes=U64,
        dtype=st.sampled_from(["bfloat16", "float8_e4m3fn", "uint8"]),
        shape=DIMENSIONS,
        stride=DIMENSIONS,
        device=st.sampled_from(["cuda:0", "cuda:1", "cpu"]),
        kind=st.sampled_from(["parameter", "buffer", "derived"]),
        storage_ptr=U64,
        storage_nbytes=U64,
    ),
    max_size=30,
)


def made(rows: list[Row]) -> WeightTable:
    return table_of_rows(rows, role="target", captured_at=1.5)


def events_of(table: WeightTable) -> list[dict[str, Any]]:
    spans = encode_table(table, captured_at=table.captured_at)
    return [dict(event) for span in spans for event in span]


def decoded(table: WeightTable, events: list[dict[str, Any]]) -> WeightTable:
    return decode_table(events, role=table.role, rows=table.rows, sha256=table.sha256)


def many(count: int) -> WeightTable:
    return made(
        [
            Row(f"w{row}", row * 64, 64, "uint8", (64,), (1,), "cpu", "buffer", row * 64, 64)
            for row in range(count)
        ]
    )


@given(ROWS, st.randoms())
def test_a_table_comes_back_from_its_events_in_any_order(
    rows: list[Row], order: random.Random
) -> None:
    table = made(rows)
    events: list[dict[str, Any]] = json.loads(json.dumps(events_of(table))) * 2
    order.shuffle(events)
    found = decoded(table, events)
    assert list(table_rows(found)) == rows
    assert (found.sha256, found.role) == (table.sha256, "target")


@given(ROWS.filter(bool), st.data(), st.randoms())
@pytest.mark.slow
def test_what_tensors_hold_comes_back_with_them(
    rows: list[Row], data: st.DataObject, order: random.Random
) -> None:
    content = data.draw(st.binary(min_size=16 * len(rows), max_size=16 * len(rows)))
    table = msgspec.structs.replace(made(rows), fingerprints=content, fingerprint="ab" * 16)
    events: list[dict[str, Any]] = json.loads(json.dumps(events_of(table))) * 2
    order.shuffle(events)
    found = decoded(table, events)
    assert (found.fingerprints, found.fingerprint) == (content, "ab" * 16)
    assert list(table_rows(found)) == rows


def fingerprinted(count: int) -> WeightTable:
    content = b"".join(row.to_bytes(16, "big") for row in range(count))
    return msgspec.structs.replace(many(count), fingerprints=content, fingerprint="cd" * 16)


def test_each_row_has_its_own_over_several_events() -> None:
    table = fingerprinted(3 * EVENT_ROWS)
    first, second, last = events_of(table)
    assert second["fingerprint"][0] == f"{EVENT_ROWS:032x}"
    assert decoded(table, [last, first, second]).fingerprints == table.fingerprints
    del second["fingerprint"]  # An event of an exporter that was switched off, or a dropped array.
    assert decoded(table, [last, first, second]).fingerprints == b""


def test_an_event_with_fingerprints_is_no_larger_than_it_may_be() -> None:
    table = fingerprinted(20 * EVENT_ROWS)
    for span in encode_table(table, captured_at=1.5):
        for event in span:
            assert len(json.dumps(event)) < 2 * DEFAULT_LIMITS.event


def test_chosen_rows_keep_what_they_hold() -> None:
    chosen = with_names(fingerprinted(9), lambda name: name in {"w3", "w7"})
    assert table_fingerprints(chosen) == {"w3": f"{3:032x}", "w7": f"{7:032x}"}
    assert chosen.fingerprint == "cd" * 16


@pytest.mark.slow
def test_large_tables_are_cut_into_events_and_spans_that_collectors_take() -> None:
    table = many(SPAN_EVENTS * EVENT_ROWS // 4)
    spans = encode_table(table, captured_at=1.5)
    assert len(spans) > 1
    for span in spans:
        sizes = [len(json.dumps(event)) for event in span]
        assert len(span) <= SPAN_EVENTS
        assert (
            max(sizes) < 2 * DEFAULT_LIMITS.event
        )  # JSON takes more than protobuf, by less than this.
        assert sum(sizes) < 2 * DEFAULT_LIMITS.span
        assert all(len(event["name"]) <= EVENT_ROWS for event in span)  # type: ignore[arg-type]
    assert decoded(table, events_of(table)).rows == table.rows


@pytest.mark.parametrize("reserved", [0, 30_000, 90_000])
def test_spans_are_as_small_as_a_pipeline_needs_them(reserved: int) -> None:
    table, limits = many(5_000), Limits(event=40_000, span=100_000)
    spans = encode_table(table, captured_at=1.5, limits=limits, reserved=reserved)
    assert max(len(json.dumps(event)) for span in spans for event in span) < 2 * limits.event
    sizes = [sum(len(json.dumps(event)) for event in span) for span in spans]
    assert sizes[0] <= 2 * (limits.span - reserved)
    assert max(sizes) <= 2 * limits.span
    events = [event for span in spans for event in span]
    assert decoded(table, events).rows == table.rows


def test_missing_rows_are_named() -> None:
    table = many(3 * EVENT_ROWS)
    first, _, last = events_of(table)
    with pytest.raises(MissingRowsError, match="rows 2,000 to 3,999 are missing"):
        decoded(table, [last, first])


@pytest.mark.parametrize(
    "damage",
    [
        {"row.offset": "x"},
        {"row.offset": None},
        {"row.count": 10**9},
        {"data_ptr": ["0x1"]},
        {"dtype": [9] * 4},
        {"shape.values": "[" * 100_000},
        {"nbytes": None},
        {"fingerprint": ["ab"] * 4},
        {"fingerprint": ["x" * 32] * 4},
        {"fingerprint": ["0" * 32] * 3},
    ],
)
def test_a_damaged_event_is_named(damage: dict[str, Any]) -> None:
    table = many(4)
    (event,) = events_of(table)
    with pytest.raises(MissingRowsError, match="chunk 0 is damaged"):
        decoded(table, [{**event, **damage}])


@pytest.mark.parametrize(
    "change",
    [
        {"data_ptr": ["0x1"] * 4},
        {"data_ptr": [hex(2**64)] * 4},
        {"nbytes": [-1] * 4},
        {"name": ["\ud800"] * 4},
        {"table.captured_at": "noon"},
    ],
)
def test_what_is_not_the_table_that_was_sent_is_refused(change: dict[str, Any]) -> None:
    table = many(4)
    (event,) = events_of(table)
    with pytest.raises(TableEventsError, match="not the ones that were sent"):
        decoded(table, [{**event, **change}])
