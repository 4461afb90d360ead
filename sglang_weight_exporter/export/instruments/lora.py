# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter slots, and the adapters that are loaded. Their names are no labels: a trainer may load
one a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from sglang_weight_exporter.export.instruments.base import Instrument, RoleReader, Sample
from sglang_weight_exporter.export.instruments.operations import OPERATIONS_OF_ADAPTERS
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.fingerprint import as_number
from sglang_weight_exporter.records.adapters import ASPECTS, Adapters
from sglang_weight_exporter.records.updates import OperationCounts


def _lora(attribute: Literal["nbytes", "adapters"]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for usage in view.role.lora:
            yield Sample((), getattr(usage, attribute), usage.device)

    return samples


def _adapters(read: Callable[[Adapters], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        value = None if view.role.adapters is None else read(view.role.adapters)
        if value is not None:
            yield Sample((), value)

    return samples


def _hashes(view: RoleView) -> Iterator[Sample]:
    hashes = {} if view.role.adapters is None else view.role.adapters.hashes
    for aspect in ASPECTS:
        if hashes.get(aspect):
            yield Sample((aspect,), as_number(hashes[aspect]))


def _calls(read: Callable[[OperationCounts], int], *operations: str) -> RoleReader:
    """Calls of the rank, which has adapters for its target."""

    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target and view.role.adapters is not None:
            counts = view.snapshot.operations
            yield Sample((), sum(read(counts[name]) for name in operations if name in counts))

    return samples


INSTRUMENTS = (
    Instrument(
        "sglang_lora_pool_bytes",
        "gauge",
        "By",
        "Bytes of the preallocated LoRA adapter slots.",
        read_role=_lora("nbytes"),
    ),
    Instrument(
        "sglang_lora_adapters",
        "gauge",
        "{adapter}",
        "LoRA adapters that are loaded.",
        read_role=_lora("adapters"),
    ),
    Instrument(
        "sglang_lora_adapter_bytes",
        "gauge",
        "By",
        "Bytes of their tensors in the host's memory, which are not those of the slots.",
        read_role=_adapters(lambda adapters: adapters.nbytes),
        preset="full",
    ),
    Instrument(
        "sglang_lora_adapter_last_change_timestamp_seconds",
        "gauge",
        "s",
        "When an adapter was loaded or unloaded last.",
        read_role=_adapters(lambda adapters: adapters.changed_at),
        preset="full",
    ),
    Instrument(
        "sglang_lora_adapters_hash",
        "gauge",
        "",
        "53 bits over the loaded adapters' names (names); over names, ranks, scaling and modules "
        "(settings); and, with fingerprints, over what their tensors hold too (content). Equal "
        "where these are.",
        ("aspect",),
        _hashes,
    ),
    Instrument(
        "sglang_lora_adapter_changes",
        "counter",
        "{adapter}",
        "Adapters that were loaded or unloaded at runtime.",
        read_role=_calls(
            lambda counts: counts.calls - counts.failures,
            *OPERATIONS_OF_ADAPTERS,
            "unload_lora_adapter",
        ),
    ),
    Instrument(
        "sglang_lora_adapter_failures",
        "counter",
        "{adapter}",
        "Loads of adapters that failed in the rank. What the HTTP server refuses by itself, such "
        "as a name that is taken, does not get there.",
        read_role=_calls(lambda counts: counts.failures, *OPERATIONS_OF_ADAPTERS),
        preset="full",
    ),
)
