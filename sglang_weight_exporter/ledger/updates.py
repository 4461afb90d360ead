# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Updates: calls that write weights, and the sessions, requests and rebalances that end them.

A call is begun and finished (:meth:`Updates.begin`, :meth:`Updates.finish`); one call or several
are an update. All of its time goes to one phase or another, so that they sum to its duration. An
update of several ends in one of three ways, whichever SGLang's release offers: the end of its
session (0.5.21 and later), a request that asks for the cache to be flushed, or, for clients that
never ask, that generation goes on or no call has come for :data:`IDLE_SECONDS` (a heuristic).

A role has two updates at a time at most: one that somebody asked for, and one of experts that move
between ranks, which goes on between and inside forward passes whatever else happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_weight_exporter.ledger.open_update import (
    IDLE_SECONDS,
    CallToken,
    EndsWith,
    OpenUpdate,
    Verdict,
    elapsed,
)
from sglang_weight_exporter.ledger.prefix_cache import PrefixCache
from sglang_weight_exporter.ledger.roles import RoleAccount, RoleAccounts
from sglang_weight_exporter.records.updates import Phase, Source


@dataclass
class _Request:
    """A request of the scheduler that is being served."""

    source: Source | None
    number: int
    flush_cache: bool
    weight_version: str
    selector: str
    began_at: float
    #: SGLang could not flush the cache after the weights were written.
    flush_refused: bool = False
    #: Updates that it has come to a call of, of any role.
    updates: list[OpenUpdate] = field(default_factory=list)

    def wrote(self, update: OpenUpdate) -> bool:
        """Whether a call of the update is of this request, and has ended."""
        return update.calls > 0 and update in self.updates

    def missed(self, role: str, update: OpenUpdate) -> bool:
        """Whether it was to write this role (``_select_runners``), and another's call failed."""
        asked = self.selector in {"all", "target" if role == "target" else "draft"}
        return asked and bool(self.updates) and update not in self.updates


