# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one definition of every metric: a module a subject, and the groups that users switch."""

from __future__ import annotations

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
