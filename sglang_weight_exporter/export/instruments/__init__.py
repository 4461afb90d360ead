# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one definition of every metric: a module a subject, and the groups that users switch."""

from __future__ import annotations

from collections.abc import Collection

from sglang_weight_exporter.export.instruments import (
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

GROUPS: dict[str, tuple[Instrument, ...]] = {
    "core": (*weights.INSTRUMENTS, *updates.INSTRUMENTS, *pools.INSTRUMENTS),
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
    """The instruments of a setting: ``default``, ``full``, names of groups."""
    found: list[Instrument] = []
    for group, instruments in GROUPS.items():
        if group in metrics or "full" in metrics:
            found += instruments
        elif "default" in metrics:
            found += [each.lean() for each in instruments if not each.detail]
    return tuple(found)
