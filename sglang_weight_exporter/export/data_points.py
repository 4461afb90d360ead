# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Instruments read from views: what Prometheus and OTLP turn into their own forms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_weight_exporter.export.instruments import Instrument, Sample
from sglang_weight_exporter.export.views import IDENTITY, HostView, RoleView, identity


@dataclass(frozen=True)
class DataPoint:
    """One value of an instrument, with all its labels."""

    #: Values in the order of :func:`label_names`; what SGLang does not have is the empty string.
    labels: tuple[str, ...]
    sample: Sample
    #: Since when a total counts, in Unix seconds.
    started_at: float


def label_names(instrument: Instrument) -> tuple[str, ...]:
    """Identity, where the instrument is read from roles, and the instrument's own labels."""
    return (*(IDENTITY if instrument.read_role else ()), *instrument.labels)


def measure_host(instrument: Instrument, view: HostView) -> list[DataPoint]:
    """Values that are the host's and no rank's."""
    if instrument.read_host is None:
        return []
    return [
        DataPoint(sample.labels, sample, view.started_at) for sample in instrument.read_host(view)
    ]


def measure_roles(instrument: Instrument, roles: Iterable[RoleView]) -> list[DataPoint]:
    """Values of these roles."""
    if instrument.read_role is None:
        return []
    return [
        DataPoint(
            (*identity(role, sample.device), *sample.labels), sample, role.snapshot.started_at
        )
        for role in roles
        if role.role.name or instrument.of_rank
        for sample in instrument.read_role(role)
    ]
