# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The boards for Perses ask what those for Grafana ask, and have the types that it publishes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from monitoring import DASHBOARDS
from panel_page import CACHE, SOURCES, installed
from panel_queries import expressions, panels_of

#: What has the types of a dashboard, and of each plugin that the boards use. Only these files are
#: wanted, not what they would need to run.
PACKAGES = (
    "core@0.52.0",
    "plugin-system@0.52.0",
    "components@0.52.0",
    "prometheus-plugin@0.53.4",
    "timeseries-chart-plugin@0.10.2",
    "stat-chart-plugin@0.10.0",
    "table-plugin@0.8.1",
    "bar-chart-plugin@0.10.0",
    "status-history-chart-plugin@0.9.1",
    "markdown-plugin@0.9.1",
)
MISTAKES = {
    "unknown_unit": ('"unit": "bytes"', '"unit": "byte"'),
    "unknown_field": ('"allowAllValue"', '"allowAll"'),
    "unknown_layout": ('"kind": "Grid"', '"kind": "Row"'),
    "wrong_option": ('"density": "compact"', '"density": "tight"'),
    "missing_query": ('"query": ', '"expr": '),
    "unknown_plugin": ('"kind": "StatChart"', '"kind": "Stat"'),
}


def perses(dashboard: dict[str, Any]) -> Path:
    return DASHBOARDS / "perses" / f"{dashboard['uid']}.json"


def test_perses_shows_every_panel_and_asks_the_same(dashboard: dict[str, Any]) -> None:
    spec = json.loads(perses(dashboard).read_text())["spec"]
    shown = {
        panel["spec"]["display"]["name"]: [
            query["spec"]["plugin"]["spec"]["query"] for query in panel["spec"].get("queries", [])
        ]
        for panel in spec["panels"].values()
    }
    asked: dict[str, list[str]] = {panel["title"]: [] for panel in panels_of(dashboard)}
    for title, expression, _ in expressions(dashboard):
        asked.setdefault(title, []).append(expression)
    del asked["annotation"]  # Which its dashboards do not have.
    assert shown == asked
    placed = [
        item["content"]["$ref"].rpartition("/")[2]
        for layout in spec["layouts"]
        for item in layout["spec"]["items"]
    ]
    assert sorted(placed) == sorted(spec["panels"])
    variables = {each["name"] for each in dashboard["templating"]["list"]} - {"datasource"}
    assert {each["spec"]["name"] for each in spec["variables"]} == variables


@pytest.fixture(scope="module")
def types() -> Path:
    """A folder in which tsc finds Perses' types, fetched once for each set of versions."""
    versions = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    folder = CACHE / f"perses-{versions}"
    for package in PACKAGES:
        found = folder / "node_modules" / "@perses-dev" / package.partition("@")[0]
        if not found.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", "--silent", f"@perses-dev/{package}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            archive = folder / done.stdout.strip()
            with tarfile.open(archive) as content:
                content.extractall(found.with_suffix(".part"), filter="data")
            found.with_suffix(".part").joinpath("package").rename(found)
            archive.unlink()
    return folder


@pytest.mark.release("boards")
def test_the_json_has_perses_types_and_mistakes_do_not(
    boards: dict[str, dict[str, Any]], types: Path
) -> None:
    page = installed()
    texts = {name: perses(board).read_text() for name, board in boards.items()}
    for name, (right, wrong) in MISTAKES.items():
        assert right in texts["sglang-engine"]
        texts[name] = texts["sglang-engine"].replace(right, wrong, 1)
    for name, text in texts.items():
        (types / f"{name}.json").write_text(text)
        program = SOURCES / "check-perses.mjs"
        page.node_run(program, types / f"{name}.json", types / f"{name}.ts")
    errors = page.type_errors(*(str(types / f"{name}.ts") for name in texts))
    assert not {name for name in boards if f"{name}.ts" in errors}, errors
    for name in MISTAKES:
        assert f"{name}.ts" in errors
