# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes of panels in Grafana's JSON model, each with the look that this project gives it."""

from __future__ import annotations

from typing import Any

from . import DOCUMENTS
from .colours import BLUE, COLOURS, GREY

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}

NOT_LOADED = "No rank is scraped: is SGLang running, and is :9400 a target?"
NO_NVML = "No NVML: CPU engine, or the exporter cannot see the driver"
NO_ACCOUNT = "No account: CPU engine, an older exporter, or nothing has happened yet"
NO_SGLANG = "SGLang's own metrics are not here: start it with --enable-metrics and scrape it"
NO_DCGM = "dcgm-exporter is not here: see the text on the right"


#: Points of a graph. A store works for each of them, on as many series as there are GPUs.
MOST_POINTS = 60
#: Of one that is asked for whenever a board is opened.
FIRST_POINTS = 30


def query(expression: str, legend: str = "", *, ref: str = "A", **more: Any) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": legend or "__auto",
        **({} if more.get("instant") else {"range": True}),
        **more,
    }


def queries(series: dict[str, str], **more: Any) -> list[Json]:
    return [query(e, name, ref=chr(65 + i), **more) for i, (name, e) in enumerate(series.items())]


def override(field: str, **properties: Any) -> Json:
    """Properties of one field, dots in names written as two underscores."""
    return {
        "matcher": {"id": "byName", "options": field},
        "properties": [{"id": k.replace("__", "."), "value": v} for k, v in properties.items()],
    }


def coloured(name: str, **more: Any) -> Json:
    return in_colour(name, COLOURS[name], **more)


def in_colour(name: str, colour: str, **more: Any) -> Json:
    return override(name, color={"mode": "fixed", "fixedColor": colour}, **more)


def hidden(*fields: str) -> list[Json]:
    """Columns that are there for links alone. Grafana has had two words for it."""
    nowhere = {"viz": True, "legend": False, "tooltip": False}
    return [override(each, custom__hidden=True, custom__hideFrom=nowhere) for each in fields]


def dash() -> Json:
    """What an empty cell says: the words for an empty panel are not meant for it."""
    return {
        "matcher": {"id": "byRegexp", "options": "/.*/"},
        "properties": [{"id": "noValue", "value": "-"}],
    }


def panel(kind: str, title: str, description: str, width: int, height: int, **more: Any) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        **more,
    }


def thresholds(*steps: tuple[float | None, str]) -> Json:
    return {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in steps]}


def stat(
    title: str,
    description: str,
    expression: str,
    unit: str,
    no_value: str,
    *steps: tuple[float | None, str],
    width: int = 4,
    words: dict[int, str] | None = None,
) -> Json:
    """`words`: what is shown in place of a number that is none."""
    return panel(
        "stat",
        title,
        description,
        width,
        3,
        targets=[query(expression, title, instant=True)],
        fieldConfig={
            "defaults": {
                "unit": unit,
                "noValue": no_value,
                "color": {"mode": "thresholds"},
                "thresholds": thresholds(*(steps or ((None, "text"),))),
                **({"mappings": [in_words(words)]} if words else {}),
            },
            "overrides": [],
        },
        options={
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "value",
        },
    )


def in_words(words: dict[int, str]) -> Json:
    options = {str(number): {"text": text, "index": number} for number, text in words.items()}
    return {"type": "value", "options": options}


def timeseries(
    title: str,
    description: str,
    targets: list[Json],
    unit: str,
    no_value: str,
    *overrides: Json,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    bars: bool = False,
    minimum: float | None = 0,
    maximum: float | None = None,
    decimals: int | None = None,
    explained_by_updates: bool = False,
    points: bool = False,
    calcs: tuple[str, ...] = ("lastNotNull",),
    colours: dict[str, str] | None = None,
    transformations: list[Json] | None = None,
) -> Json:
    """`colours`: of series by name, where there are several."""
    named = [in_colour(name, colour) for name, colour in (colours or {}).items()]
    return panel(
        "timeseries",
        title,
        description,
        width,
        height,
        explained_by_updates=explained_by_updates,
        maxDataPoints=MOST_POINTS,
        targets=targets,
        **({"transformations": transformations} if transformations else {}),
        fieldConfig={
            "defaults": {
                "unit": unit,
                **({} if minimum is None else {"min": minimum}),
                **({} if maximum is None else {"max": maximum}),
                **({} if decimals is None else {"decimals": decimals}),
                "noValue": no_value,
                "color": {"mode": "fixed", "fixedColor": GREY if colours else BLUE},
                "custom": {
                    "drawStyle": "bars" if bars else "line",
                    "lineInterpolation": "linear" if bars else "stepAfter",
                    "lineWidth": 1 if bars or stacked else 2,
                    "fillOpacity": 80 if bars else 45 if stacked else 0,
                    "showPoints": "always" if points else "never",
                    "spanNulls": points,
                    # An axis of counts that are all 0 would go to 100, and one of a digit leaves no
                    # room for the half of a time that is below its end.
                    **({"axisSoftMax": 1, "axisWidth": 45} if decimals == 0 else {}),
                    "stacking": {"mode": "normal" if stacked or bars else "none", "group": "A"},
                },
            },
            "overrides": [*named, *overrides],
        },
        options={
            "legend": {
                "showLegend": True,
                # Below a graph there is room for two lines, and a table takes one a series.
                "displayMode": "table" if calcs and width >= 12 else "list",
                "placement": "right" if width >= 12 else "bottom",
                "calcs": list(calcs),
            },
            "tooltip": {"mode": "multi", "sort": "none" if stacked else "desc"},
        },
    )


