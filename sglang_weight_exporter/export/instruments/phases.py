# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of updates goes."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import UNUSED, Instrument, Sample
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.records.updates import PHASES, SOURCES


def _phase_seconds(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES:
        seconds = view.role.updates.get(source, UNUSED).phases
        for phase in PHASES:
            if seconds.get(phase):
                yield Sample((source, phase), seconds[phase])


def _phase_in_progress(view: RoleView) -> Iterator[Sample]:
    if view.role.in_progress is not None:
        yield Sample((view.role.in_progress.phase,), 1)


def _phase_started(view: RoleView) -> Iterator[Sample]:
    progress = view.role.in_progress
    if progress is not None and progress.phase_since is not None:
        yield Sample((progress.phase,), progress.phase_since)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_update_phase_seconds",
        "counter",
        "s",
        "Where the time of updates went, which sums to their duration: nothing of the rank's own, "
        "because a call, a peer or a reader is awaited (wait); tensors that arrive (receive); "
        "weights that are read and written (load), unpacked or packed, quantized ones first of all "
        "(post_process); the cache (flush); this exporter's own reading (capture). Of sources that "
        "were used.",
        ("source", "phase"),
        _phase_seconds,
    ),
    Instrument(
        "sglang_weight_update_phase_in_progress",
        "gauge",
        "",
        "What an update is about now; 1, and absent while there is none.",
        ("phase",),
        _phase_in_progress,
    ),
    Instrument(
        "sglang_weight_update_phase_start_timestamp_seconds",
        "gauge",
        "s",
        "Since when an update has been about what it is about now; absent while there is none.",
        ("phase",),
        _phase_started,
        preset="default",
    ),
)
