# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""An update from its beginning to its end, and the calls that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sglang_weight_exporter.records.updates import (
    Effect,
    Phase,
    Source,
    Update,
    UpdateInProgress,
    add_bytes,
)

#: An update whose release reports no end counts as ended after this long without a call.
IDLE_SECONDS = 10.0

#: When the end of a call is the end of its update: always; unless a request of the scheduler's is
#: being served, which then ends it; or never.
EndsWith = Literal["call", "request", "later"]


def elapsed(started_at: float, ended_at: float) -> float:
    """Seconds between two times of a clock that may have been set back meanwhile."""
    return max(0.0, ended_at - started_at)


@dataclass(frozen=True)
class Verdict:
    """How a call that writes weights ended."""

    succeeded: bool
    effect: Effect
    message: str = ""


@dataclass(frozen=True)
class FinishedUpdate:
    """A load or update of a role that has ended and is counted.

    ``update`` is ``None`` for a session in which nothing was written: it may have changed the
    weights all the same, because quantized ones are unpacked and packed again.
    """

    role: str
    update: Update | None
    #: When that was noticed, where what follows belongs to it too; ``None`` where it has ended
    #: with its last call, some time ago.
    at: float | None = None
    #: When the device had all of it, where that was later.
    arrived_at: float | None = None
    #: When SGLang went on before all was captured: what that takes then is no part of the update.
    went_on_at: float | None = None

    @property
    def received(self) -> bool:
        """Whether a device receives its bytes by itself."""
        return self.update is not None and self.update.source == "distributed"

    @property
    def wrote(self) -> bool:
        """Whether it is an update or a session, and no load; nor an update that SGLang refused."""
        update = self.update
        return update is None or (update.action == "update" and update.calls > 0)


@dataclass(eq=False)
class OpenUpdate:
    """An update that has begun."""

    source: Source | None
    number: int
    started_at: float
    last_call_at: float
    session: bool = False
    #: SGLang will report the end: of a session, or of a rebalance.
    bounded: bool = False
    #: Calls that are running: an announced block inside a call of SGLang's is a second one.
    running: int = 0
    calls: int = 0
    #: A call failed, so that some of the weights may be new and some old.
    broken: bool = False
    #: The calls succeeded, and what SGLang does after them did not: the cache keeps what the old
    #: weights left in it. The weights are the new ones.
    refused: bool = False
    effect: Effect = "unchanged"
    message: str = ""
    failed_in: Phase | None = None
    #: Of a call that is running: it is not known yet whether it will have written anything.
    coming: Source | None = None
    weight_version: str = ""
    #: What it is about now and since when; seconds of what it has been about before.
    phase: Phase = "wait"
    phase_since: float = 0.0
    phases: dict[Phase, float] = field(default_factory=dict)
    #: The same up to its last call, where tensors have arrived since that none of its own loads.
    phases_to_last_call: dict[Phase, float] | None = None
    #: What its calls have brought, and what the one that is running has; ``None``: not known.
    nbytes: int | None = 0
    incoming_bytes: int | None = None

    def begin_receiving(self, source: Source, at: float) -> None:
        """Tensors arrive, for a call of its own or for another role alone."""
        if self.phases_to_last_call is None:
            self.phases_to_last_call = dict(self.phases)
        self.coming = source
        self.set_phase("receive", at)

    def set_phase(self, phase: Phase, at: float) -> None:
        if phase == "load":
            self.phases_to_last_call = None
        self.add_time(self.phase, elapsed(self.phase_since, at))
        self.phase, self.phase_since = phase, at

    def add_time(self, phase: Phase, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def divert_time(self, phase: Phase, since: float, at: float) -> None:
        """Since a moment of the running phase, time went elsewhere."""
        self.set_phase(self.phase, since)
        self.add_time(phase, elapsed(since, at))
        self.phase_since = at

    def receive_until(self, at: float) -> None:
        """Since the running phase began, and until then, tensors were still arriving."""
        if at > self.phase_since:
            self.add_time("receive", at - self.phase_since)
            self.phase_since = at

    def is_idle(self, at: float, seconds: float = IDLE_SECONDS) -> bool:
        """Whether it counts as ended: nobody will report an end, and no call has come for long."""
        return not (self.bounded or self.running) and at - self.last_call_at >= seconds

    @property
    def failed(self) -> bool:
        return self.broken or self.refused

    def record(self, verdict: Verdict, at: float) -> None:
        """A call has ended."""
        self.calls += 1
        self.last_call_at = at
        if not verdict.succeeded:
            self.failed_in = self.phase
        self.set_phase("wait", at)
        if verdict.succeeded:  # Of others nobody knows what came.
            self.nbytes = add_bytes(self.nbytes, self.incoming_bytes)
        self.incoming_bytes = None
        if not verdict.succeeded:
            self.broken = True
            self.message = verdict.message
        effects = {self.effect, verdict.effect}
        if "undefined" in effects or (self.broken and "changed" in effects):
            self.effect = "undefined"  # Some buckets of several are in, and some are not.
        elif "changed" in effects:
            self.effect = "changed"

    def miss(self, message: str) -> None:
        """A bucket that was to come has not: SGLang failed before it got to this role."""
        self.failed_in = self.failed_in or self.phase
        self.broken, self.message = True, message
        if self.effect == "changed":
            self.effect = "undefined"

    def abort(self, message: str) -> None:
        """The process ends in the middle of it."""
        self.miss(self.message or message)
        if self.running:
            self.effect = "undefined"

    @property
    def in_progress(self) -> UpdateInProgress:
        """For readers, as long as it goes on."""
        return UpdateInProgress(
            source=self.source or self.coming,
            started_at=self.started_at,
            last_call_at=self.last_call_at,
            calls=self.calls,
            failed=self.failed,
            phase=self.phase,
            phase_since=self.phase_since,
            phases=dict(self.phases),
            nbytes=self.nbytes,
            idle_seconds=None if self.bounded or self.running else IDLE_SECONDS,
        )

    def finished(self, *, at: float | None, weight_version: str, trace_id: str) -> Update:
        """The record of it. ``at``: it ends only now, and not with its last call."""
        phases = self.phases if at is not None else self.phases_to_last_call
        return Update(
            action="update",
            source=self.source,
            sequence=self.number,
            started_at=self.started_at,
            ended_at=self.last_call_at if at is None else at,
            calls=self.calls,
            succeeded=not self.failed,
            effect=self.effect,
            message=self.message,
            failed_in=self.failed_in,
            weight_version=self.weight_version or weight_version,
            trace_id=trace_id,
            phases=self.phases if phases is None else phases,
            nbytes=self.nbytes,
        )


@dataclass(frozen=True)
class CallToken:
    """A call that has begun, to be handed back when it ends."""

    role: str
    source: Source
    ends_with: EndsWith
    #: Whether this call opened its update.
    opened: bool
    open: OpenUpdate
    #: Whether experts move: in this call, or around it on the same thread.
    moves: bool
