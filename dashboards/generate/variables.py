# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a reader selects by, the lines that mark updates, and the ways between the boards."""

from __future__ import annotations

from . import DOCUMENTS
from .colours import LINES
from .grafana import DATASOURCE, Json, link
from .queries import Selection, memory
from .queries.updates import lines

ABOUT = {
    "cluster": ("Cluster", "Where your scrape adds a label of this name"),
    "namespace": ("Namespace", "Where your scrape adds a label of this name"),
    "job": ("Job", "Scrape job"),
    "model": ("Model", "SGLang's served model name"),
    "instance": ("Target", "Scraped host or pod"),
    "engine": ("Engine", "One engine on its host: SGLang's port"),
    "role": ("Role", "Target or draft model"),
    "gpu": ("GPU", "UUID as dcgm-exporter has it"),
    "fullest": ("Fullest GPUs", "Those that the bars show"),
}


def variables(selection: Selection) -> list[Json]:
    """Each is narrowed by those before it."""
    source: Json = {
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
    }
    found, narrowed_by = [source], ""
    for label, name in selection.variables.items():
        found.append(variable(name, label, f"{{{narrowed_by}}}"))
        narrowed_by += f'{", " if narrowed_by else ""}{label}=~"${name}"'
    return found


def variable(name: str, label_name: str, narrowed_by: str) -> Json:
    label, description = ABOUT[name]
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


def fullest(selection: Selection) -> Json:
    """The GPUs that the bars are of, which a reader does not see. It costs a store less to be asked
    for a few GPUs by name than for all that it has of thousands to keep a few."""
    found = variable("fullest", "gpu_uuid", "")
    del found["allValue"]  # Which would be every GPU; without it, it is all that were found.
    return {
        **found,
        "query": {"query": f"query_result({memory.chosen(selection)})", "refId": "fullest"},
        # The beginning tells them apart, and fits into the address of a query.
        "regex": '/gpu_uuid="([^"]{12})/',
        "sort": 0,
        "hide": 2,
        "skipUrlSync": True,
    }


def updates(selection: Selection, panels: list[int]) -> Json:
    """A line where an update has reached the last engine of a model, at the exact time and not at
    the next scrape, on panels where it explains something; the newest of each minute. Grafana has a
    switch for it above the panels, which is off: whoever trains would see nothing but lines.

    `useValueForTime` reads the series' value as milliseconds. Grafana 10 reads `expr` and `step`,
    later releases `target`.
    """
    expression = lines(selection)
    return {
        "name": "Updates",
        "datasource": DATASOURCE,
        "enable": False,
        "hide": False,
        "iconColor": LINES,
        "filter": {"exclude": False, "ids": panels},
        "expr": expression,
        "step": "1m",
        "target": {"refId": "Anno", "expr": expression, "interval": "1m"},
        "useValueForTime": "on",
        "titleFormat": "Weights updated",
        "textFormat": "{{model_name}}",
        "tagKeys": "model_name",
    }


def to_board(title: str, uid: str) -> Json:
    """The other board with the same time range and the same selection."""
    return link(title, f"/d/{uid}", "dashboard", here=True)


def to_runbooks() -> Json:
    return link("Runbooks", f"{DOCUMENTS}/alerts.md", "doc", here=False)
