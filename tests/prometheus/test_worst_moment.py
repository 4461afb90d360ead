# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What `advise --prometheus` asks, answered by Prometheus's own engine."""

from __future__ import annotations

from pathlib import Path

import yaml
from monitoring import run

from sglang_weight_exporter.cli.worst_moment import most_used_query


def test_the_worst_moment_of_the_engine_alone(tmp_path: Path) -> None:
    """79 were in use under an earlier configuration, 20 to 30 since, and 78 while a trainer had the
    memory that the engine had released, of which only the exporter's default says so; another GPU
    is none of its business. On a third another engine was there for 40 minutes."""
    used = {
        'gpu_uuid="GPU-1", instance="a"': "79x60 20x60 25x60 78x60 30x60",
        'gpu_uuid="GPU-1", instance="b"': "79x60 20x60 25x60 78x60 30x60",
        'gpu_uuid="GPU-2"': "80x300",
        'gpu_uuid="GPU-3"': "79x164 40x136",
        'gpu_uuid="GPU-4"': "78x240 60x60",
    }
    loaded = {
        'gpu_uuid="GPU-3", engine="30000", role="target"': "1x300",
        'gpu_uuid="GPU-3", engine="30001", role="target"': "1x160 stale",
    }
    resume = {'gpu_uuid="GPU-4", gpu="0"': "30x237 stale"}
    released = {
        'gpu_uuid="GPU-1", tp_rank="0"': "0x177 18x66 0x57",
        'gpu_uuid="GPU-1", tp_rank="1"': "0x300",
    }
    series = [
        {"series": f"{name}{{{labels}}}", "values": " ".join(map(repeated, values.split()))}
        for name, each in (
            ("sglang_gpu_memory_used_max_bytes", used),
            ("sglang_rank_memory_released_bytes", released),
            ("sglang_weight_loaded_timestamp_seconds", loaded),
            ("sglang_gpu_memory_resume_bytes", resume),
        )
        for labels, values in each.items()
    ]
    questions = [
        # At the end, of all that time; of that since the restart; of the last half hour.
        (most_used_query("GPU-1", 75 * 60), 79),
        (most_used_query("GPU-1", 59 * 60), 30),
        (most_used_query("GPU-1", 30 * 60), 30),
        (most_used_query("GPU-2", 30 * 60), 80),
        (most_used_query("GPU-3", 74 * 60), 40),
        (most_used_query("GPU-4", 74 * 60), 60),
    ]
    tests = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "74m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for query, value in questions
                ],
            }
        ],
    }
    (tmp_path / "worst.test.yml").write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in run("promtool", "test", "rules", tmp_path / "worst.test.yml")


def repeated(piece: str) -> str:
    value, _, times = piece.partition("x")
    if not times:
        return value
    return f"{value}x{int(times) - 1}"
