# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""VictoriaMetrics answers every rule and every panel as Prometheus does, over the same samples:
the scenarios of the rules' tests, each as a cluster of its own, and the recorded GPU host.

Where the two differ by design is named here, and in docs/alerts.md for whoever runs it.
"""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engines import http_get
from monitoring import DASHBOARDS, RULES, Monitoring, replay, run
from panel_queries import ALL, expressions, filled_in
from ports import free_port
from waiting import LIMIT, eventually

pytestmark = pytest.mark.release("stores")

RULE_TESTS = DASHBOARDS / "sglang-weights.rules.test.yml"
MINUTES = 120

#: Series and seconds since the beginning → value.
Answer = dict[tuple[frozenset[tuple[str, str]], float], float]


def expanded(values: str) -> Iterator[float | None]:
    """promtool's notation: `1x3`, `0+60x20`, `_x9`, `stale`."""
    for word in values.split():
        found = re.fullmatch(r"(_|stale|-?[\d.]+)(?:([+-][\d.]+))?(?:x(\d+))?", word)
        assert found, word
        first, step, times = found.groups()
        for number in range(int(times or 0) + 1 if first != "_" else int(times or 1)):
            yield None if first in {"_", "stale"} else float(first) + number * float(step or 0)


def samples(begin: float) -> Iterator[tuple[str, float, float]]:
    """Series, value and time of all scenarios; times that are values are moved with them."""
    for number, scenario in enumerate(yaml.safe_load(RULE_TESTS.read_text())["tests"]):
        for series in scenario["input_series"]:
            name, _, labels = series["series"].partition("{")
            # A scenario that has clusters has two of them.
            kept = [label for label in labels.rstrip("}").split(",") if label]
            kept = [re.sub('^cluster="', f'cluster="{number}-', label) for label in kept]
            if not any(label.startswith("cluster=") for label in kept):
                kept.append(f'cluster="{number}"')
            moved = begin if name.endswith("_timestamp_seconds") else 0.0
            for minute, value in enumerate(expanded(series["values"])):
                if value is not None and minute < MINUTES:
                    yield f"{name}{{{','.join(kept)}}}", value + moved, begin + 60 * minute


