# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of Fleet's tables and graphs, in promtool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from monitoring import run
from panel_queries import ALL, expressions, filled_in

RANK = '{instance="a:9400", engine="30000", role="target", tp_rank="0", pp_rank="0", dp_rank="0"}'
#: By minute: loaded, updated in 30 s, nothing that succeeded, updated in 12 s, and the engine anew.
UPDATES = {
    f"sglang_weight_last_update_{name}_seconds{RANK}": values
    for name, values in {
        "start_timestamp": "40 40 300 300 700 840",
        "duration": "_ _ 30 30 12 stale",
    }.items()
}


def check(
    tmp_path: Path, series: dict[str, str], asked: str, answers: list[dict[str, float]]
) -> None:
    """Asked of promtool, minute by minute: values by labels."""
    tests = [
        {
            "expr": asked,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in one.items()],
        }
        for minute, one in enumerate(answers)
    ]
    values = [{"series": name, "values": values} for name, values in series.items()]
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump(
            {"tests": [{"interval": "1m", "input_series": values, "promql_expr_test": tests}]}
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
    check(tmp_path, UPDATES, filled_in(expression, ALL), [{}, {}, *took, {}])


def test_the_graph_has_each_that_succeeded_once(boards: dict[str, Any], tmp_path: Path) -> None:
    (expression,) = (
        each for title, each, _ in expressions(boards["sglang-fleet"]) if title == "Update duration"
    )
    asked = filled_in(expression, {**ALL, "$__interval": "1m"})
    first, second = (
        {f'{{part="{part}"}}': seconds for part in ("median", "slowest")}
        for seconds in (30.0, 12.0)
    )
    check(tmp_path, UPDATES, asked, [{}, {}, first, {}, second, {}])


def test_room_at_the_pace_of_the_range(boards: dict[str, Any], tmp_path: Path) -> None:
    """Of 80 GiB; one GPU takes half a GiB a minute, the other gives it back."""
    (expression,) = (
        each
        for title, each, _ in expressions(boards["sglang-fleet"])
        if title == "Least room" and "deriv" in each
    )
    asked = filled_in(expression, {**ALL, "$__range": "5m", "$__interval": "1m"})
    mebi = 1 << 20
    of_gpus: dict[str, str] = {}
    for gpu, step in (("0", 512), ("1", -512)):
        labels = f'{{instance="a:9400", gpu="{gpu}", gpu_uuid="GPU-{gpu}"}}'
        of_gpus |= {
            f"sglang_gpu_memory_total_bytes{labels}": f"{80 << 30}x6",
            f"sglang_gpu_memory_used_max_bytes{labels}": f"{60 << 30}{step * mebi:+}x6",
            f"sglang_weight_resident_bytes{labels}": f"{1 << 30}x6",
        }
    after = {
        f'{{where="a GPU {gpu}"}}': pace * 60 * 512.0 * mebi for gpu, pace in (("0", -1), ("1", 1))
    }
    check(tmp_path, of_gpus, asked, [{}, *[after] * 5])
