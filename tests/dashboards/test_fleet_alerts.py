# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which alerts modelled fleets raise: healthy ones none, whatever their rhythm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_model import DAY, GIB, HOUR, MINUTE, Engine, Fleet, Span, every
from monitoring import run

Check = Callable[..., None]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def check(fleet: Fleet, *expectations: dict[str, Any], evaluated: int = 60) -> None:
        (tmp_path / "fleet.yml").write_text(fleet.test(*expectations, evaluated=evaluated))
        run("promtool", "test", "rules", tmp_path / "fleet.yml")

    return check


def fleet_of(until: float, *engines: Engine) -> Fleet:
    fleet = Fleet(until)
    for engine in engines:
        engine.serve(fleet)
    return fleet


def since(second: float, before: float, after: float) -> Callable[[float], float]:
    """Another value from this second on."""
    return lambda now: before if now < second else after


def always(text: str) -> Callable[[float], str]:
    return lambda now: text


def step(updates: list[Span], takes: float = 1) -> Callable[[float], str]:
    """A version that is the number of updates; `takes` of them make one."""
    return lambda second: f"step-{sum(end <= second for _, end in updates) // takes:.0f}"


# --- healthy ------------------------------------------------------------------------------------


def rolling_restart(of: str, to: str, takes: float) -> Iterator[Engine]:
    """Twelve pods, one after another, with new addresses; the version comes with the launch."""
    for number in range(12):
        down = 10 * MINUTE + number * 5 * MINUTE
        yield Engine(f"p{number}:9400", ended=down, version=always(of))
        yield Engine(f"q{number}:9400", loaded=down + takes, version=always(to))


def trained(count: int, period: float, apart: float, takes: float) -> Iterator[Engine]:
    """Engines that are updated in turn, each with every version."""
    for number in range(count):
        updates = every(period, 60 + number * apart, 2 * HOUR, takes)
        yield Engine(f"h{number}:9400", updates=updates, version=step(updates))


