# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one loop over instruments and views: what Prometheus and OTLP turn into their own forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_weight_exporter.export.instruments import INSTRUMENTS, Instrument, Sample
from sglang_weight_exporter.export.views import IDENTITY, HostView, identity, role_views


@dataclass(frozen=True)
class Measurement:
    """One value of an instrument, with all its labels."""

    #: Values in the order of :func:`label_names`; what SGLang does not have is the empty string.
    labels: tuple[str, ...]
    sample: Sample
    #: Since when a total counts, in Unix seconds.
    started_at: float


def label_names(instrument: Instrument) -> tuple[str, ...]:
    """Identity, where the instrument is read from roles, and the instrument's own labels."""
    return (*(IDENTITY if instrument.read_role else ()), *instrument.labels)


def measure(
    view: HostView, *, part: int | None = None
) -> Iterator[tuple[Instrument, list[Measurement]]]:
    """Every instrument with its values; one without values has an empty list.

    ``part``: an instrument of roles comes several times, each time with this many roles, so that
    what a caller makes of it need not be held for all ranks at once.
    """
    roles = list(role_views(view.snapshots, view.now))
    size = part or max(len(roles), 1)
    for instrument in INSTRUMENTS:
        if instrument.read_host is not None:
            yield (
                instrument,
                [
                    Measurement(sample.labels, sample, view.started_at)
                    for sample in instrument.read_host(view)
                ],
            )
        if instrument.read_role is not None:
            for start in range(0, max(len(roles), 1), size):
                yield (
                    instrument,
                    [
                        Measurement(
                            (*identity(role, sample.device), *sample.labels),
                            sample,
                            role.snapshot.started_at,
                        )
                        for role in roles[start : start + size]
                        for sample in instrument.read_role(role)
                    ],
                )
