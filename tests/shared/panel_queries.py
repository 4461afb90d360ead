# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the panels of a dashboard ask."""

from __future__ import annotations

import re
from typing import Any

#: What a variable is replaced by, as Grafana does for "All".
NAMES = ("cluster", "namespace", "job", "instance", "model", "engine", "role", "gpu", "fullest")
ALL = {f"${name}": ".*" for name in NAMES}


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels but headings, those in closed rows too."""
    both = [one for each in dashboard["panels"] for one in (each, *each.get("panels", []))]
    return [panel for panel in both if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Title, expression and whether it is asked at one point of time."""
    found = [
        (panel["title"], target["expr"], bool(target.get("instant")))
        for panel in panels_of(dashboard)
        for target in panel.get("targets", [])
    ]
    return found + [
        ("annotation", each["expr"], False) for each in dashboard["annotations"]["list"]
    ]


BUILT_IN = {
    "$__interval": "5s",
    "$__rate_interval": "20s",
    "$__range": "300s",
}


def filled_in(expression: str, values: dict[str, str]) -> str:
    for variable, value in {**BUILT_IN, **values}.items():
        expression = expression.replace(variable, value)
    assert "$" not in re.sub(r'"(GPU |tp|pp|dp|#)?\$1"', "", expression), expression
    return expression
