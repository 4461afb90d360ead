# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Calls that read, save, send or check weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sglang_weight_exporter.export.instruments.base import Instrument, RoleReader, Sample
from sglang_weight_exporter.export.views import RoleView

#: Known before their first call where there are adapters: rules compare them with what they were.
OPERATIONS_OF_ADAPTERS = ("load_lora_adapter", "load_lora_adapter_from_tensors")


def _operations(attribute: Literal["calls", "failures"]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target:
            known = OPERATIONS_OF_ADAPTERS if view.role.lora else ()
            for operation in dict.fromkeys((*known, *view.snapshot.operations)):
                counts = view.snapshot.operations.get(operation)
                yield Sample((operation,), 0 if counts is None else getattr(counts, attribute))

    return samples


def _running(view: RoleView) -> Iterator[Sample]:
    if view.is_target:
        for operation, since in view.snapshot.running.items():
            yield Sample((operation,), since)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_operations",
        "counter",
        "{call}",
        "Calls that read, save, send or check weights, or change adapters or update groups.",
        ("operation",),
        _operations("calls"),
    ),
    Instrument(
        "sglang_weight_operation_failures",
        "counter",
        "{call}",
        "Such calls that failed.",
        ("operation",),
        _operations("failures"),
    ),
    Instrument(
        "sglang_weight_operation_start_timestamp_seconds",
        "gauge",
        "s",
        "Since when such a call has been running, as one does that waits for a member of an update "
        "group which never comes; absent while none is.",
        ("operation",),
        _running,
        preset="default",
    ),
)
