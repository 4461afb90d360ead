# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What boards and rules cost a Prometheus that has a fleet of 2,000 GPUs: seconds of its processor.

    python tests/shared/board_cost.py [BOARD.json ...] [RULES.yml]

writes an hour of 256 simulated hosts into a storage of its own (minutes), starts Prometheus on it,
and prints what each panel of the first screens, and each rule, costs.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from fleet_recording import Recording, replay_fleet
from monitoring import DASHBOARDS, RULES, Monitoring
from panel_queries import ALL, filled_in

#: A sample a minute, so that the text of them has three gigabytes and not twelve.
HOUR, SCRAPE = 3600, 60
FLEETS = 32
#: How often each thing is asked.
TIMES = 3
#: Points that a graph as wide as a screen asks for at most.
POINTS = 300


def first_screen(board: dict[str, Any]) -> list[dict[str, Any]]:
    """What Grafana asks when the board is opened."""
    return [panel for panel in board["panels"] if panel["type"] not in ("row", "text")]


def names_in(*texts: str) -> frozenset[str]:
    """Series that are asked for."""
    found = {name for text in texts for name in re.findall(r"[a-zA-Z_:][\w:]*", text)}
    # Recorded ones come of others, and `__name__=~` has several.
    return frozenset(found | {part for name in found for part in name.split("|")})


def step_of(panel: dict[str, Any]) -> int:
    """Seconds between two points of a graph over an hour."""
    points = panel.get("maxDataPoints") or POINTS
    return max(15, HOUR // points)


def found_first(stack: Monitoring, board: dict[str, Any], end: float) -> dict[str, str]:
    """What the board's variables find that no reader chooses."""
    found = {}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        if asked := re.fullmatch(r"query_result\((.+)\)", variable["query"]["query"]):
            series = stack.query(filled_in(asked[1], ALL), end)
            labels = " ".join(f'{k}="{v}"' for one in series for k, v in one["metric"].items())
            values = re.findall(variable["regex"].strip("/"), labels)
            found[f"${variable['name']}"] = f"({'|'.join(values)})"
    return found


def ask(
    stack: Monitoring, panel: dict[str, Any], end: float, found: dict[str, str] | None = None
) -> None:
    """All that one panel asks. `found`: values of variables."""
    step = step_of(panel)
    values = {**ALL, **(found or {}), "$__interval": f"{step}s", "$__rate_interval": "240s"}
    values["$__range"] = f"{HOUR}s"
    for target in panel.get("targets", []):
        expression = target["expr"]
        for variable, value in values.items():
            expression = re.sub(re.escape(variable) + r"\b", value, expression)
        if target.get("instant"):
            stack.query(filled_in(expression, values), end)
        else:
            stack.query_range(filled_in(expression, values), end - HOUR, end, step)


class Fleet:
    """Prometheus with an hour of it, until `stop`."""

    def __init__(self, directory: Path, boards: list[dict[str, Any]], rules: str = "") -> None:
        end = directory / "end"
        if not end.exists():
            # Between two scrapes, as it is when somebody looks.
            now = time.time() - SCRAPE
            asked = names_in(json.dumps([first_screen(board) for board in boards]), rules)
            names = asked | {"up", "sglang_weight_info"}
            replay_fleet(directory, now, Recording(HOUR, SCRAPE, FLEETS, names))
            end.write_text(str(now))
        self.end = float(end.read_text())
        self.stack = Monitoring(directory, {}, evaluation_interval="1h").start()

    def cost(self, ask: Callable[[], object]) -> float:
        """Seconds of the processor for this and what Prometheus does beside it: the least of some
        times, because other work on the machine makes it more."""
        return min(self._cost(ask) for _ in range(TIMES))

    def _cost(self, ask: Callable[[], object]) -> float:
        before = self.stack.processor_seconds()
        ask()
        return self.stack.processor_seconds() - before

    def first_screen(self, board: dict[str, Any]) -> dict[str, float]:
        """What each panel of it costs, and what is found first for all of them."""
        found: dict[str, str] = {}
        spent = {
            "what is found first": self.cost(
                lambda: found.update(found_first(self.stack, board, self.end))
            )
        }
        for panel in first_screen(board):
            asked = partial(ask, self.stack, panel, self.end, found)
            spent[panel["title"]] = self.cost(asked)
        return spent

    def stop(self) -> None:
        self.stack.stop()


def main() -> None:
    """Print what is asked for by the command line."""
    paths = [Path(each) for each in sys.argv[1:]] or [*DASHBOARDS.glob("*.json"), RULES]
    boards = [json.loads(path.read_text()) for path in paths if path.suffix == ".json"]
    rules = "".join(path.read_text() for path in paths if path.suffix == ".yml")
    fleet = Fleet(Path(tempfile.mkdtemp(prefix="cost-")), boards, rules)
    try:
        (count,) = fleet.stack.query('count(sglang_weight_info{role="target"})', fleet.end)
        print(f"{count['value'][1]} GPUs")
        for board in boards:
            costs = fleet.first_screen(board)
            for title, seconds in costs.items():
                print(f"{seconds:7.2f} s  {title}")
            print(f"{sum(costs.values()):7.2f} s  {board['title']}")
        total = 0.0
        for group in yaml.safe_load(rules or "groups: []")["groups"]:
            for rule in group["rules"]:
                spent = fleet.cost(partial(fleet.stack.query, rule["expr"], fleet.end))
                total += spent
                print(f"{spent:7.2f} s  {rule.get('alert') or rule['record']}")
        print(f"{total:7.2f} s  one evaluation of the rules")
    finally:
        fleet.stop()


if __name__ == "__main__":
    main()