class SecondStore:
    """Debian's `victoria-metrics`, filled with text."""

    def __init__(self, directory: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        command = ["victoria-metrics", f"-storageDataPath={directory}/second"]
        command += [f"-httpListenAddr={self.url.removeprefix('http://')}", "-retentionPeriod=10y"]
        # As Prometheus has it. By itself it guesses from the samples for how long one counts.
        command += [f"-search.{which}StalenessInterval=5m" for which in ("min", "max")]
        command += ["-search.latencyOffset=0s"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        eventually(lambda: http_get(self.url + "/health")[0] == 200, what="VictoriaMetrics is up")

    def fill(self, text: Path) -> None:
        lines = (line for line in text.read_text().splitlines() if not line.startswith("#"))
        body = "\n".join(re.sub(r" (\d+)\.(\d{3})$", r" \1\2", line) for line in lines)
        urllib.request.urlopen(self.url + "/api/v1/import/prometheus", body.encode()).close()
        urllib.request.urlopen(self.url + "/internal/force_flush").close()
        urllib.request.urlopen(self.url + "/internal/resetRollupResultCache").close()

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        asked = {"query": expression, "start": start, "end": end, "step": step, "nocache": 1}
        address = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        status, _, body = http_get(address)
        assert status == 200, body
        found: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return found

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(LIMIT)


class Stores:
    """Both of them, with the same samples, which begin at a time."""

    def __init__(self, directory: Path) -> None:
        self.begin = float(int(time.time()) // 60 * 60 - 2 * 3600)
        text = directory / "scenarios.om"
        found: dict[str, list[str]] = {}
        for name, value, at in samples(self.begin):
            found.setdefault(name, []).append(f"{name} {value:.17g} {at:.3f}\n")
        text.write_text("".join(line for lines in found.values() for line in lines) + "# EOF\n")
        run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, directory / "data")
        replay(directory, self.begin + 3600)
        self.second = SecondStore(directory)
        self.second.fill(text)
        self.second.fill(directory / "recording.om")
        self.prometheus = Monitoring(directory, {}).start()

    def ask(self, expression: str) -> tuple[Answer, Answer]:
        """Not at the samples' own seconds: there the two differ in whether a window has its first
        sample."""
        span = (self.begin + 90, self.begin + 7000, 60)
        found = self.prometheus.query_range(expression, *span)
        return self._answer(found), self._answer(self.second.query_range(expression, *span))

    def _answer(self, found: list[dict[str, Any]]) -> Answer:
        """An empty label is none."""
        answer: Answer = {}
        for each in found:
            labels = frozenset(
                (key, value) for key, value in each["metric"].items() if value and key != "__name__"
            )
            for at, value in each["values"]:
                answer[labels, at - self.begin] = float(value)
        return answer

    def stop(self) -> None:
        self.second.stop()
        self.prometheus.stop()


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    both = Stores(Path(tempfile.mkdtemp(prefix="stores-")))
    try:
        yield both
    finally:
        both.stop()


def differences(stores: Stores, expression: str) -> list[str]:
    """Where a rule asks for a range of what another records, one of the two may be a step behind:
    each counts the steps of a subquery from elsewhere."""
    one, other = stores.ask(expression)
    steps = (0.0, -60.0, 60.0) if ":1m]" in expression else (0.0,)

    def is_in(key: tuple[frozenset[tuple[str, str]], float], mine: Answer, others: Answer) -> bool:
        found = [others.get((key[0], key[1] + step), math.inf) for step in steps]
        return any(
            math.isclose(mine[key], each, rel_tol=1e-6)
            or (math.isnan(mine[key]) and math.isnan(each))
            for each in found
        )

    different = {key for key in one if not is_in(key, one, other)}
    different |= {key for key in other if not is_in(key, other, one)}
    return [
        f"at {key[1]:.0f} s {dict(key[0])}: {one.get(key)} and {other.get(key)}"
        for key in sorted(different, key=lambda key: (key[1], str(key[0])))
    ]


def rules() -> list[tuple[str, str]]:
    """Where one asks for what another has recorded, with that one's expression in its place: the
    stores have samples, and evaluate no rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in found if "record" in rule}
    asks_for = re.compile(
        rf"({'|'.join(map(re.escape, recorded))})(?![\w:])(?:\[(\w+)\]|( offset \w+))?"
    )

    def inlined(expression: str, without: frozenset[str] = frozenset()) -> str:
        def one(asked: re.Match[str]) -> str:
            name, window, offset = asked.groups()
            if name in without:  # What was recorded a minute ago, of which there is nothing.
                return asked[0]
            text = f"({inlined(recorded[name], without | {name})})"
            if offset is not None:
                return f"last_over_time({text}[1m:1m]{offset})"
            return text if window is None else f"{text}[{window}:1m]"

        return asks_for.sub(one, expression)

    return [(rule.get("alert") or rule["record"], inlined(rule["expr"])) for rule in found]


#: ``increase()`` is not extrapolated: where these graphs round, Prometheus may be one off. A slope
#: of one sample is 0 and not nothing. Of equals, ten others are the first ten.
OTHERWISE = ("increase(", "deriv(", "bottomk(", "topk(")

#: ``label_replace`` leaves a label behind that no series has.
NAMED_OTHERWISE = {"KV bytes in use"}


@pytest.mark.parametrize(("name", "expression"), rules(), ids=[name for name, _ in rules()])
def test_a_rule_has_the_same_answer(stores: Stores, name: str, expression: str) -> None:
    assert differences(stores, expression) == []


#: It asks for six hours, and the samples are of two; it asks for what it has itself recorded.
UNRAISED = {"SGLangLoRAAdaptersGrow", "SGLangNoRoomToResume"}


def test_the_samples_raise_every_alert(stores: Stores) -> None:
    silent = {name for name, expression in rules() if not stores.ask(expression)[0]}
    assert silent == UNRAISED


def test_a_panel_has_the_same_answer(stores: Stores, dashboard: dict[str, Any]) -> None:
    different = {}
    for title, expression, _ in expressions(dashboard):
        query = filled_in(expression, ALL)
        if not any(each in query for each in OTHERWISE) and title not in NAMED_OTHERWISE:
            different[title, query] = differences(stores, query)
    assert len(different) > 10
    assert {asked: found[:3] for asked, found in different.items() if found} == {}
