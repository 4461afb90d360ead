# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights, and what they have shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import UNUSED, Instrument, Sample, one
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.fingerprint import as_number
from sglang_weight_exporter.records.fingerprints import DURINGS, SKIPS
from sglang_weight_exporter.records.updates import SOURCES
from sglang_weight_exporter.records.weights import KINDS


def _fingerprint(view: RoleView) -> Iterator[Sample]:
    if view.role.table is not None and view.role.table.fingerprint:
        yield Sample((), as_number(view.role.table.fingerprint))


def _without_change(view: RoleView) -> Iterator[Sample]:
    for source in SOURCES if view.role.fingerprints is not None else ():
        yield Sample((source,), view.role.updates.get(source, UNUSED).without_change)


def _modified(view: RoleView) -> Iterator[Sample]:
    if view.role.fingerprints is not None:
        for during, kind in itertools.product(DURINGS, KINDS):
            counts = view.role.fingerprints.modified.get(during, {})
            yield Sample((during, kind), counts.get(kind, 0))


def _reference_match(view: RoleView) -> Iterator[Sample]:
    match = view.role.reference_match
    return one(None if match is None else int(match))


def _manifest_match(view: RoleView) -> Iterator[Sample]:
    match = view.role.manifest_match
    return one(None if match is None else int(match))


def _skipped(view: RoleView) -> Iterator[Sample]:
    if view.role.fingerprints is not None:
        for reason in SKIPS:
            yield Sample((reason,), view.role.fingerprints.skipped.get(reason, 0))


def _changed(view: RoleView) -> Iterator[Sample]:
    update = view.role.last_update
    if update is not None and update.contents is not None:
        for layer, nbytes in update.contents.nbytes.items():
            yield Sample((layer,), nbytes)


def _missed(view: RoleView) -> Iterator[Sample]:
    for layer, updates in view.role.layers_missed.items():
        yield Sample((layer,), updates)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_fingerprint",
        "gauge",
        "",
        "53 bits over every byte of the weights and their names, as a number: equal where the "
        "weights are. Absent where it is not taken or was skipped, and while released.",
        read_role=_fingerprint,
    ),
    Instrument(
        "sglang_weight_fingerprint_seconds",
        "gauge",
        "s",
        "How long the last fingerprint took.",
        read_role=lambda view: one(
            None if view.role.table is None else view.role.table.fingerprint_seconds
        ),
    ),
    Instrument(
        "sglang_weight_reference_match",
        "gauge",
        "",
        "Whether the last load left what another load of the same checkpoint and configuration had "
        "left: 1 or 0. Absent where this is the first, after an update, and without "
        "SGLANG_WEIGHT_EXPORTER_REFERENCE_DIR.",
        read_role=_reference_match,
    ),
    Instrument(
        "sglang_weight_manifest_match",
        "gauge",
        "",
        "Whether the last update left what the trainer's manifest of its version says: 1 or 0. "
        "Absent where there is none, where too little could be compared, after a load, and without "
        "SGLANG_WEIGHT_EXPORTER_MANIFEST_DIR.",
        read_role=_manifest_match,
    ),
    Instrument(
        "sglang_weight_fingerprint_skipped",
        "counter",
        "{fingerprint}",
        "Fingerprints that were not taken: memory is released (released), it would have taken too "
        "long (time_limit), a CUDA graph was being captured or a tensor cannot be read "
        "(unsupported), or it failed (error).",
        ("reason",),
        _skipped,
    ),
    Instrument(
        "sglang_weight_updates_without_change",
        "counter",
        "{update}",
        "Logical updates that succeeded and left every byte of the weights as it was.",
        ("source",),
        _without_change,
    ),
    Instrument(
        "sglang_weight_update_changed_bytes",
        "gauge",
        "By",
        "Bytes of tensors that the last update changed, by class of layer: attention, mlp, "
        "experts, embedding, norm, other. Absent where its fingerprints are missing.",
        ("layer",),
        _changed,
        preset="full",
    ),
    Instrument(
        "sglang_weight_updates_missed",
        "gauge",
        "{update}",
        "Updates in a row that changed other layers and not these, which three or more before had "
        "changed; 0 where that is usual: no more than three times what it had been before.",
        ("layer",),
        _missed,
    ),
    Instrument(
        "sglang_weight_tensors_altered",
        "counter",
        "{tensor}",
        "Tensors found, at each capture, with other bytes than the last load or update left: "
        "changed while serving, or not brought back after a release.",
        ("during", "kind"),
        _modified,
    ),
)
