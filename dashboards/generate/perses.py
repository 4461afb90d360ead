# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The boards in Perses' format, made of the same panels.

Perses has no bars that are stacked by name, no heatmap of buckets and no columns that lead to
another board: parts of a GPU are rows of a table here, and updates are counted below each bound.
"""

from __future__ import annotations

from typing import Any

from .grafana import Json

UNITS: dict[str, Json] = {
    "bytes": {"unit": "bytes"},
    "Bps": {"unit": "bytes/sec"},
    "s": {"unit": "seconds"},
    "percentunit": {"unit": "percent-decimal"},
    "short": {"unit": "decimal", "shortValues": True},
    "none": {"unit": "decimal"},
}
CALCULATIONS = {"lastNotNull": "last-number", "max": "max", "sum": "sum"}


def dashboard(board: Json) -> Json:
    """A resource for `percli apply`; the project is whichever it is applied to."""
    panels: dict[str, Json] = {}
    first = [one for one in board["panels"] if one["type"] != "row"]
    layouts = [grid(first, panels)]
    for row in board["panels"]:
        if row["type"] == "row":
            title = {"title": row["title"], "collapse": {"open": False}}
            layouts.append(grid(row["panels"], panels, display=title))
    return {
        "kind": "Dashboard",
        "metadata": {"name": board["uid"], "project": "sglang"},
        "spec": {
            "display": {"name": board["title"], "description": board["description"]},
            "duration": "1h",
            "refreshInterval": board["refresh"],
            "variables": [
                variable(one) for one in board["templating"]["list"] if one["type"] == "query"
            ],
            "panels": panels,
            "layouts": layouts,
        },
    }


def grid(inside: list[Json], panels: dict[str, Json], **more: Any) -> Json:
    """A row of panels, each of which is added to `panels`."""
    items = []
    top = min(one["gridPos"]["y"] for one in inside)
    for one in inside:
        key = str(one["id"])
        panels[key] = panel(one)
        place = one["gridPos"]
        items.append(
            {
                "x": place["x"],
                "y": place["y"] - top,
                "width": place["w"],
                "height": place["h"],
                "content": {"$ref": f"#/spec/panels/{key}"},
            }
        )
    return {"kind": "Grid", "spec": {**more, "items": items}}


def variable(one: Json) -> Json:
    asked = one["query"]["query"]
    if asked.startswith("query_result("):
        kind, spec = (
            "PrometheusPromQLVariable",
            {
                "expr": asked.removeprefix("query_result(").removesuffix(")"),
                "labelName": "gpu_uuid",
            },
        )
    else:
        series, label = asked.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        kind, spec = "PrometheusLabelValuesVariable", {"labelName": label, "matchers": [series]}
    return {
        "kind": "ListVariable",
        "spec": {
            "name": one["name"],
            "display": {
                "name": one["label"],
                "description": one["description"],
                **({"hidden": True} if one["hide"] else {}),
            },
            "allowMultiple": True,
            "allowAllValue": True,
            **({"customAllValue": one["allValue"]} if "allValue" in one else {}),
            "defaultValue": "$__all",
            "sort": "alphabetical-asc",
            "plugin": {"kind": kind, "spec": spec},
        },
    }


def panel(one: Json) -> Json:
    kind, spec = PLUGINS[one["type"]](one)
    return {
        "kind": "Panel",
        "spec": {
            "display": {"name": one["title"], "description": one["description"]},
            "plugin": {"kind": kind, "spec": spec},
            **(
                {"queries": queries}
                if (queries := list(map(query, one.get("targets", []))))
                else {}
            ),
        },
    }


def query(target: Json) -> Json:
    name = target["legendFormat"]
    spec = {"query": target["expr"], **({} if name == "__auto" else {"seriesNameFormat": name})}
    plugin = {"kind": "PrometheusTimeSeriesQuery", "spec": spec}
    return {"kind": "TimeSeriesQuery", "spec": {"plugin": plugin}}


def shown_as(unit: str | None, decimals: int | None = None) -> Json:
    """A format; of what has no unit here, plain numbers."""
    found: Json = {**UNITS.get(unit or "none", UNITS["none"])}
    return found if decimals is None else {**found, "decimalPlaces": decimals}


def overridden(one: Json) -> dict[str, Json]:
    """Properties of fields by their name."""
    return {
        each["matcher"]["options"]: {p["id"]: p["value"] for p in each["properties"]}
        for each in one["fieldConfig"]["overrides"]
        if each["matcher"]["id"] == "byName"
    }


def mappings(defaults: Json) -> list[Json]:
    """Words for numbers."""
    return [
        {
            "kind": "Value",
            "spec": {
                "value": number,
                "result": {
                    "value": shown["text"],
                    **({"color": shown["color"]} if "color" in shown else {}),
                },
            },
        }
        for mapping in defaults.get("mappings", [])
        for number, shown in mapping["options"].items()
    ]


def time_series(one: Json) -> tuple[str, Json]:
    defaults = one["fieldConfig"]["defaults"]
    look, legend = defaults["custom"], one["options"]["legend"]
    bars = look["drawStyle"] == "bars"
    named = overridden(one)
    colours = [
        {"queryIndex": index, "colorMode": "fixed", "colorValue": of["color"]["fixedColor"]}
        for index, target in enumerate(one["targets"])
        if "color" in (of := named.get(target["legendFormat"], {}))
    ]
    return "TimeSeriesChart", {
        "legend": {
            "position": legend["placement"],
            "mode": legend["displayMode"],
            "values": [CALCULATIONS[each] for each in legend["calcs"]],
        },
        "yAxis": {
            "format": shown_as(defaults["unit"], defaults.get("decimals")),
            **({"min": defaults["min"]} if "min" in defaults else {}),
            **({"max": defaults["max"]} if "max" in defaults else {}),
        },
        "visual": {
            "display": "bar" if bars else "line",
            "lineWidth": look["lineWidth"],
            "areaOpacity": look["fillOpacity"] / 100,
            "connectNulls": look["spanNulls"],
            **({"stack": "all"} if look["stacking"]["mode"] == "normal" else {}),
        },
        **({"querySettings": colours} if colours else {}),
    }


def stat(one: Json) -> tuple[str, Json]:
    defaults = one["fieldConfig"]["defaults"]
    first, *steps = defaults["thresholds"]["steps"]
    words = mappings(defaults)
    return "StatChart", {
        "calculation": "last-number",
        "format": shown_as(defaults["unit"], defaults.get("decimals")),
        "thresholds": {
            **({} if first["color"] == "text" else {"defaultColor": first["color"]}),
            "steps": [{"value": each["value"], "color": each["color"]} for each in steps],
        },
        **({"mappings": words} if words else {}),
    }


def table(one: Json) -> tuple[str, Json]:
    """A column's name there is a label's, or `value #1` for the first of several queries."""
    done = {each["id"]: each["options"] for each in one.get("transformations", [])}
    organized, named = done.get("organize", {}), overridden(one)
    (by,) = done.get("sortBy", {}).get("sort", [{}])
    columns = []
    renamed = organized.get("renameByName", {})
    order = organized.get("indexByName", {})
    kept = sorted({*renamed, *order}, key=lambda name: order.get(name, len(order)))
    for name in kept:
        title = renamed.get(name, name)
        look = {**named.get(name, {}), **named.get(title, {})}
        format_ = {"format": shown_as(look["unit"], look.get("decimals"))} if "unit" in look else {}
        sort = {"sort": "desc" if by["desc"] else "asc"} if by.get("field") == title else {}
        width = {"width": look["custom.width"]} if "custom.width" in look else {}
        columns.append(
            {"name": column(name, one), "header": title, "enableSorting": True}
            | {**sort, **width, **format_}
        )
    known = {each["name"] for each in columns}
    hidden = [column(name, one) for name in organized.get("excludeByName", {})]
    columns += [{"name": name, "hide": True} for name in hidden if name not in known]
    merged = {"transforms": [{"kind": "MergeSeries", "spec": {}}]} if "merge" in done else {}
    return "Table", {"density": "compact", "columnSettings": columns, **merged}


def column(name: str, one: Json) -> str:
    if name == "Time":
        return "timestamp"
    value, _, of = name.partition(" #")
    if value != "Value":
        return name
    refs = [target["refId"] for target in one["targets"]]
    return f"value #{refs.index(of) + 1}" if of else "value"


def bars(one: Json) -> tuple[str, Json]:
    """A part of each name is a row of a table."""
    unit = shown_as(one["fieldConfig"]["defaults"].get("unit"))
    columns = [
        {"name": "where", "header": "GPU"},
        {"name": "is", "header": "Part"},
        {"name": "value", "header": one["title"], "format": unit, "enableSorting": True},
        *({"name": name, "hide": True} for name in ("timestamp", "gpu_uuid")),
    ]
    return "Table", {"density": "compact", "pagination": True, "columnSettings": columns}


def below_each_bound(one: Json) -> tuple[str, Json]:
    return "TimeSeriesChart", {
        "legend": {"position": "right", "mode": "list"},
        "yAxis": {"format": {"unit": "decimal"}, "min": 0},
    }


def states(one: Json) -> tuple[str, Json]:
    words = mappings(one["fieldConfig"]["defaults"])
    return "StatusHistoryChart", {"legend": {"position": "bottom"}, "mappings": words}


def text(one: Json) -> tuple[str, Json]:
    return "Markdown", {"text": one["options"]["content"]}


PLUGINS = {
    "timeseries": time_series,
    "stat": stat,
    "table": table,
    "barchart": bars,
    "heatmap": below_each_bound,
    "state-timeline": states,
    "text": text,
}
