# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What happened to the weights of one process: loads, updates, sessions, requests, rebalances.

Pure state. It knows nothing of SGLang, of tensors or of files, so nothing that goes wrong with
those can change what it says. Every method is safe from any thread, and none waits.

A call that writes weights is begun and finished (:meth:`Ledger.begin`, :meth:`Ledger.finish`); one
call or several are an update. All of its time goes to one phase or another, so that they sum to
its duration. An update of several ends in one of three ways, whichever SGLang's
release offers: the end of its session (0.5.21 and later), a request that asks for the cache to be
flushed, or no call for :data:`IDLE_SECONDS` (a heuristic, for clients that never ask). What has
ended is collected with :meth:`Ledger.take_finished`.

A role has two updates at a time at most: one that somebody asked for, and one of experts that move
between ranks, which goes on between and inside forward passes whatever else happens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from sglang_weight_exporter.records.fingerprints import During, FingerprintCounts, Skip
from sglang_weight_exporter.records.pools import PAUSES, CacheCounts, Pause
from sglang_weight_exporter.records.snapshot import Role
from sglang_weight_exporter.records.updates import (
    SOURCES,
    Effect,
    OperationCounts,
    Phase,
    Source,
    Update,
    UpdateCounts,
    UpdateInProgress,
    add_bytes,
    add_phases,
)
from sglang_weight_exporter.records.weights import CHANGES, Change, Kind, TableChanges

#: An update whose release reports no end counts as ended after this long without a call.
IDLE_SECONDS = 10.0

