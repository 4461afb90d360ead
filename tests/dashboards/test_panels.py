# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Every query of the dashboard has an answer, and every panel is drawn from it in a browser.

Grafana's own front-end libraries draw the panels; there is no Grafana server in these tests.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, eventually
from monitoring import Monitoring
from panel_page import PanelPage

#: What a variable is replaced by, as Grafana does for "All".
ALL = dict.fromkeys(("$instance", "$model", "$engine", "$role", "$gpu"), ".*")


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Title, expression and whether it is asked at one point of time."""
    found = [
        (panel["title"], target["expr"], bool(target.get("instant")))
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    return found + [
        ("annotation", each["expr"], False) for each in dashboard["annotations"]["list"]
    ]


def filled_in(expression: str, values: dict[str, str]) -> str:
    for variable, value in {"$__interval": "5s", "$__range": "300s", **values}.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression.replace('"$1"', "").replace('"GPU $1"', ""), expression
    return expression


@pytest.fixture(scope="module")
def reloaded(engine: Engine, monitoring: Monitoring, checkpoints: tuple[Path, Path]) -> float:
    """A reload, with a version that is a number, and a failed one have been scraped; the time."""
    failures = f'sglang_weight_update_failures_total{{engine="{engine.port}",source="disk"}}'
    # Growth is seen between two scrapes of a graph's step at least.
    eventually(lambda: monitoring.query(f"count_over_time({failures}[1m]) > 3"), 60)
    body = {"model_path": str(checkpoints[0]), "weight_version": "7"}
    _, answer = engine.post("/update_weights_from_disk", body)
    assert answer["success"], answer
    engine.update_weights_from_disk(Path("/nowhere/at/all"))
    counted = engine.scrape().sum("sglang_weight_update_failures_total", source="disk")
    eventually(
        lambda: monitoring.query(f"sum({failures}) == {counted}"), what="both updates are scraped"
    )
    return time.time()


def unanswered(
    dashboard: dict[str, Any], monitoring: Monitoring, at: float, values: dict[str, str]
) -> set[tuple[str, str]]:
    without = set()
    for title, expression, instant in expressions(dashboard):
        query = filled_in(expression, values)
        answer = (
            monitoring.query(query, at)
            if instant
            else monitoring.query_range(query, at - 300, at, 5)
        )
        if not answer:
            without.add((title, query))
    return without


def test_every_query_has_an_answer(
    dashboard: dict[str, Any], monitoring: Monitoring, reloaded: float
) -> None:
    assert unanswered(dashboard, monitoring, reloaded, ALL) == set()


def test_a_cpu_engine_alone_lacks_only_what_a_cpu_lacks(
    dashboard: dict[str, Any], monitoring: Monitoring, engine: Engine, reloaded: float
) -> None:
    values = {**ALL, "$instance": f"127.0.0.1:{engine.exporter_port}", "$engine": str(engine.port)}
    without = unanswered(dashboard, monitoring, reloaded, values)
    on_a_gpu_only = ("sglang_gpu_memory_", "DCGM_", "sglang_lora_pool_bytes{", 'role=~"draft')
    unexpected = {
        (title, query)
        for title, query in without
        if not any(part in query for part in on_a_gpu_only)
    }
    assert unexpected == set()


def test_numbers_on_the_first_screen_are_those_of_the_host(
    dashboard: dict[str, Any], monitoring: Monitoring, reloaded: float
) -> None:
    """The parts of a GPU's bar add up to NVML's total, on each of the two recorded GPUs."""
    bars = next(panel for panel in dashboard["panels"] if panel["type"] == "barchart")
    parts: dict[str, float] = {}
    for target in bars["targets"]:
        query = filled_in(target["expr"], {**ALL, "$instance": "gpu-host:9400"})
        for series in monitoring.query(query, reloaded):
            where = series["metric"]["where"]
            parts[where] = parts.get(where, 0) + float(series["value"][1])
    totals = {
        f"gpu-host:9400 GPU {series['metric']['gpu']}": float(series["value"][1])
        for series in monitoring.query("sglang_gpu_memory_total_bytes", reloaded)
    }
    assert len(totals) == 2
    assert parts == pytest.approx(totals)


def test_panels_are_drawn_by_grafanas_libraries(
    dashboard: dict[str, Any],
    monitoring: Monitoring,
    panel_page: PanelPage,
    reloaded: float,
    tmp_path: Path,
) -> None:
    picture = Path(os.environ.get("PANELS_PICTURE", tmp_path / "dashboard.png"))
    found = panel_page.look(monitoring.url, picture, query="scrape=3&from=now-5m")
    assert found["problems"] == []
    panels = {panel["title"]: panel for panel in found["panels"]}
    expected = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(found["panels"]) == len(expected)
    for panel in found["panels"]:
        assert panel["failed"] is None, panel
        assert panel["empty"] is None, panel
        assert all(panel["canvases"]), panel
        if panel["type"] != "text":
            assert panel["state"] == "Done", panel
            assert panel["rows"], panel
        if panel["type"] in {"timeseries", "barchart", "heatmap"}:
            assert len(panel["canvases"]) == 1, panel
    for word in ("Target weights", "Draft weights", "LoRA", "KV pool", "Everything else in use"):
        assert word in panels["Where did my GPU memory go"]["text"]
    for word in ("Model path", "Weights", "Tensors"):
        assert word in panels["What each rank holds"]["text"]
    # The annotation was asked, and has a line for each reload of each engine.
    assert next(query["series"] for query in found["queries"] if query.get("annotation")) >= 2


def test_without_any_data_every_panel_says_so_in_words(
    dashboard: dict[str, Any], panel_page: PanelPage, tmp_path: Path, monitoring: Monitoring
) -> None:
    # Long before the first sample.
    query = "scrape=15&from=2020-01-01T00:00:00Z&to=2020-01-01T01:00:00Z"
    found = panel_page.look(monitoring.url, tmp_path / "empty.png", query=query)
    assert found["problems"] == []
    shipped = {
        panel["title"]: panel["fieldConfig"]["defaults"]["noValue"]
        for panel in dashboard["panels"]
        if panel["type"] not in {"row", "text"}
    }
    said = {panel["title"]: panel["empty"] for panel in found["panels"] if panel["type"] != "text"}
    # PromQL's own zero: `x == 0 or vector(0)` is not used, so all are empty.
    assert said == shipped


MISTAKES = {
    "unknown_field": ('"unit": "bytes"', '"unti": "bytes"'),
    "unknown_value": ('"stacking": "percent"', '"stacking": "percents"'),
    "unknown_panel": ('"type": "heatmap"', '"type": "heatmaps"'),
    "wrong_option": ('"placement": "bottom"', '"placement": "below"'),
}


def test_the_json_has_grafanas_types_and_mistakes_do_not(
    dashboard: dict[str, Any], panel_page: PanelPage
) -> None:
    shipped = json.dumps(dashboard)
    sources = [panel_page.write_types(shipped, "shipped")]
    for name, (right, wrong) in MISTAKES.items():
        assert right in shipped
        sources.append(panel_page.write_types(shipped.replace(right, wrong, 1), name))
    errors = panel_page.type_errors(*sources)
    assert "shipped.ts" not in errors, errors
    for name in MISTAKES:
        assert f"{name}.ts" in errors
