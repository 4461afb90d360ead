# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks in the engine: their state, their errors, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import Instrument, Sample, once_a_rank
from sglang_weight_exporter.export.views import HostView


def _hooks(view: HostView) -> Iterator[Sample]:
    counts = Counter((hook.target, hook.status) for each in view.snapshots for hook in each.hooks)
    for (target, status), count in counts.items():
        yield Sample((target, status), count)


def _hooks_by_state(view: HostView) -> Iterator[Sample]:
    """Those that failed by their names, and how many of the others."""
    counts = Counter(
        (hook.target if hook.status == "failed" else "", hook.status)
        for each in view.snapshots
        for hook in each.hooks
    )
    for (target, status), count in counts.items():
        yield Sample((target, status), count)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_exporter_hooks",
        "gauge",
        "{rank}",
        "Ranks by state of each hook: installed, pending, absent (this SGLang has no such "
        "function) or failed (it should have it). By default only those that failed have a target; "
        "the others are one number a state.",
        ("target", "state"),
        read_host=_hooks,
        lean_host=_hooks_by_state,
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
