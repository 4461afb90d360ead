# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one definition of every metric: a module a subject, and the groups that users switch."""

from __future__ import annotations

from collections.abc import Collection

from sglang_weight_exporter.export.instruments import (
    costs,
    exporter,
    fingerprints,
    gpus,
    hooks,
    lora,
    operations,
    phases,
    pools,
    rank_memory,
    updates,
    weights,
)
from sglang_weight_exporter.export.instruments.base import Instrument
from sglang_weight_exporter.settings import METRIC_PRESETS

GROUPS: dict[str, tuple[Instrument, ...]] = {
    "core": (*weights.INSTRUMENTS, *updates.INSTRUMENTS, *costs.INSTRUMENTS, *pools.INSTRUMENTS),
    "memory": (*gpus.INSTRUMENTS, *rank_memory.INSTRUMENTS),
    "phases": phases.INSTRUMENTS,
    "operations": operations.INSTRUMENTS,
    "fingerprints": fingerprints.INSTRUMENTS,
    "lora": lora.INSTRUMENTS,
    "hooks": hooks.INSTRUMENTS,
    "process": exporter.INSTRUMENTS,
}

INSTRUMENTS = tuple(instrument for group in GROUPS.values() for instrument in group)


def chosen(metrics: Collection[str]) -> tuple[Instrument, ...]:
    """The instruments of a setting: names of presets and of groups."""
    found: list[Instrument] = []
    most = max(
        (number for number, preset in enumerate(METRIC_PRESETS, 1) if preset in metrics), default=0
    )
    presets = METRIC_PRESETS[:most]
    for group, instruments in GROUPS.items():
        if group in metrics or "full" in presets:
            found += instruments
        else:
            found += [each.lean() for each in instruments if each.preset in presets]
    return tuple(found)