class Updates:
    """Updates of all roles of one process.

    ``thread``: identifies the one that calls. ``prefix_cache``: is stale once weights are written.
    """

    def __init__(
        self, roles: RoleAccounts, prefix_cache: PrefixCache, *, thread: Callable[[], int]
    ) -> None:
        self._roles = roles
        self._prefix_cache = prefix_cache
        self._lock = roles.lock
        self._clock = roles.clock
        self._thread = thread
        self._requests: dict[int, _Request] = {}
        #: Thread → the call by which experts are being moved on it right now.
        self._moving: dict[int, CallToken] = {}
        #: Thread → updates of which a call is running on it, the innermost last.
        self._running: dict[int, list[OpenUpdate]] = {}
        self._rebalancing = False
        #: Calls of SGLang's own since the first runner's session began.
        self._session_calls = 0

    # What goes on.

    @property
    def in_session(self) -> bool:
        """Whether a session of any role goes on."""
        with self._lock:
            return any(role.update and role.update.session for role in self._roles.by_name.values())

    @property
    def in_progress(self) -> bool:
        """Whether an update of any role has begun and not ended."""
        with self._lock:
            return any(role.open for role in self._roles.by_name.values())

    def is_in_progress(self, role: str) -> bool:
        """Whether an update of this role has begun and not ended."""
        with self._lock:
            return role in self._roles.by_name and bool(self._roles[role].open)

    @property
    def running(self) -> bool:
        """Whether a call that writes weights is running on any thread."""
        return any(self._running.values())

    @property
    def writing(self) -> bool:
        """Whether a call that writes weights is running on this thread."""
        return bool(self._running.get(self._thread()))

    @property
    def reading_all(self) -> bool:
        """Whether the call on this thread reads whole files: of experts that moved and are read
        again, it takes some tensors out of the checkpoint."""
        running = self._running.get(self._thread(), [])
        return bool(running) and running[-1].source != "eplb"

    # Calls that write weights.

    def begin(
        self, name: str, source: Source, *, ends_with: EndsWith, since: float | None = None
    ) -> CallToken:
        """A call is about to write weights: a whole update, or one part of it. ``since``: when the
        capture of what is there before it began."""
        with self._lock:
            if self._thread() in self._moving:
                # Missing experts that are read from disk again, and the like.
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
            role.count(token.source, calls=role.updates[token.source].calls + 1)
            if not token.moves and (open_.source is None or token.source != "external"):
                open_.source = token.source
            if not token.moves and token.source != "external":
                self._session_calls += 1
            open_.record(verdict, self._clock())
            if not token.moves:  # Experts that move are the same experts.
                self._prefix_cache.mark_stale(verdict)
            served = token.ends_with == "request" and self._thread() in self._requests
            if token.opened and token.ends_with != "later" and not served:
                self._roles.finish(token.role, open_, at=open_.last_call_at)

    def begin_receiving(self, name: str, source: Source) -> None:
        """Tensors arrive, to be loaded by further calls; of this role or, where it is in no
        session, perhaps of others alone."""
        with self._lock:
            self._finish_other(name, self._roles[name].update, source)
            if (open_ := self._roles[name].update) is not None:
                open_.begin_receiving(source, self._clock())

    def fail_receiving(self, name: str, source: Source, message: str) -> None:
        """They did not arrive."""
        with self._lock:
            open_ = self._roles[name].update
            self._session_calls += 1
            if open_ is not None:
                self._note_call(open_)
                open_.source = source
                open_.record(Verdict(False, "unchanged", message), self._clock())

    def add_bytes(self, nbytes: int) -> None:
        """What the call that is running on this thread brings is so large."""
        with self._lock:
            for open_ in self._running.get(self._thread(), [])[-1:]:
                open_.incoming_bytes = (open_.incoming_bytes or 0) + nbytes

    def _note_call(self, open_: OpenUpdate) -> None:
        request = self._requests.get(self._thread())
        if request is not None:
            request.updates.append(open_)

    def _begin(
        self, name: str, source: Source, ends_with: EndsWith, since: float | None = None
    ) -> CallToken:
        role = self._roles[name]
        moves = source == "eplb"
        self._finish_other(name, role.rebalance if moves else role.update, source)
        open_ = role.rebalance if moves else role.update
        now = self._clock()
        opened = open_ is None
        if open_ is None:
            bounded = moves and self._rebalancing
            open_ = self._open(role, source, now, bounded=bounded, since=since)
        self._note_call(open_)
        open_.running += 1
        open_.coming = source
        open_.set_phase("load", now)
        self._running.setdefault(self._thread(), []).append(open_)
        return CallToken(name, source, ends_with, opened, open_, moves)

    def _finish_other(self, name: str, open_: OpenUpdate | None, source: Source) -> None:
        """End an update that a call of this source is no part of, because nobody reports its
        end."""
        if open_ is None or open_.session or open_.running:
            return
        if open_.source != source or open_.is_idle(self._clock()):
            self._roles.finish(name, open_)

    def finish_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """End those that no call has come to for so long, and whose end nobody reports."""
        with self._lock:
            for name, role in self._roles.by_name.items():
                if role.update is not None and role.update.is_idle(self._clock(), seconds):
                    self._roles.finish(name, role.update)

    def _open(
        self,
        role: RoleAccount,
        source: Source | None,
        now: float,
        *,
        bounded: bool,
        since: float | None = None,
    ) -> OpenUpdate:
        request = None if source == "eplb" else self._requests.get(self._thread())
        open_ = OpenUpdate(
            source=source,
            number=self._roles.next_number() if request is None else request.number,
            started_at=now if since is None else since,
            last_call_at=now,
            session=source is None,
            bounded=bounded,
            weight_version="" if request is None else request.weight_version,
            phase_since=now,
        )
        if since is not None:
            open_.add_time("capture", elapsed(since, now))
        if source == "eplb":
            role.rebalance = open_
        else:
            role.update = open_
        return open_

    # Where their time goes.

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
                open_.divert_time(phase, since, self._clock())

    def receive_until(self, at: float) -> None:
        """The device has what the last call has put into its stream since this time only."""
        with self._lock:
            for role in self._roles.by_name.values():
                if role.update is not None and role.update.source == "distributed":
                    role.update.receive_until(at)

    def begin_flush(self) -> None:
        """The cache is about to be flushed: where a request asks for it, that is part of the
        updates that it has a call in."""
        with self._lock:
            request = self._requests.get(self._thread())
            for role in self._roles.by_name.values():
                if request and role.update and request.wrote(role.update):
                    role.update.set_phase("flush", self._clock())

    def end_flush(self, *, succeeded: bool) -> None:
        with self._lock:
            request = self._requests.get(self._thread())
            if request is not None and not succeeded:
                request.flush_refused = True
            for role in self._roles.by_name.values():
                if role.update is not None and role.update.phase == "flush":
                    role.update.set_phase("wait", self._clock())

    # Sessions: an update with a beginning and an end, and any number of calls between.

    def begin_session(self, name: str, *, since: float | None = None) -> None:
        """It unpacks weights first. ``since``: as in :meth:`begin`."""
        with self._lock:
            # Also a session that came to nothing, because another runner's could not begin.
            self._roles.finish_updates(name)
            if not self.in_session:
                # And a bucket for a runner that was in none: SGLang has one session at a time.
                self._roles.finish_updates(*self._roles.by_name)
                self._session_calls = 0
            opened = self._open(self._roles[name], None, self._clock(), bounded=True, since=since)
            opened.phase = "post_process"

    def abandon_session(self, name: str) -> None:
        """It could not begin: quantized weights are unpacked in place, perhaps some of them."""
        with self._lock:
            self._roles.finish_updates(name)

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
                self._prefix_cache.mark_stale(broken)
            elif run_post_load and not self._session_calls and not open_.calls:
                # Nothing came through SGLang: a peer wrote into the tensors (RDMA), of each role.
                open_.source = "p2p"
                role.count("p2p", calls=role.updates["p2p"].calls + 1)
                open_.record(Verdict(True, "changed"), self._clock())
                self._prefix_cache.mark_stale(Verdict(True, "changed"))
            if open_.calls:
                open_.last_call_at = self._clock()
            self._roles.finish(name, open_, at=self._clock())
            if error:
                reopened = self._open(self._roles[name], None, self._clock(), bounded=True)
                reopened.source = open_.source

    # Requests: where updates of several calls or roles end.

    def begin_request(
        self,
        *,
        flush_cache: bool,
        weight_version: str,
        source: Source | None = None,
        selector: str = "all",
    ) -> None:
        """The scheduler serves a request to update weights. ``selector``: of which runners."""
        with self._lock:
            for name, role in self._roles.by_name.items():
                open_ = role.update
                if (
                    open_ is not None
                    and not open_.session
                    and weight_version
                    and open_.weight_version not in {"", weight_version}
                ):
                    self._roles.finish(name, open_)
            self._requests[self._thread()] = _Request(
                source,
                self._roles.next_number(),
                flush_cache,
                weight_version,
                selector,
                began_at=self._clock(),
            )

    def end_request(self, *, succeeded: bool, message: str, raised: bool) -> None:
        """It is answered, or has raised, which ends the engine."""
        with self._lock:
            request = self._requests.pop(self._thread(), None)
            if request is None:
                return
            now = self._clock()
            open_updates = [
                (name, role.update)
                for name, role in self._roles.by_name.items()
                if role.update is not None
            ]
            # What follows the writing failed: of a target whose draft then failed as well.
            unflushed = request.flush_refused or not any(open_.failed for _, open_ in open_updates)
            for name, open_ in open_updates:
                wrote = request.wrote(open_)
                if not succeeded and unflushed and wrote and not open_.broken:
                    open_.refused, open_.message = True, message
                elif open_.session and (raised or (not succeeded and request.missed(name, open_))):
                    open_.miss(message)
                if open_.session and not (raised and open_.calls):
                    continue
                if request.weight_version and open_.effect == "changed":
                    open_.weight_version = request.weight_version
                    self._roles.weight_version = request.weight_version
                if not succeeded or request.flush_cache or open_.source in {"disk", "ipc"}:
                    self._roles.finish(name, open_, at=now if wrote else None)
            ended = raised and any(open_.session and open_.calls for _, open_ in open_updates)
            if not (succeeded or request.updates or ended) and request.source is not None:
                self._refuse(request, request.source, message, now)

    def _refuse(self, request: _Request, source: Source, message: str, now: float) -> None:
        """SGLang refused a request before any weights were touched: a failure of the first role,
        which is the target."""
        for name in list(self._roles.by_name)[:1]:
            refused = OpenUpdate(
                source=source,
                number=request.number,
                started_at=request.began_at,
                last_call_at=now,
                refused=True,
                message=message,
                phases={"wait": elapsed(request.began_at, now)},
            )
            self._roles.count_refused(name, refused)

    def change_version(self, version: str) -> None:
        """SGLang took note of a new weight version."""
        with self._lock:
            self._roles.weight_version = version
            for role in self._roles.by_name.values():
                if role.update is not None:
                    role.update.weight_version = version

    def abort(self, message: str) -> None:
        """The process is about to end, whatever goes on."""
        with self._lock:
            for name, role in self._roles.by_name.items():
                for open_ in role.open:
                    open_.abort(message)
                    self._roles.finish(name, open_, at=self._clock())

    # Experts that move between ranks.

    def begin_rebalance(self) -> None:
        """All moves until its end are one update."""
        with self._lock:
            self._rebalancing = True

    def end_rebalance(self) -> None:
        with self._lock:
            self._rebalancing = False
            for name, role in self._roles.by_name.items():
                if role.rebalance is not None:
                    self._roles.finish(name, role.rebalance)

    def begin_move(self, name: str) -> CallToken | None:
        """Some layers' experts move; ``None`` inside another move of this thread."""
        with self._lock:
            if self._thread() in self._moving:
                return None
            token = self._begin(name, "eplb", "later" if self._rebalancing else "call")
            self._moving[self._thread()] = token
            return token
