# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates of weights: when, how many, how long, and what they changed."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import (
    UNUSED,
    Instrument,
    Sample,
    by_source,
    one,
    target_only,
)
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.records.updates import SOURCES, Histogram
from sglang_weight_exporter.records.weights import CHANGES


def _histograms(view: RoleView) -> Iterator[Sample]:
    """Of sources that were used: of a rank's series most would be of those that never are."""
    durations = by_source(lambda counts: counts.duration, exemplar=True)
    for sample in durations(view):
        if isinstance(sample.value, Histogram) and any(sample.value.counts):
            yield sample


def _last_duration(view: RoleView) -> Iterator[Sample]:
    """Of the source that came last; a load is of none, and counts have that of no failure."""
    changed = [counts for counts in view.role.updates.values() if counts.updated_at is not None]
    if changed:
        yield from one(max(changed, key=lambda counts: counts.updated_at or 0.0).seconds)


def _update_bytes(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES:
        counts = view.role.updates.get(source, UNUSED)
        if counts.phases and counts.nbytes is not None:
            yield Sample((source,), counts.nbytes)


def _changes(view: RoleView) -> Iterator[Sample]:
    for change in CHANGES:
        if count := view.role.changes.get(change, 0):
            yield Sample((change,), count)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_last_update_timestamp_seconds",
        "gauge",
        "s",
        "When weights last changed, the first load included, in Unix time.",
        read_role=lambda view: one(view.role.updated_at),
    ),
    Instrument(
        "sglang_weight_last_update_start_timestamp_seconds",
        "gauge",
        "s",
        "When the last update that succeeded began, the first load included, in Unix time: the "
        "same moment on every rank that has it, but for their clocks.",
        read_role=lambda view: one(view.role.update_started_at),
    ),
    Instrument(
        "sglang_weight_last_update_duration_seconds",
        "gauge",
        "s",
        "Time of the last update that succeeded, from its first call to its last, with what "
        "follows that. Absent before the first; a load is none.",
        read_role=_last_duration,
    ),
    Instrument(
        "sglang_weight_update_in_progress",
        "gauge",
        "{update}",
        "1 inside an update or update session, else 0.",
        read_role=lambda view: one(float(view.role.in_progress is not None)),
    ),
    Instrument(
        "sglang_weight_updates",
        "counter",
        "{update}",
        "Logical updates that changed weights.",
        ("source",),
        by_source(lambda counts: counts.updates, exemplar=True),
    ),
    Instrument(
        "sglang_weight_update_failures",
        "counter",
        "{update}",
        "Logical updates that failed, whether or not they changed weights.",
        ("source",),
        by_source(lambda counts: counts.failures),
    ),
    Instrument(
        "sglang_weight_update_calls",
        "counter",
        "{call}",
        "Calls that wrote weights, or failed to: one a bucket of an update and one a chunk of a "
        "rebalance. What SGLang refused before it called the model's runner is none.",
        ("source",),
        by_source(lambda counts: counts.calls),
        preset="full",
    ),
    Instrument(
        "sglang_weight_update_duration_seconds",
        "histogram",
        "s",
        "Time of one logical update, from its first call to its last, with what follows that: the "
        "flush of the cache and the capture of what has changed. Of sources that were used.",
        ("source",),
        _histograms,
    ),
    Instrument(
        "sglang_weight_update_bytes",
        "counter",
        "By",
        "Bytes that came to the rank with updates that succeeded: of whole tensors, also where it "
        "keeps a part of them, or of the files of a checkpoint. Of sources that were used and of "
        "whose bytes all are known.",
        ("source",),
        _update_bytes,
    ),
    Instrument(
        "sglang_weight_tensors_moved",
        "counter",
        "{tensor}",
        "Tensors whose address changed in an update; CUDA graphs keep the old one.",
        read_role=lambda view: one(view.role.moved),
    ),
    Instrument(
        "sglang_weight_table_changes",
        "counter",
        "{tensor}",
        "Tensors that an update added, removed, resized or put on another device.",
        ("change",),
        _changes,
    ),
    Instrument(
        "sglang_weight_update_groups",
        "gauge",
        "{group}",
        "Process groups open for distributed updates.",
        read_role=target_only(lambda snapshot: snapshot.update_groups),
        lean_role=target_only(lambda snapshot: snapshot.update_groups or None),
    ),
)
