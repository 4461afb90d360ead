# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What metrics are computed from: the host, and each role of each rank on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sglang_weight_exporter.export.gpu_account import GpuAccount
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot

#: Labels of every series of a rank; the rank labels are SGLang's own, so that series join.
IDENTITY = (
    "model_name",
    "engine",
    "role",
    *Ranks().labels,
    "device",
    "gpu_uuid",
)


#: Stands for the roles of a rank of which none is known: it loads, or this SGLang's model runners
#: are not.
NO_ROLE = Role(name="", device="")


@dataclass(frozen=True)
class RoleView:
    """A role of a rank, as an instrument reads it."""

    snapshot: Snapshot
    role: Role

    @property
    def is_target(self) -> bool:
        return self.role.name == "target"

    @property
    def is_first(self) -> bool:
        """Whether this role stands for what is the rank's and no role's: an encoder server and a
        weight-cache daemon have no target."""
        return self.role.name == roles_of(self.snapshot)[0].name


@dataclass
class SpanCounts:
    """What became of the events of this host's ranks, counted by ``export.otlp.span_sender``."""

    exported: int = 0
    waiting: int = 0
    failures: int = 0
    dropped: dict[str, int] = field(
        default_factory=lambda: {"queue_full": 0, "refused": 0, "unreadable": 0}
    )


@dataclass(frozen=True)
class HostView:
    """All that the exporter process knows, as the instruments without identity read it."""

    snapshots: tuple[Snapshot, ...]
    gpus: tuple[GpuAccount, ...] = ()
    unreadable: int = 0
    spans: SpanCounts = field(default_factory=SpanCounts)
    #: Ranks that ended inside an update, by model and engine, counted by ``export.rank_care``.
    died_in_update: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: What went wrong in this process, one rank or one pass at a time.
    errors: int = 0
    #: What the scrape before this one took; None before the first, and where nothing is scraped.
    scrape_seconds: float | None = None
    #: When this process began to count.
    started_at: float = field(default_factory=time.time)
    now: float = field(default_factory=time.time)
    #: Whether these ranks do not exist (``serve --simulate``).
    simulated: bool = False


def identity(view: RoleView, device: str) -> tuple[str, ...]:
    """Values of :data:`IDENTITY`; a rank that SGLang does not have is the empty string, which
    to Prometheus is the same as no label."""
    name = device or view.role.device
    uuid = next((each.uuid for each in view.snapshot.devices if each.name == name), "")
    return (
        view.snapshot.engine.model_name,
        view.snapshot.engine.name,
        view.role.name,
        *("" if rank is None else str(rank) for rank in view.snapshot.ranks.labels.values()),
        name,
        uuid,
    )


def roles_of(snapshot: Snapshot) -> tuple[Role, ...]:
    """The roles of a rank, or :data:`NO_ROLE` alone where none is known."""
    return snapshot.roles or (NO_ROLE,)


def role_views(snapshots: Iterable[Snapshot], now: float) -> Iterator[RoleView]:
    """Every role of every rank, with idle updates settled."""
    for snapshot in snapshots:
        for role in roles_of(snapshot):
            yield RoleView(snapshot, role.settled(now))
