# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks in the engine: their state, their errors, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import Instrument, Sample, once_a_rank
from sglang_weight_exporter.export.views import HostView


def _hooks(view: HostView) -> Iterator[Sample]:
    counts: dict[tuple[str, str], int] = {}
    for snapshot in view.snapshots:
        for hook in snapshot.hooks:
            key: tuple[str, str] = (hook.target, hook.status)
            counts[key] = counts.get(key, 0) + 1
    for key, count in counts.items():
        yield Sample(key, count)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_exporter_hooks",
        "gauge",
        "{rank}",
        "Ranks by state of each hook: installed, pending, absent (this SGLang has no such "
        "function) or failed (it should have it).",
        ("target", "state"),
        read_host=_hooks,
    ),
    Instrument(
        "sglang_weight_exporter_hook_errors",
        "counter",
        "{error}",
        "Exceptions of ours that were caught inside the engine.",
        read_role=once_a_rank(lambda snapshot: sum(snapshot.hook_errors.values())),
        of_rank=True,
    ),
    Instrument(
        "sglang_weight_exporter_snapshot_seconds",
        "gauge",
        "s",
        "Time that the engine last spent on reading its weights and pools.",
        read_role=once_a_rank(lambda snapshot: snapshot.snapshot_seconds),
        of_rank=True,
    ),
)
