# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a reader selects by, and the lines that mark reloads."""

from __future__ import annotations

from .grafana import (
    DATASOURCE,
    Json,
)
from .promql import (
    RELOADED_AT,
)


def annotation() -> Json:
    """One line a reload of an engine, at the exact time and not at the next scrape.

    `useValueForTime` reads the series' value as milliseconds. Grafana 10 reads `expr` and `step`,
    later releases `target`.
    """
    expression = f"{RELOADED_AT} * 1000"
    return {
        "name": "Reloads",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "yellow",
        "expr": expression,
        "step": "5s",
        "target": {"refId": "Anno", "expr": expression, "interval": "5s"},
        "useValueForTime": "on",
        "titleFormat": "Weights reloaded",
        "textFormat": "{{model_name}} {{engine}} on {{instance}}",
        "tagKeys": "engine",
    }


def variable(name: str, label: str, label_name: str, narrowed_by: str, description: str) -> Json:
    definition = f"label_values(sglang_weight_info{narrowed_by}, {label_name})"
    return {
        "name": name,
        "label": label,
        "description": description,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": definition, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
        "regex": "",
        "skipUrlSync": False,
    }


def variables() -> list[Json]:
    model = 'model_name=~"$model"'
    target = f'{model}, instance=~"$instance"'
    engine = f'{target}, engine=~"$engine"'
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "multi": False,
            "includeAll": False,
            "current": {},
            "hide": 0,
            "options": [],
            "regex": "",
            "skipUrlSync": False,
        },
        variable("model", "Model", "model_name", "", "SGLang's served model name"),
        variable("instance", "Target", "instance", f"{{{model}}}", "Scraped host or pod"),
        variable("engine", "Engine", "engine", f"{{{target}}}", "One engine on its host"),
        variable("role", "Role", "role", f"{{{engine}}}", "Target or draft model"),
        variable("gpu", "GPU", "gpu_uuid", f"{{{engine}}}", "UUID as dcgm-exporter has it"),
    ]