#: When the end of a call is the end of its update: always; unless a request of the scheduler's is
#: being served, which then ends it; or never.
EndsWith = Literal["call", "request", "later"]


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
    weight_version: str = ""
    #: What it is about now and since when; seconds of what it has been about before.
    phase: Phase = "wait"
    phase_since: float = 0.0
    phases: dict[Phase, float] = field(default_factory=dict)
    #: What its calls have brought, and what the one that is running has; ``None``: not known.
    nbytes: int | None = 0
    incoming_bytes: int | None = None

    def set_phase(self, phase: Phase, at: float) -> None:
        self.add_time(self.phase, _elapsed(self.phase_since, at))
        self.phase, self.phase_since = phase, at

    def add_time(self, phase: Phase, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    @property
    def failed(self) -> bool:
        return self.broken or self.refused

    def record(self, verdict: Verdict, at: float) -> None:
        self.calls += 1
        self.last_call_at = at
        self.set_phase("wait", at)
        if verdict.effect != "unchanged":
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


@dataclass
class _Role:
    loaded_at: float | None = None
    load_seconds: float | None = None
    updated_at: float | None = None
    update_started_at: float | None = None
    #: The checkpoint that is served; SGLang's own is overwritten by an update that fails.
    model_path: str = ""
    updates: dict[Source, UpdateCounts] = field(
        default_factory=lambda: {source: UpdateCounts() for source in SOURCES}
    )
    moved: int = 0
    changes: dict[Change, int] = field(default_factory=lambda: dict.fromkeys(CHANGES, 0))
    skipped: dict[Skip, int] = field(default_factory=dict)
    modified: dict[During, dict[Kind, int]] = field(default_factory=dict)
    update: OpenUpdate | None = None
    rebalance: OpenUpdate | None = None
    last_update: Update | None = None
    #: When a load began that has left placeholders, whose values come later.
    loading_since: float | None = None
    #: A load that is told of once the role's pools are allocated: its table changes till then.
    unreported_load: Update | None = None

    @property
    def open(self) -> tuple[OpenUpdate, ...]:
        return tuple(each for each in (self.update, self.rebalance) if each is not None)


@dataclass(frozen=True)
class _Request:
    """A request of the scheduler that is being served."""

    number: int
    flush_cache: bool
    weight_version: str
    began_at: float

    def wrote(self, update: OpenUpdate) -> bool:
        """Whether a call of the update is of this request."""
        return update.calls > 0 and update.last_call_at >= self.began_at


class Ledger:
    """The account of one process.

    ``trace_id``: update number → the trace of its span. ``cached_tokens``: how many tokens the
    prefix cache holds now, ``None`` where that is not known; asked when weights have been written.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        thread: Callable[[], int] = threading.get_ident,
        trace_id: Callable[[int], str] = lambda number: "",
        cached_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._clock = clock
        self._thread = thread
        self._trace_id = trace_id
        self._cached_tokens = cached_tokens
        self._lock = threading.RLock()
        self._roles: dict[str, _Role] = {}
        self._ended: list[FinishedUpdate] = []
        self._number = 0
        self._requests: dict[int, _Request] = {}
        #: Thread → the call by which experts are being moved on it right now.
        self._moving: dict[int, CallToken] = {}
        #: Thread → updates of which a call is running on it, the innermost last.
        self._running: dict[int, list[OpenUpdate]] = {}
        self._rebalancing = False
        #: Calls since the first runner's session began.
        self._session_calls = 0
        self._starting = False
        self._load_began_at: float | None = None
        self._weight_version = ""
        self._operations: dict[str, OperationCounts] = {}
        self._groups: set[str] = set()
        self._released: set[str] = set()
        self._cache: CacheCounts | None = None

    # What fingerprints show.

    def count_skipped(self, name: str, reason: Skip) -> None:
        """A fingerprint was not taken."""
        with self._lock:
            counts = self._roles[name].skipped
            counts[reason] = counts.get(reason, 0) + 1

    def count_modified(self, name: str, during: During, kinds: Iterable[Kind]) -> None:
        """Tensors of these kinds hold other bytes than the last load or update left in them."""
        with self._lock:
            counts = self._roles[name].modified.setdefault(during, {})
            for kind in kinds:
                counts[kind] = counts.get(kind, 0) + 1

    def fingerprint_counts(self, name: str) -> FingerprintCounts:
        with self._lock:
            role = self._roles[name]
            modified = {during: dict(kinds) for during, kinds in role.modified.items()}
            return FingerprintCounts(skipped=dict(role.skipped), modified=modified)

    # What others ask.

    def take_finished(self) -> list[FinishedUpdate]:
        """Loads and updates that have ended since this was asked last, in order."""
        with self._lock:
            ended, self._ended = self._ended, []
            return ended

    @property
    def weight_version(self) -> str:
        return self._weight_version

    @property
    def operations(self) -> dict[str, OperationCounts]:
        with self._lock:
            return dict(self._operations)

    @property
    def update_groups(self) -> int:
        return len(self._groups)

    @property
    def released(self) -> frozenset[str]:
        """Tags of the memory saver whose physical memory is given back now."""
        with self._lock:
            return frozenset(self._released)

    @property
    def cache(self) -> CacheCounts | None:
        """Flushes and pauses; ``None`` where no scheduler serves requests."""
        with self._lock:
            # What was left behind may have been evicted, or thrown away without a flush.
            if self._cache is not None and self._cache.stale and self._cached_tokens() == 0:
                self._change_cache(stale=False)
            return self._cache

    def in_session(self) -> bool:
        """Whether a session of any role goes on."""
        with self._lock:
            return any(role.update and role.update.session for role in self._roles.values())

    @property
    def updating(self) -> bool:
        """Whether an update of any role has begun and not ended."""
        with self._lock:
            return any(role.open for role in self._roles.values())

    def is_updating(self, role: str) -> bool:
        """Whether an update of this role has begun and not ended."""
        with self._lock:
            return role in self._roles and bool(self._roles[role].open)

    def describe(self, name: str, record: Role) -> Role:
        """The record of a role with what this ledger knows of it."""
        with self._lock:
            role = self._roles[name]
            return msgspec.structs.replace(
                record,
                model_path=role.model_path,
                loaded_at=role.loaded_at,
                load_seconds=role.load_seconds,
                updated_at=role.updated_at,
                update_started_at=role.update_started_at,
                updates=dict(role.updates),
                moved=role.moved,
                changes=dict(role.changes),
                in_progress=_in_progress(role.open[0]) if role.open else None,
                last_update=role.last_update,
            )

    # Roles come and go.

    def add_role(self, name: str) -> None:
        """A model runner of this role has appeared. One of the same name that went before it has
        left its counts, which belong to the process."""
        with self._lock:
            before = self._roles.get(name, _Role())
            self._roles[name] = _Role(
                updates=before.updates,
                moved=before.moved,
                changes=before.changes,
                skipped=before.skipped,
                modified=before.modified,
            )

    # Loads.

    def begin_start(self) -> None:
        """The process loads its models: until the end nothing is told of a load, because a draft
        gives up its own embeddings for the target's only then."""
        with self._lock:
            self._starting = True
            self._cache = CacheCounts(pauses=dict.fromkeys(PAUSES, 0))

    def end_start(self) -> None:
        """All models are loaded and share what they share."""
        with self._lock:
            self._starting = False
            for name in self._roles:
                self.report_load(name)

    def begin_load(self) -> float:
        """A load begins; the time it began, also kept for :meth:`load_began_at`."""
        with self._lock:
            self._load_began_at = self._clock()
            return self._load_began_at

    @property
    def load_began_at(self) -> float | None:
        """When the last load began."""
        return self._load_began_at

    def end_load(
        self,
        name: str,
        started_at: float | None,
        *,
        error: str = "",
        placeholders: bool = False,
        model_path: str = "",
        weight_version: str = "",
    ) -> None:
        """A load has ended. ``started_at``: ``None`` where no load was seen to begin.
        ``placeholders``: its values come later (:meth:`finalize_load`)."""
        if started_at is None:
            return
        with self._lock:
            role = self._roles[name]
            self._number += 1
            ended_at = self._clock()
            if placeholders:
                role.loading_since = started_at
            elif not error:
                if role.loaded_at is None:
                    role.loaded_at = ended_at
                    role.load_seconds = _elapsed(started_at, ended_at)
                role.updated_at = ended_at
                role.update_started_at = started_at
            if not error:
                role.model_path = model_path
                self._weight_version = self._weight_version or weight_version
            role.last_update = role.unreported_load = Update(
                action="load",
                sequence=self._number,
                started_at=started_at,
                ended_at=ended_at,
                succeeded=not error,
                effect="undefined" if error else "changed",
                message=error,
                model_path=model_path,
                weight_version=self._weight_version,
            )
            if error:
                self.report_load(name)

    def finalize_load(self, name: str, *, error: str = "") -> None:
        """The values of a load that had left placeholders have come."""
        with self._lock:
            role = self._roles[name]
            if role.loading_since is None or role.unreported_load is None:
                return
            started_at, role.loading_since = role.loading_since, None
            ended_at = self._clock()
            if not error:
                role.loaded_at = role.updated_at = ended_at
                role.update_started_at = started_at
                role.load_seconds = _elapsed(started_at, ended_at)
            role.last_update = role.unreported_load = msgspec.structs.replace(
                role.unreported_load,
                ended_at=ended_at,
                succeeded=not error,
                effect="undefined" if error else "changed",
                message=error,
            )
            self.report_load(name)

    def report_load(self, name: str) -> None:
        """The table of a load is what it will be: let the load have ended, if it has."""
        with self._lock:
            role = self._roles[name]
            if self._starting or role.loading_since is not None:
                return
            load, role.unreported_load = role.unreported_load, None
            if load is not None:
                # Ranks on several hosts know only now that they are one engine.
                load = msgspec.structs.replace(load, trace_id=self._trace_id(load.sequence))
                role.last_update = load
                self._ended.append(FinishedUpdate(name, load))

    # Calls that write weights.

    def begin(
        self, name: str, source: Source, *, ends_with: EndsWith, since: float | None = None
    ) -> CallToken:
        """A call is about to write weights: a whole update, or one part of it. ``since``: when the
        look at what is there before it began."""
        with self._lock:
            moves = self._thread() in self._moving
            if moves:  # Missing experts that are read from disk again, and the like.
                return self._begin(name, "eplb", "call", since)
            return self._begin(name, source, ends_with, since)

    def finish(self, token: CallToken, verdict: Verdict) -> None:
        """The call has returned or raised."""
        with self._lock:
            if self._moving.get(self._thread()) is token:
                del self._moving[self._thread()]
            role = self._roles[token.role]
            open_ = token.open
            open_.running -= 1
            running = self._running.get(self._thread(), [])
            if open_ in running:
                running.remove(open_)
            counts = role.updates[token.source]
            role.updates[token.source] = msgspec.structs.replace(counts, calls=counts.calls + 1)
            if not token.moves:
                self._session_calls += 1
                if open_.source is None or token.source != "external":
                    open_.source = token.source
            open_.record(verdict, self._clock())
            if not token.moves:  # Experts that move are the same experts.
                self._mark_prefix_cache_stale(verdict)
            served = token.ends_with == "request" and self._thread() in self._requests
            if token.opened and token.ends_with != "later" and not served:
                self._end(token.role, open_, at=open_.last_call_at)

    def fail_receiving(self, name: str, source: Source, message: str) -> None:
        """Tensors of an open update did not arrive."""
        with self._lock:
            open_ = self._roles[name].update
            if open_ is not None:
                self._session_calls += 1
                open_.source = source
                open_.record(Verdict(False, "unchanged", message), self._clock())

    @property
    def writing(self) -> bool:
        """Whether a call that writes weights is running on this thread."""
        return bool(self._running.get(self._thread()))

    def add_bytes(self, nbytes: int) -> None:
        """What the call that is running on this thread brings is so large."""
        with self._lock:
            for open_ in self._running.get(self._thread(), [])[-1:]:
                open_.incoming_bytes = (open_.incoming_bytes or 0) + nbytes

    # Where the time of updates goes.

    def set_phase(self, phase: Phase, *roles: str) -> None:
        """From now on the updates of these roles are about something else; without roles, the
        update of which a call is running on this thread."""
        with self._lock:
            updates = [self._roles[name].update for name in roles]
            for open_ in updates or self._running.get(self._thread(), [])[-1:]:
                if open_ is not None:
                    open_.set_phase(phase, self._clock())

    def add_time(self, phase: Phase, since: float) -> None:
        """Since a moment of the running phase of the call on this thread, time went elsewhere."""
        with self._lock:
            for open_ in self._running.get(self._thread(), [])[-1:]:
                now = self._clock()
                open_.set_phase(open_.phase, since)
                open_.add_time(phase, _elapsed(since, now))
                open_.phase_since = now

    def _begin(
        self, name: str, source: Source, ends_with: EndsWith, since: float | None = None
    ) -> CallToken:
        role = self._roles[name]
        moves = source == "eplb"
        open_ = role.rebalance if moves else role.update
        now = self._clock()
        if open_ is not None and not open_.session and not open_.running:
            idle = not open_.bounded and now - open_.last_call_at > IDLE_SECONDS
            if idle or open_.source != source:
                self._end(name, open_)
                open_ = None
        opened = open_ is None
        if open_ is None:
            bounded = moves and self._rebalancing
            open_ = self._open(role, source, now, bounded=bounded, since=since)
        open_.running += 1
        open_.set_phase("load", now)
        self._running.setdefault(self._thread(), []).append(open_)
        return CallToken(name, source, ends_with, opened, open_, moves)

    def _open(
        self,
        role: _Role,
        source: Source | None,
        now: float,
        *,
        bounded: bool,
        since: float | None = None,
    ) -> OpenUpdate:
        request = None if source == "eplb" else self._requests.get(self._thread())
        if request is None:
            self._number += 1
        open_ = OpenUpdate(
            source=source,
            number=self._number if request is None else request.number,
            started_at=now if since is None else since,
            last_call_at=now,
            session=source is None,
            bounded=bounded,
            weight_version="" if request is None else request.weight_version,
            phase_since=now,
        )
        if since is not None:
            open_.add_time("capture", _elapsed(since, now))
        if source == "eplb":
            role.rebalance = open_
        else:
            role.update = open_
        return open_

    def _end(self, name: str, open_: OpenUpdate, *, at: float | None = None) -> None:
        """Close an update and count it. ``at``: it ends only now, and not with its last call."""
        role = self._roles[name]
        if role.update is open_:
            role.update = None
        elif role.rebalance is open_:
            role.rebalance = None
        else:
            return
        if open_.source is None:
            self._ended.append(FinishedUpdate(name, None))
            return
        if at is not None:
            open_.set_phase("wait", at)
        trace_id = self._trace_id(open_.number)
        counts = role.updates[open_.source]
        counted = open_.effect == "changed"
        role.updates[open_.source] = msgspec.structs.replace(
            counts,
            updates=counts.updates + counted,
            failures=counts.failures + open_.failed,
            trace_id=trace_id if counted else counts.trace_id,
            updated_at=open_.last_call_at if counted else counts.updated_at,
        )
        if open_.effect != "unchanged":
            role.updated_at = open_.last_call_at
        if counted:
            role.update_started_at = open_.started_at
        role.last_update = Update(
            action="update",
            source=open_.source,
            sequence=open_.number,
            started_at=open_.started_at,
            ended_at=open_.last_call_at if at is None else at,
            calls=open_.calls,
            succeeded=not open_.failed,
            effect=open_.effect,
            message=open_.message,
            weight_version=open_.weight_version or self._weight_version,
            trace_id=trace_id,
            phases=open_.phases,
            nbytes=open_.nbytes,
        )
        self._ended.append(FinishedUpdate(name, role.last_update, at))

    def compare(
        self,
        ended: FinishedUpdate,
        *,
        model_path: str,
        changes: TableChanges,
        same_bytes: bool = False,
    ) -> Update | None:
        """Complete what has ended by what the look after it found, which is part of it.
        ``same_bytes``: every tensor holds what it held before, as fingerprints say."""
        with self._lock:
            update = ended.update
            role = self._roles[ended.role]
            if update is None or update.action == "load":
                return update
            complete = msgspec.structs.replace(update, model_path=model_path, changes=changes)
            if ended.at is not None:
                now = self._clock()
                look: dict[Phase, float] = {"capture": _elapsed(ended.at, now)}
                phases = add_phases(update.phases, look)
                complete = msgspec.structs.replace(complete, ended_at=now, phases=phases)
            self._count_time(role, complete)
            if role.last_update is update:
                role.last_update = complete
            if update.effect != "unchanged":
                role.model_path = model_path
            if same_bytes and update.source and update.succeeded and update.effect == "changed":
                counts = role.updates[update.source]
                role.updates[update.source] = msgspec.structs.replace(
                    counts, without_change=counts.without_change + 1
                )
            role.moved += changes.moved
            for change in CHANGES:
                role.changes[change] += getattr(changes, change)
            return complete

    def _count_time(self, role: _Role, update: Update) -> None:
        if update.source is None:
            return
        counts = role.updates[update.source]
        seconds = _elapsed(update.started_at, update.ended_at)
        counted = update.effect == "changed"
        role.updates[update.source] = msgspec.structs.replace(
            counts,
            duration=counts.duration.observe(seconds),
            seconds=seconds if counted else counts.seconds,
            phases=add_phases(counts.phases, update.phases),
            nbytes=add_bytes(counts.nbytes, update.nbytes),
        )

    # Sessions: an update with a beginning and an end, and any number of calls between.

    def begin_session(self, name: str, *, since: float | None = None) -> None:
        """It unpacks weights first. ``since``: as in :meth:`begin`."""
        with self._lock:
            role = self._roles[name]
            open_ = role.update
            if open_ is not None and open_.session:
                if open_.calls:
                    return  # SGLang refuses a second one.
                role.update = None  # It came to nothing: another runner's could not begin.
            elif open_ is not None:
                self._end(name, open_)
            if not self.in_session():
                self._session_calls = 0
            opened = self._open(role, None, self._clock(), bounded=True, since=since)
            opened.phase = "post_process"

    def abandon_session(self, name: str) -> None:
        """It could not begin: quantized weights are unpacked in place, perhaps some of them."""
        with self._lock:
            open_ = self._roles[name].update
            if open_ is not None:
                self._end(name, open_)

    def end_session(self, name: str, *, error: str = "", run_post_load: bool = False) -> None:
        """The session is over, or could not be ended, which leaves it open.

        ``run_post_load``: SGLang finishes weights that no call of its own has loaded.
        """
        with self._lock:
            role = self._roles[name]
            open_ = role.update
            if open_ is None:
                return
            if error:
                open_.source = open_.source or "p2p"
                broken = Verdict(False, "undefined", error)
                open_.incoming_bytes = 0
                open_.record(broken, self._clock())
                self._mark_prefix_cache_stale(broken)
            elif self._session_calls == 0 and run_post_load:
                # Nothing came through SGLang: a peer wrote into the tensors (RDMA).
                token = self._begin(name, "p2p", "later")
                self.finish(token, Verdict(True, "changed"))
            if open_.calls:
                open_.last_call_at = self._clock()
            self._end(name, open_, at=self._clock())
            if error:
                reopened = self._open(role, None, self._clock(), bounded=True)
                reopened.source = open_.source

    # Requests: where updates of several calls or roles end.

    def begin_request(self, *, flush_cache: bool, weight_version: str) -> None:
        """The scheduler serves a request to update weights."""
        with self._lock:
            for name, role in self._roles.items():
                open_ = role.update
                if (
                    open_ is not None
                    and not open_.session
                    and weight_version
                    and open_.weight_version not in {"", weight_version}
                ):
                    self._end(name, open_)
            self._number += 1
            self._requests[self._thread()] = _Request(
                self._number, flush_cache, weight_version, self._clock()
            )

    def end_request(self, *, succeeded: bool, message: str, raised: bool) -> None:
        """It is answered, or has raised, which ends the engine."""
        with self._lock:
            request = self._requests.pop(self._thread(), None)
            open_updates = [
                (name, role.update) for name, role in self._roles.items() if role.update is not None
            ]
            only_flush_failed = not succeeded and not any(open_.failed for _, open_ in open_updates)
            now = self._clock()
            for name, open_ in open_updates:
                at = now if request is not None and request.wrote(open_) else None
                if only_flush_failed and open_.calls:
                    open_.refused, open_.message = True, message
                if raised and open_.calls:
                    self._end(name, open_, at=at)
                    continue
                if open_.session or request is None:
                    continue
                if request.weight_version and open_.effect == "changed":
                    open_.weight_version = self._weight_version = request.weight_version
                if not succeeded or request.flush_cache or open_.source in {"disk", "ipc"}:
                    self._end(name, open_, at=at)

    def change_version(self, version: str) -> None:
        """SGLang took note of a new weight version."""
        with self._lock:
            self._weight_version = version
            for role in self._roles.values():
                if role.update is not None:
                    role.update.weight_version = version

    # Experts that move between ranks.

    def begin_rebalance(self) -> None:
        """All moves until its end are one update."""
        with self._lock:
            self._rebalancing = True

    def end_rebalance(self) -> None:
        with self._lock:
            self._rebalancing = False
            for name, role in self._roles.items():
                if role.rebalance is not None:
                    self._end(name, role.rebalance)

    def begin_move(self, name: str) -> CallToken | None:
        """Some layers' experts move; ``None`` inside another move of this thread."""
        with self._lock:
            if self._thread() in self._moving:
                return None
            token = self._begin(name, "eplb", "later" if self._rebalancing else "call")
            self._moving[self._thread()] = token
            return token

    # The prefix cache, whose keys and values are those of the weights that computed them.

    def _mark_prefix_cache_stale(self, verdict: Verdict) -> None:
        """Weights were written; what the cache holds now is the old ones'."""
        if verdict.effect == "unchanged":
            return
        tokens = self._cached_tokens()
        if tokens is not None:
            self._change_cache(stale=tokens > 0)
        elif self._cache is not None and not self._cache.stale:
            self._change_cache(stale=None)

    def _change_cache(self, **changes: Any) -> None:
        if self._cache is not None:
            self._cache = msgspec.structs.replace(self._cache, **changes)

    def begin_flush(self) -> None:
        """The cache is about to be flushed: where a request asks for it, that is part of the
        updates that it has a call in."""
        with self._lock:
            request = self._requests.get(self._thread())
            for role in self._roles.values():
                if request and role.update and request.wrote(role.update):
                    role.update.set_phase("flush", self._clock())

    def flush(self, *, succeeded: bool) -> None:
        """The cache was to be flushed, and is empty, or SGLang refused."""
        with self._lock:
            for role in self._roles.values():
                if role.update is not None and role.update.phase == "flush":
                    role.update.set_phase("wait", self._clock())
            cache = self._cache
            if cache is None:
                return
            if succeeded:
                self._change_cache(flushes=cache.flushes + 1, flushed_at=self._clock(), stale=False)
            else:
                self._change_cache(failures=cache.failures + 1)

    def pause(self, how: Pause) -> None:
        """Generation was interrupted. One that aborts all holds the requests that come in front of
        the scheduler, which has none and is not paused."""
        with self._lock:
            cache = self._cache
            if cache is not None:
                pauses = {**cache.pauses, how: cache.pauses.get(how, 0) + 1}
                self._change_cache(pauses=pauses, paused=cache.paused or how != "abort")

    def continue_generation(self) -> None:
        """Generation goes on."""
        with self._lock:
            self._change_cache(paused=False)

    # Memory that is given back, and what surrounds an update.

    def release(self, tags: set[str]) -> None:
        """Physical memory goes, addresses stay."""
        with self._lock:
            self._released |= tags

    def resume(self, tags: set[str]) -> None:
        with self._lock:
            self._released -= tags

    def set_group(self, name: str, *, is_open: bool) -> None:
        """A process group for distributed updates is there, or is gone."""
        with self._lock:
            (self._groups.add if is_open else self._groups.discard)(name)

    def count_operation(self, operation: str, *, failed: bool) -> None:
        """Weights were read, saved, sent or checked."""
        with self._lock:
            counts = self._operations.get(operation, OperationCounts())
            self._operations[operation] = OperationCounts(
                calls=counts.calls + 1, failures=counts.failures + failed
            )


def _elapsed(started_at: float, ended_at: float) -> float:
    """Seconds between two times of a clock that may have been set back meanwhile."""
    return max(0.0, ended_at - started_at)


def _in_progress(open_: OpenUpdate) -> UpdateInProgress:
    return UpdateInProgress(
        source=open_.source,
        started_at=open_.started_at,
        last_call_at=open_.last_call_at,
        calls=open_.calls,
        failed=open_.failed,
        phase=open_.phase,
        phases=dict(open_.phases),
        nbytes=open_.nbytes,
        idle_seconds=None if open_.bounded or open_.running else IDLE_SECONDS,
    )
