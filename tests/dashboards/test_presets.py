# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Boards and rules say the same of a fleet whichever preset of metrics its exporters serve."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleet_recording import Recording, replay_fleet
from monitoring import RULES, Monitoring
from panel_queries import ALL, expressions, filled_in

from sglang_weight_exporter.settings import METRIC_PRESETS

pytestmark = pytest.mark.release("boards")

SECONDS = 600
#: What docs/metrics.md says is less: the bounds of buckets, and the names of hooks that are well.
#: And what a real clock measured.
OTHERWISE = ("_bucket", "sglang_weight_exporter_hooks", "scrape_duration_seconds")


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[str, Monitoring]]:
    """A Prometheus for each preset, with the same minutes of the same fleet in it."""
    end = time.time() - 20
    started: dict[str, Monitoring] = {}
    try:
        for preset in METRIC_PRESETS:
            directory = Path(tempfile.mkdtemp(prefix=f"{preset}-"))
            recording = Recording(seconds=SECONDS, scrape_seconds=10, preset=preset)
            replay_fleet(directory, end, recording)
            started[preset] = Monitoring(directory, {}, evaluation_interval="1h").start()
        yield started
    finally:
        for stack in started.values():
            stack.stop()


@pytest.fixture(scope="module")
def end(stores: dict[str, Monitoring]) -> float:
    (newest,) = stores["full"].query("max(timestamp(up))")
    return float(newest["value"][1])


Series = dict[frozenset[tuple[str, str]], list[float]]


def answered(stack: Monitoring, expression: str, end: float, *, instant: bool) -> Series:
    """By labels. Without what is 0 all the time: counters come with their first event, but for
    `full`, which has them before."""
    query = filled_in(expression, {**ALL, "$__range": f"{SECONDS}s"})
    asked = stack.query(query, end) if instant else stack.query_range(query, end - 300, end, 10)
    found = {
        frozenset(each["metric"].items()): [
            float(value) for _, value in ([each["value"]] if instant else each["values"])
        ]
        for each in asked
    }
    return {labels: values for labels, values in found.items() if any(values)}


#: What a resume takes has no points while it is nothing, where `full` has a 0.
NOTHING_IS_ABSENT = {"Room after a resume"}


@pytest.mark.parametrize("preset", METRIC_PRESETS[:-1])
def test_a_board_says_the_same_of_fewer_series(
    dashboard: dict[str, Any], stores: dict[str, Monitoring], end: float, preset: str
) -> None:
    differ, told = set(), 0
    for title, expression, instant in expressions(dashboard):
        fewer, all_of_them = (
            answered(stores[each], expression, end, instant=instant) for each in (preset, "full")
        )
        told += bool(all_of_them)
        if any(each in expression for each in OTHERWISE):
            differ |= {title} if bool(fewer) != bool(all_of_them) else set()
        elif fewer.keys() != all_of_them.keys() or any(
            values != pytest.approx(all_of_them[labels]) for labels, values in fewer.items()
        ):
            differ.add(title)
    assert differ <= NOTHING_IS_ABSENT
    assert told > 10


def selected() -> set[str]:
    """What rules read of the exporter, each with the labels that it asks for."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    text = "\n".join(rule["expr"] for group in groups for rule in group["rules"])
    return set(re.findall(r"(?<![\w:])sglang_\w+(?:\{[^}]*\})?(?![\w:{])", text))


def is_there(stack: Monitoring, selector: str, end: float) -> bool:
    return bool(stack.query(f"max_over_time({selector}[{SECONDS}s]) != 0", end))


@pytest.mark.parametrize("preset", METRIC_PRESETS[:-1])
def test_rules_find_what_they_read_in_fewer_series(
    stores: dict[str, Monitoring], end: float, preset: str
) -> None:
    found = {
        name: {each for each in selected() if is_there(stores[name], each, end)}
        for name in (preset, "full")
    }
    assert found[preset] == found["full"]
    assert len(found["full"]) > 30
