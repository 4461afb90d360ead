# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Deltas add up to what happened: nothing twice, nothing lost, whatever the collector does."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_exporter.export.instruments.base import DataPoint, Instrument, Sample
from sglang_weight_exporter.export.otlp.settings import Temporality
from sglang_weight_exporter.export.otlp.temporality import Totals
from sglang_weight_exporter.records.updates import Histogram

COUNTER = Instrument("updates", "counter", "{update}", "Updates.")
HISTOGRAM = Instrument("duration", "histogram", "s", "Durations.")
GAUGE = Instrument("bytes", "gauge", "By", "Bytes.")


def point(value: Any, *, since: float = 100.0, label: str = "disk") -> DataPoint:
    return DataPoint((label,), Sample((label,), value), since)


def sent(totals: Totals, now: float, value: Any, *, taken: bool = True, **of: Any) -> Any:
    found = totals.interval(COUNTER, point(value, **of), now)
    totals.settle(settled=taken)
    totals.forget_others()
    return found and (found.value, found.started_at)


def test_a_delta_is_what_was_counted_since_the_last_message() -> None:
    totals = Totals("delta", since=50.0)
    assert sent(totals, 110.0, 3) == (3, 100.0)
    assert sent(totals, 120.0, 5) == (2, 110.0)
    assert sent(totals, 130.0, 5) == (0, 120.0)


def test_what_was_not_taken_is_in_the_next_one() -> None:
    totals = Totals("delta", since=50.0)
    assert sent(totals, 110.0, 3) == (3, 100.0)
    assert sent(totals, 120.0, 5, taken=False) == (2, 110.0)
    assert sent(totals, 130.0, 6) == (3, 110.0)


def test_what_began_before_this_process_is_counted_from_its_first_message_on() -> None:
    """The exporter before this one may have sent it."""
    totals = Totals("delta", since=200.0)
    assert sent(totals, 210.0, 3) is None
    assert sent(totals, 220.0, 5) == (2, 210.0)


def test_a_rank_that_began_anew_is_counted_anew() -> None:
    totals = Totals("delta", since=50.0)
    assert sent(totals, 110.0, 3) == (3, 100.0)
    assert sent(totals, 130.0, 4, since=120.0) == (4, 120.0)
    assert sent(totals, 140.0, 1, since=120.0) == (1, 120.0)


def test_what_is_gone_is_forgotten() -> None:
    totals = Totals("delta", since=50.0)
    sent(totals, 110.0, 3)
    sent(totals, 120.0, 3, label="tensor")
    assert sent(totals, 130.0, 3) == (3, 100.0)


def test_only_what_is_asked_for_is_a_delta() -> None:
    def deltas(name: Temporality) -> list[str]:
        totals = Totals(name, since=0.0)
        return [each.kind for each in (COUNTER, HISTOGRAM, GAUGE) if totals.are_deltas(each)]

    kinds = {name: deltas(name) for name in get_args(Temporality)}
    assert kinds == {
        "cumulative": [],
        "delta": ["counter", "histogram"],
        "lowmemory": ["histogram"],
    }
    cumulative = Totals("cumulative", since=1e9)
    assert sent(cumulative, 110.0, 3) == (3, 100.0)
    assert sent(cumulative, 120.0, 3) == (3, 100.0)


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([0.05, 2.0, 50.0, 1000.0]), max_size=4), st.booleans()),
        max_size=12,
    )
)
def test_deltas_of_a_histogram_add_up(steps: list[tuple[list[float], bool]]) -> None:
    totals, histogram = Totals("delta", since=50.0), Histogram()
    counts, total, until = [0] * len(histogram.counts), 0.0, 100.0
    for number, (observed, taken) in enumerate([*steps, ([], True)]):
        for seconds in observed:
            histogram = histogram.observe(seconds)
        now = 110.0 + number
        found = totals.interval(HISTOGRAM, point(histogram), now)
        totals.settle(settled=taken)
        assert found is not None
        assert found.started_at == until
        if taken:
            assert isinstance(found.value, Histogram)
            counts = [one + more for one, more in zip(counts, found.value.counts, strict=True)]
            total, until = total + found.value.sum, now
    assert counts == list(histogram.counts)
    assert abs(total - histogram.sum) < 1e-6