def stacked_bars(
    title: str,
    description: str,
    targets: list[Json],
    transformations: list[Json],
    x_field: str,
    no_value: str,
    *overrides: Json,
    width: int,
    height: int,
    unit: str = "bytes",
    legend: str = "right",
) -> Json:
    """`legend`: where it is. Names of bars have two fifths of what it leaves of the width."""
    return panel(
        "barchart",
        title,
        description,
        width,
        height,
        targets=targets,
        transformations=transformations,
        fieldConfig={
            "defaults": {
                "unit": unit,
                "noValue": no_value,
                "color": {"mode": "fixed", "fixedColor": BLUE},
                "custom": {"fillOpacity": 90, "lineWidth": 0, "axisPlacement": "auto"},
            },
            "overrides": list(overrides),
        },
        options={
            "xField": x_field,
            "orientation": "horizontal",
            "stacking": "normal",
            "showValue": "never",
            "groupWidth": 0.7,
            "barWidth": 0.85,
            "barRadius": 0,
            "fullHighlight": False,
            "xTickLabelRotation": 0,
            "xTickLabelSpacing": 0,
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": legend,
                "calcs": [],
            },
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    )


def table(
    title: str,
    description: str,
    targets: list[Json],
    transformations: list[Json],
    no_value: str,
    *overrides: Json,
    width: int = 24,
    height: int = 9,
    filterable: bool = True,
) -> Json:
    return panel(
        "table",
        title,
        description,
        width,
        height,
        targets=targets,
        transformations=transformations,
        fieldConfig={
            "defaults": {
                "noValue": no_value,
                "custom": {
                    "align": "auto",
                    "cellOptions": {"type": "auto"},
                    "filterable": filterable,
                },
            },
            "overrides": list(overrides),
        },
        options={"showHeader": True, "cellHeight": "sm"},
    )


def by_name(
    title: str,
    description: str,
    expression: str,
    number: str,
    unit: str,
    no_value: str,
    *,
    width: int,
    height: int = 8,
    least_first: bool = False,
) -> Json:
    """A line each, of what the expression calls `where`. Not bars: names of pods and ranks are too
    long to stand beside one."""
    return table(
        title,
        description,
        [query(f"max by (where) ({expression})", instant=True, format="table")],
        [
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "indexByName": {"where": 0, "Value": 1},
                    "renameByName": {"where": "Where", "Value": number},
                },
            },
            {"id": "sortBy", "options": {"sort": [{"field": number, "desc": not least_first}]}},
        ],
        no_value,
        override(number, unit=unit, custom__width=90),
        width=width,
        height=height,
        filterable=False,
    )


def text(title: str, content: str, width: int, height: int) -> Json:
    return panel("text", title, "", width, height, options={"mode": "markdown", "content": content})


def heatmap(
    title: str, description: str, target: Json, unit: str, no_value: str, *, width: int
) -> Json:
    return panel(
        "heatmap",
        title,
        description,
        width,
        8,
        maxDataPoints=MOST_POINTS,
        targets=[target],
        fieldConfig={"defaults": {"noValue": no_value, "custom": {}}, "overrides": []},
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme",
                "scheme": "Oranges",
                "fill": "orange",
                "exponent": 0.5,
                "steps": 64,
                "reverse": False,
            },
            "filterValues": {"le": 1e-9},
            "rowsFrame": {"layout": "auto"},
            "yAxis": {"unit": unit, "axisPlacement": "left", "reverse": False},
            "legend": {"show": True},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "tooltip": {"mode": "single", "yHistogram": False},
            "showValue": "never",
        },
    )


def state_timeline(
    title: str,
    description: str,
    targets: list[Json],
    states: dict[int, tuple[str, str]],
    no_value: str,
    *,
    width: int,
    height: int,
) -> Json:
    """`states`: number to its word and colour."""
    options = {
        str(number): {"text": word, "color": colour, "index": number}
        for number, (word, colour) in states.items()
    }
    return panel(
        "state-timeline",
        title,
        description,
        width,
        height,
        maxDataPoints=MOST_POINTS,
        targets=targets,
        fieldConfig={
            "defaults": {
                "noValue": no_value,
                "unit": "none",
                "color": {"mode": "thresholds"},
                "thresholds": thresholds((None, "text")),
                "mappings": [{"type": "value", "options": options}],
                "custom": {"fillOpacity": 75, "lineWidth": 0},
            },
            "overrides": [],
        },
        options={
            "mergeValues": True,
            "showValue": "never",
            "alignValue": "left",
            "rowHeight": 0.8,
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": "bottom",
                "calcs": [],
            },
            "tooltip": {"mode": "single", "sort": "none"},
        },
    )


def link(title: str, url: str, icon: str, *, here: bool) -> Json:
    return {
        "type": "link",
        "title": title,
        "url": url,
        "icon": icon,
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "targetBlank": not here,
        "keepTime": here,
        "includeVars": here,
    }


def runbook(alert: str) -> Json:
    """A panel's link to what to do about what it shows."""
    url = f"{DOCUMENTS}/alerts.md#{alert.lower()}"
    return link(f"Runbook: {alert}", url, "doc", here=False)


def coarse(panel: Json) -> Json:
    """A graph of a first screen."""
    return {**panel, "maxDataPoints": FIRST_POINTS}


def linked(panel: Json, *links: Json) -> Json:
    return {**panel, "links": list(links)}
