# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Every query of the dashboard has an answer, and every panel is drawn from it in a browser.

Grafana's own front-end libraries draw the panels; there is no Grafana server in these tests.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from monitoring import Monitoring
from panel_page import PanelPage, is_drawn
from panel_queries import ALL, expressions, filled_in, panels_of
from waiting import eventually


@pytest.fixture(scope="module")
def reloaded(engine: Engine, monitoring: Monitoring, checkpoints: tuple[Path, Path]) -> float:
    """A reload, with a version that is a number, and a failed one have been scraped, and a tensor
    that was read, and one that is not there; the time."""
    failures = f'sglang_weight_update_failures_total{{engine="{engine.port}",source="disk"}}'
    # Growth is seen between two scrapes of a graph's step at least.
    eventually(lambda: monitoring.query(f"count_over_time({failures}[1m]) > 3"))
    body = {"model_path": str(checkpoints[0]), "weight_version": "7"}
    brought = f'sglang_weight_update_bytes_total{{engine="{engine.port}",source="disk"}}'
    for _ in range(2):  # The second changes nothing.
        _, answer = engine.post("/update_weights_from_disk", body)
        assert answer["success"], answer
        # What comes with the first one grows by the second only if it was scraped in between.
        eventually(lambda: monitoring.query(brought), what="the update is scraped")
    for name in ("model.norm.weight", "not.there"):
        engine.post("/get_weights_by_name", {"name": name})
    failed = f'sglang_weight_operation_failures_total{{engine="{engine.port}"}} > 0'
    eventually(lambda: monitoring.query(failed), what="what was not read is scraped")
    engine.update_weights_from_disk(Path("/nowhere/at/all"))
    counted = engine.scrape().sum("sglang_weight_update_failures_total", source="disk")
    eventually(
        lambda: monitoring.query(f"sum({failures}) == {counted}"), what="both updates are scraped"
    )
    return time.time()


#: Tables of what is wrong, which are empty where nothing is.
WHAT_IS_WRONG = {"Firing now", "Who is behind", "Exporters that do not answer"}


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
        if not answer and title not in WHAT_IS_WRONG:
            without.add((title, query))
    return without


def test_every_query_has_an_answer(
    dashboard: dict[str, Any], monitoring: Monitoring, reloaded: float
) -> None:
    without = unanswered(dashboard, monitoring, reloaded, ALL)
    assert {query for _, query in without} == set()


def test_a_cpu_engine_alone_lacks_only_what_a_cpu_lacks(
    dashboard: dict[str, Any], monitoring: Monitoring, engine: Engine, reloaded: float
) -> None:
    values = {**ALL, "$instance": f"127.0.0.1:{engine.exporter_port}", "$engine": str(engine.port)}
    without = unanswered(dashboard, monitoring, reloaded, values)
    may_lack = ["sglang_gpu_memory_", "DCGM_", "sglang_lora_pool_bytes{", 'role=~"draft']
    may_lack.append("sglang_rank_memory_")
    # Counters that come with their first event, of which this engine has had none.
    may_lack += ["sglang_weight_operation", "sglang_weight_table_changes_total"]
    may_lack.append("sglang_weight_update_requests_total")
    unexpected = {
        (title, query) for title, query in without if not any(part in query for part in may_lack)
    }
    assert unexpected == set()


def test_numbers_on_the_first_screen_are_those_of_the_host(
    dashboard: dict[str, Any], monitoring: Monitoring, reloaded: float
) -> None:
    """The parts of a GPU's bar add up to NVML's total, on each of the two recorded GPUs."""
    bars = next(panel for panel in panels_of(dashboard) if panel["type"] == "barchart")
    parts: dict[str, float] = {}
    for target in bars["targets"]:
        query = filled_in(target["expr"], {**ALL, "$instance": "gpu-host:9400"})
        for series in monitoring.query(query, reloaded):
            where = series["metric"]["where"]
            parts[where] = parts.get(where, 0) + float(series["value"][1])
    totals = {
        f"gpu-host GPU {series['metric']['gpu']}": float(series["value"][1])
        for series in monitoring.query("sglang_gpu_memory_total_bytes", reloaded)
    }
    assert len(totals) == 2
    assert parts == pytest.approx(totals)


def test_the_readmes_queries_have_answers(monitoring: Monitoring, reloaded: float) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```promql\n(.*?)```", readme, re.DOTALL)
    queries = block.splitlines()
    assert len(queries) == 3
    for query in queries:
        assert monitoring.query(query.removesuffix(" > 1"), reloaded), query


def test_panels_are_drawn_by_grafanas_libraries(
    dashboard: dict[str, Any],
    monitoring: Monitoring,
    panel_page: PanelPage,
    reloaded: float,
    tmp_path: Path,
) -> None:
    query = f"board={dashboard['uid']}&open=1&lines=1&scrape=3&from=now-5m"
    found = panel_page.look(monitoring.url, tmp_path / "whole.png", query=query)
    assert found["problems"] == []
    drawn = {panel["title"]: panel for panel in found["panels"]}
    assert len(found["panels"]) == len(panels_of(dashboard))
    for panel in found["panels"]:
        is_drawn(panel)
    for word in ("Target weights", "Draft weights", "LoRA", "KV pool", "Everything else in use"):
        assert word in drawn["Where did my GPU memory go"]["text"]
    if "What each rank holds" in drawn:
        for word in ("Rank", "Weights", "Tensors"):
            assert word in drawn["What each rank holds"]["text"]
    # The annotation was asked, and has a line for the updates of each model.
    assert next(query["series"] for query in found["queries"] if query.get("annotation")) >= 2


def test_without_any_data_every_panel_says_so_in_words(
    dashboard: dict[str, Any], panel_page: PanelPage, tmp_path: Path, monitoring: Monitoring
) -> None:
    # Long before the first sample.
    query = f"board={dashboard['uid']}&open=1&scrape=15"
    query += "&from=2020-01-01T00:00:00Z&to=2020-01-01T01:00:00Z"
    found = panel_page.look(monitoring.url, tmp_path / "empty.png", query=query)
    assert found["problems"] == []
    shipped = {
        panel["title"]: panel["fieldConfig"]["defaults"]["noValue"]
        for panel in panels_of(dashboard)
        if panel["type"] != "text"
    }
    said = {panel["title"]: panel["empty"] for panel in found["panels"] if panel["type"] != "text"}
    # PromQL's own zero: `x == 0 or vector(0)` is not used, so all are empty.
    assert said == shipped


MISTAKES = {
    "unknown_field": ('"unit": "bytes"', '"unti": "bytes"'),
    "unknown_value": ('"stacking": "normal"', '"stacking": "normally"'),
    "unknown_panel": ('"type": "heatmap"', '"type": "heatmaps"'),
    "wrong_option": ('"placement": "bottom"', '"placement": "below"'),
}


def test_the_json_has_grafanas_types_and_mistakes_do_not(
    boards: dict[str, Any], panel_page: PanelPage
) -> None:
    shipped = {name: json.dumps(board) for name, board in boards.items()}
    sources = [panel_page.write_types(text, name) for name, text in shipped.items()]
    for name, (right, wrong) in MISTAKES.items():
        text = shipped["sglang-engine"]
        assert right in text
        sources.append(panel_page.write_types(text.replace(right, wrong, 1), name))
    errors = panel_page.type_errors(*sources)
    assert not {name for name in boards if f"{name}.ts" in errors}, errors
    for name in MISTAKES:
        assert f"{name}.ts" in errors
