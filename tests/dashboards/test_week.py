# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A week of a fleet in which nothing is wrong raises no alert that does more than inform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_model import DAY, GIB, HOUR, MINUTE, Engine, Fleet, Span, every
from monitoring import run

WEEK = 7 * DAY


def after(updates: list[Span]) -> Callable[[float], str]:
    """A version that every update raises."""
    return lambda second: f"step-{sum(end <= second for _, end in updates)}"


def restarted() -> Iterator[Engine]:
    """Eight pods whose image is rolled on the third day, one every four minutes."""
    for number in range(8):
        down = 2 * DAY + 10 * HOUR + number * 4 * MINUTE
        before, then = (lambda second: "2026-11-20"), (lambda second: "2026-11-27")
        yield Engine(f"a{number}:9400", model="chat", ended=down, version=before)
        up = down + 3 * MINUTE
        yield Engine(f"a{number}-new:9400", model="chat", loaded=up, version=then)


def updated_in_place() -> Iterator[Engine]:
    """Ten pods: every second day a canary for four hours, then the rest, three minutes apart."""
    for number in range(10):
        offset = 9 * HOUR if number == 0 else 13 * HOUR + number * 3 * MINUTE
        updates = every(2 * DAY, offset, 6 * DAY, 90)
        yield Engine(
            f"b{number}:9400", model="code", source="disk", updates=updates, version=after(updates)
        )


def trained_in_step() -> Iterator[Engine]:
    """Four engines, two with a frozen draft, a step every 10 minutes from 6 to 22 o'clock; at night
    the GPUs are others', and in every step their memory is the trainer's for two minutes."""
    steps = [
        s for day in range(7) for s in every(600, day * DAY + 6 * HOUR, day * DAY + 22 * HOUR, 20)
    ]
    nights = [(day * DAY - 2 * HOUR, day * DAY + 6 * HOUR - 300) for day in range(8)]

    def used(second: float) -> float:
        """The trainer takes more in each of its turns, others in the night hour by hour."""
        night = next((second - begin for begin, end in nights if begin <= second < end), None)
        if night is not None:
            return (60 + night / 400) * GIB
        turn = second % 600 >= 480  # Before a step.
        return (138 + second / WEEK if turn else 130 + second % DAY / DAY) * GIB

    for number in range(4):
        yield Engine(
            f"c{number}:9400",
            model="policy",
            roles=("target", "draft") if number < 2 else ("target",),
            of_rank={(0, "draft"): []},
            updates=steps,
            released=[*nights, *((begin - 120, begin) for begin, _ in steps)],
            version=after(steps),
            used=used,
        )


def trained_out_of_step() -> Iterator[Engine]:
    """Four engines that are updated in turn, with a version every quarter of an hour."""
    for number in range(4):
        updates = every(900, number * 200, WEEK, 15)
        yield Engine(f"d{number}:9400", model="async", updates=updates, version=after(updates))


@pytest.mark.release("rules")
def test_a_healthy_week_raises_no_alert_that_does_more_than_inform(tmp_path: Path) -> None:
    """28 engines. Scraped every two minutes and evaluated every four, for the test's own time."""
    fleet = Fleet(WEEK, step=120)
    for engine in (
        *restarted(),
        *updated_in_place(),
        *trained_in_step(),
        *trained_out_of_step(),
        # A dense model that just fits, as it was planned.
        *(Engine(f"e{n}:9400", model="dense", weights=53 * GIB, tokens=60_000) for n in range(2)),
    ):
        engine.serve(fleet)
    informed = {
        "expr": 'count(count_over_time(ALERTS{alertstate="firing"}[7d]))',
        "eval_time": f"{WEEK}s",
        "exp_samples": [{"labels": "{}", "value": 18}],
    }
    (tmp_path / "week.yml").write_text(fleet.test(fleet.fired(set()), informed, evaluated=240))
    run("promtool", "test", "rules", tmp_path / "week.yml")
