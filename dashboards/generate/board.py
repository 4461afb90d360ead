# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The dashboard: its rows, one below the other."""

from __future__ import annotations

from .grafana import (
    Json,
    laid_out,
)
from .rows.dcgm import joined_with_dcgm
from .rows.exporter import exporter
from .rows.memory import where_the_memory_went
from .rows.ranks import ranks
from .rows.reloads import reloads
from .rows.sglang import joined_with_sglang
from .variables import annotation, variables


def dashboard() -> Json:
    return {
        "uid": "sglang-weights",
        "title": "SGLang weights and KV pool",
        "description": "Where the GPU memory of SGLang engines went, and when their weights "
        "changed. From sglang-weight-exporter.",
        "tags": ["sglang", "gpu", "llm"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "liveNow": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "weekStart": "",
        "links": [],
        "annotations": {"list": [annotation()]},
        "templating": {"list": variables()},
        "panels": laid_out(
            [
                *where_the_memory_went(),
                *reloads(),
                *ranks(),
                *joined_with_sglang(),
                *joined_with_dcgm(),
                *exporter(),
            ]
        ),
    }
