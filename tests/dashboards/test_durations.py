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
    "loaded": "100 100 100 100 100 900",
    "last_update": "100 100 330 500 712 900",
    "last_update_start": "40 40 300 300 700 840",
}


def check(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    """Asked of promtool, minute by minute."""
    series = [
        {"series": f"sglang_weight_{name}_timestamp_seconds{RANK}", "values": values}
        for name, values in SERIES.items()
    ]
    failures = f'sglang_weight_update_failures_total{RANK[:-1]}, source="disk"}}'
    series.append({"series": failures, "values": "0 0 0 1 1 0"})
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump(
            {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}
        )
    )
    run("promtool", "test", "rules", file)


def test_the_table_has_none_of_a_load_nor_where_an_update_failed_meanwhile(
    boards: dict[str, Any], tmp_path: Path
) -> None:
    """A range of a minute: the failure is in that which ends with the third."""
    (expression,) = (
        each
        for title, each, _ in expressions(boards["sglang-fleet"])
        if title.startswith("What each engine serves") and "last_update_start" in each
    )
    asked = filled_in(expression, {**ALL, "$__range": "1m"})
    took = {2: 30, 4: 12}
    labels = '{instance="a:9400", engine="30000"}'
    tests = [
        {
            "expr": asked,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": labels, "value": took[minute]}] if minute in took else [],
        }
        for minute in range(6)
    ]
    check(tmp_path, tests)


def test_a_load_and_an_update_that_failed_have_no_duration(
    boards: dict[str, Any], tmp_path: Path
) -> None:
    (expression,) = (
        each for title, each, _ in expressions(boards["sglang-fleet"]) if title == "Update duration"
    )
    asked = filled_in(expression, {**ALL, "$__interval": "1m"})
    took = {2: 30, 4: 12}
    tests = [
        {
            "expr": asked,
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": f'{{part="{part}"}}', "value": took[minute]}
                for part in ("median", "slowest")
                if minute in took
            ],
        }
        for minute in range(6)
    ]
    check(tmp_path, tests)
