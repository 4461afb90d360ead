# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What Fleet says of how long updates took, in promtool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from monitoring import run
from panel_queries import ALL, expressions, filled_in

RANK = '{instance="a:9400", engine="30000", role="target", tp_rank="0", pp_rank="0", dp_rank="0"}'
#: By minute: loaded in a minute, updated in 30 s, an update that failed and left something,
#: another in 12 s, and the engine anew.
SERIES = {
    "last_update_timestamp": "100 100 330 500 712 900",
    "last_update_start_timestamp": "40 40 300 300 700 840",
    "last_update_duration": "_ _ 30 30 12 stale",
}


def check(tmp_path: Path, asked: str, answers: list[dict[str, float]]) -> None:
    """Asked of promtool, minute by minute: values by labels."""
    series = [
        {"series": f"sglang_weight_{name}_seconds{RANK}", "values": values}
        for name, values in SERIES.items()
    ]
    tests = [
        {
            "expr": asked,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in one.items()],
        }
        for minute, one in enumerate(answers)
    ]
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump(
            {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}
        )
    )
    run("promtool", "test", "rules", file)


def test_the_table_has_the_last_that_succeeded_and_no_load(
    boards: dict[str, Any], tmp_path: Path
) -> None:
    (expression,) = (
        each
        for title, each, _ in expressions(boards["sglang-fleet"])
        if title.startswith("What each engine serves") and "duration" in each
    )
    engine = '{instance="a:9400", engine="30000"}'
    took = [{engine: seconds} for seconds in (30.0, 30.0, 12.0)]
    check(tmp_path, filled_in(expression, ALL), [{}, {}, *took, {}])


def test_the_graph_has_each_that_succeeded_once(boards: dict[str, Any], tmp_path: Path) -> None:
    (expression,) = (
        each for title, each, _ in expressions(boards["sglang-fleet"]) if title == "Update duration"
    )
    asked = filled_in(expression, {**ALL, "$__interval": "1m"})
    first, second = (
        {f'{{part="{part}"}}': seconds for part in ("median", "slowest")}
        for seconds in (30.0, 12.0)
    )
    check(tmp_path, asked, [{}, {}, first, {}, second, {}])
