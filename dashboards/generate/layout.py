# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A dashboard of panels: where each stands, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable

from .grafana import Json, panel


def laid_out(panels: list[Json], top: int = 0) -> int:
    """Gives each panel its place: left to right, a new line when 24 columns are full.

    Returns where the next one below would begin.
    """
    x, y, tallest = 0, top, 0
    for one in panels:
        place = one["gridPos"]
        if x + place["w"] > 24:
            x, y, tallest = 0, y + tallest, 0
        place["x"], place["y"] = x, y
        x, tallest = x + place["w"], max(tallest, place["h"])
    return y + tallest


def board(
    uid: str,
    title: str,
    description: str,
    *,
    variables: list[Json],
    links: list[Json],
    first: list[Json],
    rows: dict[str, list[Json]],
    annotation: Callable[[list[int]], Json],
) -> Json:
    """A dashboard: `first` is open, each of `rows` is closed until somebody opens it.

    Grafana asks nothing for a closed row. `annotation` gets the numbers of the panels that show
    memory over time, where a line explains something.
    """
    panels = [*first]
    below = laid_out(first)
    for name, inside in rows.items():
        laid_out(inside, below + 1)
        heading = panel("row", name, "", 24, 1, collapsed=True, panels=inside)
        heading["gridPos"]["y"] = below
        panels.append(heading)
        below += 1
    every = [one for each in panels for one in (each, *each.get("panels", []))]
    for number, one in enumerate(every, start=1):
        one["id"] = number
    explained = [one["id"] for one in every if one.pop("explained_by_updates", False)]
    return {
        "uid": uid,
        "title": title,
        "description": description,
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
        "links": links,
        "annotations": {"list": [annotation(explained)]},
        "templating": {"list": variables},
        "panels": panels,
    }
