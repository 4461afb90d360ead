# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The board of engines: the detail, one row a question, closed but the first."""

from __future__ import annotations

from functools import partial

from . import variables
from .grafana import Json
from .layout import board as made
from .queries import ENGINES
from .rows import costs, dcgm, exporter, fingerprints, memory, ranks, sglang, updates


def board() -> Json:
    return made(
        "sglang-engine",
        "SGLang weights: engine",
        "Where the GPU memory of SGLang engines went, and when their weights changed. From "
        "sglang-weight-exporter.",
        variables=[*variables.variables(ENGINES), variables.fullest(ENGINES)],
        links=[variables.to_board("Fleet", "sglang-fleet"), variables.to_runbooks()],
        first=memory.first_screen(),
        rows={
            "Memory over time": memory.over_time(),
            "Updates": updates.panels(),
            "What updates cost": costs.panels(),
            "Fingerprints": fingerprints.panels(),
            "Ranks": ranks.panels(),
            "With SGLang's own metrics": sglang.panels(),
            "With dcgm-exporter": dcgm.panels(),
            "This exporter": exporter.panels(),
        },
        annotation=partial(variables.updates, ENGINES),
    )