def newest(updates: list[Span]) -> Callable[[float], str]:
    """The version, one every 20 s, that there was when the last update ended."""
    return lambda second: str(max((end // 20 for _, end in updates if end <= second), default=0))


def at_their_own_pace() -> Iterator[Engine]:
    """Asynchronous training: each takes the newest once a minute, there is one every 20 s."""
    for number in range(6):
        updates = every(60, 60 + number * 10, 2 * HOUR, 4)
        yield Engine(f"h{number}:9400", updates=updates, version=newest(updates))


def blue_and_green() -> Iterator[Engine]:
    for number in range(4):
        colour = "blue" if number < 2 else "green"
        yield Engine(
            f"h{number}:9400",
            loaded=-3 * DAY if colour == "blue" else -2 * HOUR,
            version=always(colour),
            fingerprint=since(0, 0, len(colour)),
        )


def canary() -> Iterator[Engine]:
    """One of ten for an hour, then the rest, three minutes after each other. What they had before
    was an update too."""
    for number in range(10):
        begin = 10 * MINUTE if number == 0 else 70 * MINUTE + number * 180
        updates = [(-3600.0, -3590.0), (begin, begin + 90)]
        yield Engine(
            f"h{number}:9400",
            source="disk",
            updates=updates,
            version=step(updates),
            fingerprint=since(begin + 90, 1, 2),
        )


def hosts(skew: float = 0, missed: int = 0, failed: bool = False) -> Iterator[Engine]:
    """An engine on two hosts, of which the second missed the first updates, or fails the last."""
    updates = every(10 * MINUTE, 60, 1 * HOUR, 10)
    for number in range(2):
        had = updates if number == 0 else updates[missed:]
        failures = []
        if number == 1 and failed:
            had, failures = had[:-1], had[-1:]
        yield Engine(
            f"h{number}:9400",
            ranks=(number,),
            updates=had,
            failures=failures,
            clock=skew * number,
            nodes=2,
            group="g",
            node_rank=number,
            expected=2,
        )


def slow_host() -> Iterator[Engine]:
    """An engine on two hosts: what takes the first ten seconds takes the second nine minutes."""
    for number, takes in enumerate((10, 9 * MINUTE)):
        updates: list[Span] = [(10 * MINUTE, 10 * MINUTE + takes)]
        yield Engine(
            f"h{number}:9400",
            ranks=(number,),
            source="disk",
            updates=updates,
            version=step(updates),
            nodes=2,
            group="g",
            node_rank=number,
            expected=2,
        )


def moved_experts() -> Iterator[Engine]:
    """Each engine moves them by its own load."""
    for number in range(2):
        updates = every(HOUR, 20 * MINUTE, 2 * HOUR, 5)
        yield Engine(
            f"h{number}:9400",
            source="eplb",
            updates=updates,
            fingerprint=since(20 * MINUTE, 1, 10 + number),
        )


NIGHT = [(30 * MINUTE, 110 * MINUTE)]
ONE_SLOW_DISK = {
    (rank, "target"): [(10 * MINUTE, (11 if rank < 2 else 19) * MINUTE)] for rank in range(4)
}
HEALTHY: dict[str, list[Engine]] = {
    "pods restarted one after another": [*rolling_restart("default", "default", 3 * MINUTE)],
    "pods restarted to another version": [*rolling_restart("v1", "v2", 3 * MINUTE)],
    "a static target that takes seven minutes to load": [
        Engine("h:9400", ended=600, static=True),
        Engine("h:9400", loaded=1020, static=True),
    ],
    "pods that come and go": [
        Engine("base:9400"),
        *(Engine(f"s{n}:9400", loaded=900 + n * 60, ended=5400 - n * 60) for n in range(6)),
    ],
    "updated together every 20 s": [*trained(4, 20, 0, 12)],
    "updated in turn every 20 s": [*trained(8, 20, 2, 2)],
    "updated in turn every minute": [*trained(16, 60, 3, 3)],
    "updated in turn, 150 s apart, every 20 minutes": [*trained(8, 1200, 150, 30)],
    "each at its own pace": [*at_their_own_pace()],
    "blue and green": [*blue_and_green()],
    "a canary and the rest": [*canary()],
    "an update of almost ten minutes": [Engine("h:9400", updates=[(600, 1190)], source="disk")],
    "two ranks read the page cache, two an NFS server": [
        Engine("h:9400", ranks=range(4), of_rank=ONE_SLOW_DISK, source="disk")
    ],
    "one of two hosts reads an NFS server": [*slow_host()],
    "hosts with clocks 20 s apart": [*hosts(skew=20)],
    "a restart within ten minutes of an update": [
        Engine("h:9400", updates=[(600, 620)], ended=900),
        Engine("h:9400", loaded=1020, updates=[(1100, 1120), (1900, 1920)]),
    ],
    "trained every minute, with a crash between": [
        Engine("h:9400", updates=every(60, 60, 420, 10), ended=440),
        Engine("h:9400", loaded=560, updates=every(60, 600, 7000, 10)),
    ],
    "a draft that stays frozen": [
        Engine(
            "h:9400",
            roles=("target", "draft"),
            updates=every(60, 60, 7000, 10),
            of_rank={(0, "draft"): []},
        )
    ],
    "released over night, all of them, and paused": [
        Engine(f"h{number}:9400", released=NIGHT, paused=NIGHT) for number in range(3)
    ],
    "paused in place across updates, with a cache that is kept": [
        Engine("h:9400", updates=every(60, 60, 7000, 10), stale=[(0, 7200)], in_place=True)
    ],
    "prefill and decode with pools of their own": [
        *(Engine(f"p{number}:9400", tokens=100_000) for number in range(2)),
        *(Engine(f"d{number}:9400", tokens=700_000) for number in range(2)),
    ],
    "a dense model that just fits": [Engine("h:9400", weights=53 * GIB, tokens=60_000)],
    "experts that each engine moves by its own load": [*moved_experts()],
    "a clock half an hour ahead": [Engine("h:9400", updates=[(600, 610)], clock=1800)],
    "an exporter that missed a scrape or two": [
        Engine("h:9400", scraped=lambda s: int(s // 60) not in {20, 40, 41})
    ],
    "a pod that is deleted in an update": [Engine("h:9400", open=[(600, 9999)], ended=700)],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_healthy_raises_nothing(check: Check, name: str) -> None:
    fleet = fleet_of(2 * HOUR, *HEALTHY[name])
    check(fleet, fleet.fired(set()))


# --- not healthy --------------------------------------------------------------------------------


def left_behind() -> Iterator[Engine]:
    """One of four has had no update since the fifteenth minute; versions are not given."""
    for number in range(4):
        updates = every(20, 60 + number * 2, 2 * HOUR, 2)
        if number == 3:
            updates = [each for each in updates if each[0] < 900]
        yield Engine(f"h{number}:9400", updates=updates)


def restarted_replica() -> Iterator[Engine]:
    """Three got v2 by an update an hour ago, their drafts after them; one came back with the
    checkpoint of its launch."""
    updates = [(-3600.0, -3590.0)]
    for number in range(3):
        yield Engine(
            f"h{number}:9400",
            roles=("target", "draft"),
            updates=updates,
            of_rank={(0, "draft"): [(-3590.0, -3589.0)]},
            version=always("v2"),
        )
    yield Engine("h3:9400", updates=updates, version=always("v2"), ended=600)
    yield Engine("h3:9400", loaded=1200, version=always("v1"))


def one_byte() -> Iterator[Engine]:
    """Versions are equal, weights are not."""
    for number in range(3):
        yield Engine(f"h{number}:9400", fingerprint=since(0, 0, 7 + (number == 1)))


def smaller_pool(count: int, address: str) -> Iterator[Engine]:
    yield Engine("h0:9400", ended=70 * MINUTE)
    yield Engine(address, loaded=75 * MINUTE, tokens=280_000)
    for number in range(1, count):
        yield Engine(f"h{number}:9400")


LATE = 2 * HOUR // MINUTE
#: The engines, and in which minutes which alerts fire.
FAULTS: dict[str, tuple[list[Engine], dict[int, set[str]]]] = {
    "a rank dies, and stays away": (
        [
            Engine("h:9400", ranks=(0, 1, 2), expected=4),
            Engine("h:9400", ranks=(3,), expected=4, ended=1200),
        ],
        {24: set(), 26: {"SGLangWeightRanksMissing"}, LATE: {"SGLangWeightRanksMissing"}},
    ),
    "one rank of an encoder server": (
        [
            Engine("h:9400", ranks=(0,), roles=("encoder",), expected=2),
            Engine("h:9400", ranks=(1,), roles=("encoder",), expected=2, ended=1200),
        ],
        {24: set(), 26: {"SGLangWeightRanksMissing"}},
    ),
    "a rank misses an update, and the next reaches both": (
        [
            Engine(
                "h:9400",
                ranks=(0, 1),
                of_rank={
                    (0, "target"): [(600, 610), (3000, 3010)],
                    (1, "target"): [(3000, 3010)],
                },
            )
        ],
        {14: set(), 17: {"SGLangWeightRanksDisagree"}, 57: set(), LATE: set()},
    ),
    "a rank drops out of updates that follow one another": (
        [
            Engine(
                "h:9400",
                ranks=(0, 1),
                updates=every(20, 60, 2 * HOUR, 15),
                of_rank={(1, "target"): every(20, 60, 1200, 15)},
            )
        ],
        {19: set(), 28: {"SGLangWeightRanksDisagree"}, LATE: {"SGLangWeightRanksDisagree"}},
    ),
    "a host fails its last update": (
        [*hosts(failed=True)],
        {50: set(), 53: {"SGLangWeightReloadFailed"}, LATE: {"SGLangWeightRanksDisagree"}},
    ),
    "hosts with clocks 20 s apart, of which one missed two updates and has had all since": (
        [*hosts(skew=20, missed=2)],
        {10: {"SGLangWeightRanksDisagree"}, 30: set(), LATE: set()},
    ),
    "an update that hangs, and a gap of seven minutes in scraping": (
        [Engine("h:9400", open=[(600, 3000)], scraped=lambda s: not 1200 <= s < 1620)],
        {
            19: set(),
            21: {"SGLangWeightReloadStuck"},
            26: {"SGLangWeightReloadStuck"},
            40: {"SGLangWeightReloadStuck"},
            52: set(),
        },
    ),
    "a static target is gone": (
        [Engine("h:9400", ended=1200, static=True)],
        {29: set(), 31: {"SGLangWeightExporterDown"}, 70: {"SGLangWeightExporterDown"}, 90: set()},
    ),
    "an exporter that answers one scrape in ten": (
        [Engine("h:9400", scraped=lambda s: s < 900 or int(s // 60) % 10 == 0)],
        {20: set(), 50: {"SGLangWeightExporterDown"}, LATE: {"SGLangWeightExporterDown"}},
    ),
    "an exporter that answers every other minute": (
        [Engine("h:9400", scraped=lambda s: s < 900 or int(s // 60) % 2 == 0)],
        {20: set(), 50: {"SGLangWeightExporterDown"}, LATE: {"SGLangWeightExporterDown"}},
    ),
    "paused and never continued": (
        [Engine("h:9400", paused=[(600, 9999)])],
        {24: set(), 26: {"SGLangGenerationPaused"}, LATE: {"SGLangGenerationPaused"}},
    ),
    "a replica that was not resumed with its peers": (
        [Engine("h0:9400", released=[(600, 9999)]), Engine("h1:9400", released=[(600, 1200)])],
        {49: set(), 51: {"SGLangWeightsReleased"}, LATE: {"SGLangWeightsReleased"}},
    ),
    "one of four left behind in training": (
        [*left_behind()],
        {40: set(), 58: {"SGLangWeightReplicasDiffer"}, LATE: {"SGLangWeightReplicasDiffer"}},
    ),
    "a replica restarted with the checkpoint of its launch": (
        [*restarted_replica()],
        {29: set(), 31: {"SGLangWeightReplicasDiffer"}, LATE: {"SGLangWeightReplicasDiffer"}},
    ),
    "one version, other bytes": (
        [*one_byte()],
        {9: set(), 11: {"SGLangWeightReplicasDiffer"}},
    ),
    "a replica that comes back with 40 % of its pool": (
        [*smaller_pool(2, "h0:9400")],
        {100: set(), 106: {"SGLangKVPoolSmaller"}},
    ),
    "such a one with another address, among four": (
        [*smaller_pool(4, "h9:9400")],
        {100: set(), 106: {"SGLangKVPoolSmaller"}, LATE: {"SGLangKVPoolSmaller"}},
    ),
    "a draft that is left behind by its target": (
        [
            Engine(
                "h:9400",
                roles=("target", "draft"),
                updates=every(60, 60, 7000, 10),
                of_rank={(0, "draft"): every(60, 60, 1200, 10)},
            )
        ],
        {29: set(), 33: {"SGLangWeightDraftBehind"}, LATE: {"SGLangWeightDraftBehind"}},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_raises_its_alert_and_no_other(check: Check, name: str) -> None:
    engines, minutes = FAULTS[name]
    fleet = fleet_of(2 * HOUR, *engines)
    check(fleet, *(fleet.firing(minute, *alerts) for minute, alerts in minutes.items()))
