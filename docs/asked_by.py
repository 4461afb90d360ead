# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which panels and which rules need a metric: read from what is shipped in ``dashboards/``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DASHBOARDS = Path(__file__).parents[1] / "dashboards"
#: What stands for a board's variables and the lines of updates, which are no panel.
AROUND = "selection and marks"

_NAME = re.compile(r"\b(?:[a-z]+:)?sglang_[a-z_]+(?::[a-z]+)?\b")
_SUFFIX = re.compile(r"_(total|bucket|sum|count)$")


@dataclass
class Askers:
    """Of one metric, in the order in which they stand."""

    engine: list[str] = field(default_factory=list)
    fleet: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    #: Recorded series, which panels and alerts of a user's own may ask for.
    recorded: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.engine or self.fleet or self.alerts or self.recorded)


def _panels(board: Path) -> Iterator[tuple[str, str]]:
    """Title and expressions of each panel."""
    content: dict[str, Any] = json.loads(board.read_text(encoding="utf-8"))
    for row in content["panels"]:
        for panel in (row, *row.get("panels", ())):  # A row that is closed has its panels in it.
            for target in panel.get("targets", ()):
                yield panel["title"], target["expr"]
    for around in (*content["templating"]["list"], *content["annotations"]["list"]):
        yield AROUND, json.dumps(around)


def _rules(file: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, name and text of each rule, with what its annotations ask Prometheus for."""
    for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            kind = "alerts" if "alert" in rule else "recorded"
            annotations = " ".join(rule.get("annotations", {}).values())
            yield kind, rule.get("alert") or rule["record"], f"{rule['expr']} {annotations}"


def asked_by(metrics: set[str]) -> dict[str, Askers]:
    """For each of these families (without ``_total``) who asks for it, be it through a recorded
    series."""
    found = {name: Askers() for name in sorted(metrics)}
    recorded: dict[str, set[str]] = {}

    def families(text: str) -> set[str]:
        names: set[str] = set()
        for name in set(_NAME.findall(text)):
            family = name if name in found else _SUFFIX.sub("", name)
            names |= recorded.get(name, {family} & found.keys())
        return names

    def note(kind: str, asker: str, text: str) -> None:
        for family in families(text):
            askers: list[str] = getattr(found[family], kind)
            if asker not in askers:
                askers.append(asker)

    # What is recorded is recorded before it is asked for.
    for kind, name, text in _rules(DASHBOARDS / "sglang-weights.rules.yml"):
        note(kind, name, text)
        if kind == "recorded":
            recorded[name] = families(text)
    for board in ("engine", "fleet"):
        for title, text in _panels(DASHBOARDS / f"sglang-{board}.json"):
            note(board, title, text)
    return found
