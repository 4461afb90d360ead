# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sglang_weight_exporter.export.instruments.base import Instrument, RoleReader, Sample
from sglang_weight_exporter.export.views import RoleView


def _lora(attribute: Literal["nbytes", "adapters"]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for usage in view.role.lora:
            yield Sample((), getattr(usage, attribute), usage.device)

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
)
