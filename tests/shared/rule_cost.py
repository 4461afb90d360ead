# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each rule reads and takes in a Prometheus that has six hours of 64 GPUs.

    python tests/shared/rule_cost.py [--fleets 1] [--hours 6] [--scrape 15] [RULES.yml ...]

writes six hours of 8 simulated hosts, and of what the rules record of them, into a storage of its
own (minutes), and prints how many samples one evaluation of each rule reads there, as Prometheus
counts them (`stats=all`), and the milliseconds that it takes. The sum is that of 15 seconds, in
which a group with an interval of its own is not always evaluated. Several files are asked on the
same data. `--fleets 32 --hours 1 --scrape 60` are 2,048 GPUs on 256 hosts: what looks back further
than that hour reads less there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from board_cost import names_in
from engines import http_get
from fleet_recording import HOSTS, RANKS, Recording, replay_fleet
from monitoring import RULES, Monitoring, run

#: Seconds between two evaluations of rules whose group has no interval of its own.
EVERY = 15
#: Seconds between the samples that are kept of what no rule reads over a range.
SPARSE = 60
#: The least of so many times counts: other work on the machine makes it more.
TIMES = 5
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Cost:
    """Of one rule."""

    name: str
    every: int
    samples: int
    seconds: float


def over_ranges(rules: str) -> frozenset[str]:
    """What is read over a range."""
    return frozenset(re.findall(r"([a-zA-Z_:][\w:]*)(?:\{[^{}]*\})?\[\d", rules))


def groups_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return found


def recorded(paths: list[Path], scrape: int) -> list[dict[str, Any]]:
    """Recording rules that other rules read, each in a group with its interval; of the first file
    that has one of that name."""
    groups = [group for path in paths for group in groups_of(path)]
    rules = [(group, rule) for group in groups for rule in group["rules"]]
    found = {rule["record"]: (group, rule) for group, rule in reversed(rules) if "record" in rule}
    return [
        {
            "name": name,
            "interval": group.get("interval", f"{max(EVERY, scrape)}s"),
            "rules": [{"record": name, "expr": rule["expr"]}],
        }
        for name, (group, rule) in found.items()
        if any(name in other["expr"] for _, other in rules if other.get("record") != name)
    ]


@dataclass(frozen=True)
class Span:
    """Of what is recorded: fleets of HOSTS, and seconds between two scrapes."""

    fleets: int = 1
    hours: int = 6
    scrape: int = 15

    @property
    def gpus(self) -> int:
        return self.fleets * HOSTS * RANKS


class Recorded:
    """Prometheus with them, until `stop`."""

    def __init__(self, directory: Path, paths: list[Path], span: Span) -> None:
        self.span = span
        self.end = float(int(time.time()) // SPARSE * SPARSE)
        rules = "".join(path.read_text() for path in paths)
        dense = over_ranges(rules)

        def kept(host: int, name: str, at: float, value: float) -> float | None:
            seldom = at % SPARSE and name.partition("{")[0] not in dense
            return None if seldom else value

        replay_fleet(
            directory,
            self.end,
            Recording(
                span.hours * 3600,
                span.scrape,
                span.fleets,
                names=names_in(rules) | {"up"},
                preset="default",
                changed=kept,
            ),
        )
        self.directory = directory
        self.stack = Monitoring(directory, {}, evaluation_interval="1h").start()
        # What is recorded of what is recorded comes the second time.
        for _ in range(2):
            self._record(recorded(paths, span.scrape))

    def _record(self, groups: list[dict[str, Any]]) -> None:
        file = self.directory / "recorded.yml"
        file.write_text(yaml.safe_dump({"groups": groups}))
        run(
            *("promtool", "tsdb", "create-blocks-from", "rules"),
            *("--start", f"{self.end - self.span.hours * 3600:.0f}", "--end", f"{self.end:.0f}"),
            *("--url", self.stack.url, "--output-dir", self.directory / "data", file),
        )
        self.stack.restart()

    def ask(self, expression: str) -> tuple[int, float]:
        """Samples, and the least of seconds."""
        parameters = {"query": expression, "time": str(self.end), "stats": "all"}
        address = f"{self.stack.url}/api/v1/query?{urllib.parse.urlencode(parameters)}"
        found = []
        for _ in range(TIMES):
            stats = json.loads(http_get(address)[2])["data"]["stats"]
            found.append(
                (stats["samples"]["totalQueryableSamples"], stats["timings"]["evalTotalTime"])
            )
        return min(found)

    def costs(self, path: Path) -> list[Cost]:
        """Of the rules of a file, the dearest first."""
        found = []
        for group in groups_of(path):
            every = group.get("interval", f"{EVERY}s")
            interval = int(every[:-1]) * SECONDS[every[-1]]
            for rule in group["rules"]:
                samples, seconds = self.ask(rule["expr"])
                name = rule.get("alert") or rule["record"]
                found.append(Cost(name, interval, samples, seconds))
        return sorted(found, key=lambda cost: -cost.samples / cost.every)

    def stop(self) -> None:
        self.stack.stop()


def main() -> None:
    """Print what is asked for by the command line."""
    parser = argparse.ArgumentParser()
    for name, default in (("fleets", 1), ("hours", 6), ("scrape", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("rules", nargs="*", type=Path, default=[RULES])
    given = parser.parse_args()
    span = Span(given.fleets, given.hours, given.scrape)
    recording = Recorded(Path(tempfile.mkdtemp(prefix="rule-cost-")), given.rules, span)
    try:
        for path in given.rules:
            costs = recording.costs(path)
            print(f"{path}: {len(costs)} rules\n  samples       ms  every  rule")
            for each in costs:
                print(
                    f"{each.samples:9,d} {each.seconds * 1e3:8.2f} {each.every:5d} s  {each.name}"
                )
            for what, part in (("one evaluation", 1.0), (f"in {EVERY} s", 0.0)):
                shares = [part or min(1.0, EVERY / each.every) for each in costs]
                samples = sum(s * each.samples for s, each in zip(shares, costs, strict=True))
                seconds = sum(s * each.seconds for s, each in zip(shares, costs, strict=True))
                print(
                    f"{samples:9,.0f} {seconds * 1e3:8.2f}  {what}: {samples / span.gpus:,.0f} a"
                    f" GPU, {2000 * samples / span.gpus / 1e6:.2f} million with 2,000"
                )
    finally:
        recording.stop()


if __name__ == "__main__":
    main()
