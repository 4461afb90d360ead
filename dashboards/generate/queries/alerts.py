# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the alert rules say, where they are evaluated: Prometheus keeps it as the series ALERTS."""

from __future__ import annotations

from . import PLACE, Selection, named

FIRING = 'alertname=~"SGLang.*", alertstate="firing", severity!="info"'
OF_EXPORTERS = 'alertname=~"SGLangWeightExporter.*|SGLangWeightLabelsRenamed"'

#: In place of a number of alerts.
NO_RULES = -1


def ours(selection: Selection) -> str:
    """Alerts that are more than information. What is about no single model or target, and what is
    about an exporter, is there whichever model and target are chosen."""
    labels = [label for label in selection.variables if label not in PLACE.split(", ")[:3]]
    place = selection.matchers(*labels)
    chosen = ", ".join(
        f'{label}=~"${selection.variables[label]}|"'
        for label in labels
        if label in ("model_name", "instance")
    )
    return f"(ALERTS{{{place}, {chosen}, {FIRING}}} or ALERTS{{{place}, {OF_EXPORTERS}, {FIRING}}})"


def evaluated(selection: Selection) -> str:
    """What the recording rules leave where they are loaded."""
    return f"count({selection.series('engine:sglang_weight_ranks:count')})"


def number_firing(selection: Selection) -> str:
    ranks = f"count({selection.series('sglang_weight_info')})"
    return (
        f"count({ours(selection)}) or 0 * {evaluated(selection)} or {NO_RULES} * ({ranks} > bool 0)"
    )


def firing(selection: Selection) -> str:
    """By alert, severity and where; `short` is the name without what all have in common."""
    named_after = f'label_replace({ours(selection)}, "host", "$1", "model_name", "(.+)")'
    for label, of_it in (("instance", "(.+?)(:[0-9]+)?"), ("pod", "(.+)")):
        named_after = f'label_replace({named_after}, "host", "$1", "{label}", "{of_it}")'
    alerts = named(named_after, "cluster", "host", "engine")
    short = f'label_replace({alerts}, "short", "$1", "alertname", "SGLang(?:Weights?)?(.*)")'
    unknown = f"count({selection.series('sglang_weight_info')}) unless {evaluated(selection)}"
    for label, text in (("severity", "unknown"), ("short", "No rules are loaded")):
        unknown = f'label_replace({unknown}, "{label}", "{text}", "", "")'
    return f"max by (alertname, short, severity, where) ({short}) or {unknown}"
