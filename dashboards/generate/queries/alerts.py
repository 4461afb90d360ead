# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the alert rules say, where they are evaluated: Prometheus keeps it as the series ALERTS."""

from __future__ import annotations

from . import Selection, engine_named

OURS = 'alertname=~"SGLang.*", alertstate="firing"'


def number_firing(selection: Selection) -> str:
    """Without information; 0 where there are ranks and no alert."""
    firing = selection.series("ALERTS", f'{OURS}, severity!="info"')
    return f"count({firing}) or 0 * count({selection.series('sglang_weight_info')})"


def firing(selection: Selection) -> str:
    """By alert, severity and where; `short` is the name without what all have in common."""
    alerts = engine_named(selection.series("ALERTS", OURS))
    short = f'label_replace({alerts}, "short", "$1", "alertname", "SGLang(?:Weights?)?(.*)")'
    return f"max by (alertname, short, severity, where) ({short})"
