# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an instrument is, and how it is read from views.

Prometheus and OTLP both take their values from here, and so does the reference in ``docs/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from sglang_weight_exporter.export.views import IDENTITY, HostView, RoleView, identity
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.records.updates import (
    DURATION_BUCKETS,
    SOURCES,
    Histogram,
    UpdateCounts,
)


class Sample(NamedTuple):
    """One value of an instrument."""

    #: Label values beyond identity, in the instrument's order.
    labels: tuple[str, ...]
    value: float | Histogram
    #: The device that the value belongs to; empty: the role's own.
    device: str = ""
    #: The trace of the last update that was counted here; empty where there is none.
    trace_id: str = ""
    #: When that was, and how long it took.
    at: float | None = None
    seconds: float | None = None


RoleReader: TypeAlias = Callable[[RoleView], Iterable[Sample]]
Preset: TypeAlias = Literal["lean", "default", "full"]
View = TypeVar("View", RoleView, HostView)
HostReader: TypeAlias = Callable[[HostView], Iterable[Sample]]


class DataPoint(NamedTuple):
    """One value of an instrument, with all its labels."""

    #: Values in the order of :attr:`Instrument.label_names`; what SGLang does not have is the empty
    #: string.
    labels: tuple[str, ...]
    sample: Sample
    #: Since when a total counts, in Unix seconds.
    started_at: float


@dataclass(frozen=True)
class Instrument:
    """One metric family.

    ``name`` is Prometheus's, without ``_total``; OTLP derives its own from it and ``unit``.
    ``read_role`` gives values for each role of each rank (with identity labels), ``read_host``
    for the host.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    #: UCUM, with what is counted in braces; empty where a number has no unit.
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    read_role: RoleReader | None = None
    read_host: HostReader | None = None
    #: It is the rank's and no role's: a rank of which no role is known yet has it too.
    of_rank: bool = False
    #: What takes its place. It is in ``default`` where that is new, then in ``full``, then gone.
    replaced_by: str = ""
    #: The smallest preset that has it. ``lean``: a panel or a rule of ours asks for it.
    #: ``default``: none does, but it is seldom there, or one a host.
    preset: Preset = "lean"
    #: Read less, which is enough for them.
    lean_role: RoleReader | None = None
    lean_host: HostReader | None = None
    #: Upper bounds of the buckets that are served, of those that are counted.
    bounds: tuple[float, ...] = DURATION_BUCKETS
    lean_bounds: tuple[float, ...] = (1.0, 10.0, 100.0)

    def lean(self) -> Instrument:
        """The instrument in the series that dashboards and rules ask for."""
        return replace(
            self,
            read_role=self.lean_role or self.read_role,
            read_host=self.lean_host or self.read_host,
            bounds=self.lean_bounds,
        )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Identity, where it is read from roles, and its own labels."""
        return (*(IDENTITY if self.read_role else ()), *self.labels)

    def of_host(self, view: HostView) -> list[DataPoint]:
        """Values that are the host's and no rank's."""
        if self.read_host is None:
            return []
        return [
            DataPoint(sample.labels, sample, view.started_at) for sample in self.read_host(view)
        ]

    def of_roles(self, roles: Iterable[RoleView]) -> list[DataPoint]:
        """Values of these roles."""
        if self.read_role is None:
            return []
        return [
            DataPoint(
                (*identity(role, sample.device), *sample.labels), sample, role.snapshot.started_at
            )
            for role in roles
            if role.role.name or self.of_rank
            for sample in self.read_role(role)
        ]


#: Of a source that was not used.
UNUSED = UpdateCounts()


def one(value: float | None) -> Iterator[Sample]:
    if value is not None:
        yield Sample((), value)


def by_device(totals: dict[str, int] | None) -> Iterator[Sample]:
    for device, value in (totals or {}).items():
        yield Sample((), value, device)


def by_source(
    read: Callable[[UpdateCounts], float | Histogram], *, exemplar: bool = False
) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for source in SOURCES:
            counts = view.role.updates.get(source, UNUSED)
            yield Sample(
                (source,),
                read(counts),
                trace_id=counts.trace_id if exemplar else "",
                at=counts.updated_at,
                seconds=counts.seconds,
            )

    return samples


def target_only(read: Callable[[Snapshot], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target:
            yield from one(read(view.snapshot))

    return samples


def once_a_rank(read: Callable[[Snapshot], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_first:
            yield from one(read(view.snapshot))

    return samples


def not_zero(read: Callable[[View], Iterable[Sample]]) -> Callable[[View], Iterable[Sample]]:
    """What is read, without zeros."""
    return lambda view: (sample for sample in read(view) if sample.value)
