# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Captures what the model runners of a process hold, in one order of steps. Writes nothing."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.arrival import Arrival, arrival, asked_so_far
from sglang_weight_exporter.capture.references import Registrations
from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.records.adapters import Adapters
from sglang_weight_exporter.records.black_box import OutOfMemory, Segment
from sglang_weight_exporter.records.contents import ChangedRows
from sglang_weight_exporter.records.costs import LiveRequests
from sglang_weight_exporter.records.memory import MemoryDump, MemoryOwner
from sglang_weight_exporter.runners import fingerprints
from sglang_weight_exporter.runners.adapters import LoadedAdapters
from sglang_weight_exporter.runners.captures import Captures, RoleCapture
from sglang_weight_exporter.runners.contents import RoleContents
from sglang_weight_exporter.runners.memory import Memory
from sglang_weight_exporter.runners.memory_owners import (
    dump_memory,
    owned_storages,
    pool_owners,
)
from sglang_weight_exporter.runners.out_of_memory import describe_out_of_memory
from sglang_weight_exporter.runners.prefix_cache import cached_tokens
from sglang_weight_exporter.runners.reading import Reading
from sglang_weight_exporter.runners.requests import (
    count_version_events,
    has_live_requests,
    live_requests,
)
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.runners.shares import RoleShares

_Made = TypeVar("_Made")


class ModelRunnerInspector:
    """The captures of all roles of a process.

    ``report`` is called with what could not be read; ``allocations`` is where one allocation ends
    and the next begins, by device, in place of torch's allocator; ``fingerprinter``: takes
    fingerprints, if they are to be taken; ``shares``: of logical tensors too; ``memory``: keeps the
    account of the GPUs; ``registrations``: what torch has registered in modules of the process.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float] = time.time,
        allocations: Callable[[str], Segments] | None = None,
        fingerprinter: Fingerprinter | None = None,
        shares: bool = False,
        memory: Memory | None = None,
        registrations: Registrations | None = None,
    ) -> None:
        self._report = report
        self._clock = clock
        self._allocations = allocations
        #: What torch's allocator has of the GPUs.
        self.memory = memory or Memory(clock=clock)
        self._captures = Captures(
            roles, report=report, clock=clock, registrations=registrations or Registrations()
        )
        #: How long the last capture took.
        self.seconds: float | None = None
        self._fingerprints = (
            None
            if fingerprinter is None
            else fingerprints.RoleFingerprints(
                fingerprinter, report=report, shares=RoleShares(fingerprinter) if shares else None
            )
        )
        self._fingerprinter = fingerprinter
        self._adapters: weakref.WeakKeyDictionary[RunnerRole, LoadedAdapters] = (
            weakref.WeakKeyDictionary()
        )
        self._contents: weakref.WeakKeyDictionary[RunnerRole, RoleContents] = (
            weakref.WeakKeyDictionary()
        )
        #: Whether tensors may be read, and not only where they are.
        self.memory_is_there = True
        self._scheduler: Callable[[], Any] = lambda: None

    @property
    def takes_fingerprints(self) -> bool:
        return self._fingerprints is not None

    def of(self, role: RunnerRole) -> RoleCapture:
        """What is known of a role, without a new capture."""
        return self._captures.of(role)

    def adapters(self, role: RunnerRole) -> Adapters | None:
        """LoRA adapters that are loaded, and the slots that they are in now; ``None``: there are
        none to load, or they could not be read."""
        loaded = self._adapters.get(role)
        try:
            return None if loaded is None else loaded.described(role.runner)
        except Exception as error:
            self._report("adapters", error)
            return None

    def start_over(self, role: RunnerRole, *, known: bool) -> None:
        """Later captures are compared with the last one, or, unless ``known``, with none until the
        next update."""
        fingerprints.start_over(self.of(role), known=known)

    def ignore(self, role: RunnerRole, storages: frozenset[int]) -> None:
        """That tensors in these storages hold other bytes is no news."""
        fingerprints.ignore(self.of(role), storages)

    def map(self, model: object) -> None:
        """A model's tensors were mapped from a weight-cache daemon, where they count."""
        self._captures.map(model)

    def watch(self, scheduler: Any) -> None:
        """Whose prefix cache it is."""
        self._scheduler = weakref.ref(scheduler)

    def nothing_ran_since(self, role: RunnerRole) -> bool:
        """Whether no forward pass has begun since fingerprints of a role were taken: nothing of
        SGLang's has run then that could have written its weights."""
        held, passes = self.of(role), self._passes()
        known = held.weights is not None and held.weights.table.fingerprint != ""
        return known and passes is not None and held.passes == passes

    def _passes(self) -> int | None:
        """How many forward passes the scheduler has begun (``Scheduler.run_batch`` counts)."""
        passes = getattr(self._scheduler(), "forward_ct", None)
        return passes if isinstance(passes, int) else None

    def _forward_stream(self) -> torch.cuda.Stream | None:
        """The stream of forward passes, where they are in one of their own. With overlapped
        scheduling a request is served while the last batch still runs there."""
        stream = getattr(self._scheduler(), "forward_stream", None)
        return stream if isinstance(stream, torch.cuda.Stream) else None

    def cached_tokens(self) -> int | None:
        """Tokens in the prefix cache now; ``None`` where there is none, or it cannot be read."""
        return self._of_scheduler("prefix_cache", cached_tokens)

    def requests(self) -> LiveRequests | None:
        """Requests that run or wait now; ``None`` where there is no scheduler, or it cannot be
        read."""
        return self._of_scheduler("requests", live_requests)

    def has_requests(self) -> bool:
        """Whether one runs or waits now, as far as that can be read."""
        return self._of_scheduler("requests", has_live_requests) or False

    def version_events(self) -> int | None:
        """As :func:`~sglang_weight_exporter.runners.requests.count_version_events`."""
        return self._of_scheduler("requests", count_version_events)

    @property
    def scheduler(self) -> Any:
        """The one that serves requests; ``None``: there is none."""
        return self._scheduler()

    def _of_scheduler(self, where: str, read: Callable[[Any], _Made]) -> _Made | None:
        scheduler = self._scheduler()
        if scheduler is None:
            return None
        try:
            return read(scheduler)
        except Exception as error:
            self._report(where, error)
            return None

    def capture(
        self,
        *roles: RunnerRole,
        loaded: bool = False,
        pools: bool = False,
        fingerprint_seconds: float | None = None,
        written: bool = True,
        reading: Reading | None = None,
    ) -> None:
        """Read pointers and bytes of weights again. What cannot be read becomes absent.

        ``loaded``: a load has just ended, and derived weights are what it has left. ``pools``:
        pools, adapter slots and names of modules may have changed as well.
        ``fingerprint_seconds``: weights may have changed, and their fingerprints may take so long;
        0 where they may not be read. ``written``: by a load or an update; otherwise they should be
        as the last one left them. ``reading``: has begun; what it is of is as it was then.
        """
        started = time.perf_counter()
        on_gpu = _Once(Segments.of_cuda)
        for role in roles:
            segments = self._segments(role.device, on_gpu)
            begun = reading if reading and reading.is_of(role, self.of(role).weights) else None
            if begun is None:
                if not written:
                    self._captures.drop_rebound(role, segments)
                self._captures.capture_weights(role, segments, loaded=loaded, renamed=pools)
            if self._fingerprints is not None and fingerprint_seconds is not None:
                self._fingerprints.take(
                    role,
                    self._captures.known(role),
                    fingerprint_seconds if self.memory_is_there else 0.0,
                    written=written,
                    after=self._forward_stream(),
                    begun=begun is not None,
                )
                self._captures.known(role).passes = begun.passes if begun else self._passes()
            if pools:
                self._captures.capture_pools(role, segments)
                self._capture_adapters(role)
                if fingerprint_seconds is not None:
                    self._keep_contents(role)
        self._captures.drop_collected()
        self.read_memory(on_gpu, thorough=loaded or pools)
        self.seconds = time.perf_counter() - started

    def begin_reading(self, *roles: RunnerRole, written: bool = True) -> Reading | None:
        """Have devices begin to read weights as they are now; ``None`` where that has to be done at
        once.

        ``written``: by an update, and a :meth:`capture` takes what was read. Otherwise
        :meth:`finish_reading` does, and until then nothing may write them but what is put into this
        thread's stream.
        """
        fingerprints = self._fingerprints
        if fingerprints is None or not self.memory_is_there:
            return None
        if not all(map(fingerprints.has_kernels, roles)):
            return None
        on_gpu, after = _Once(Segments.of_cuda), self._forward_stream()
        reading = Reading({role.name: self.of(role).weights for role in roles}, self._passes())
        for role in roles:
            self._captures.capture_weights(role, self._segments(role.device, on_gpu))
        if not (written or all(fingerprints.can_begin_all(role, self.of(role)) for role in roles)):
            return None
        for role in roles:
            held = self._captures.known(role)
            begun = fingerprints.begin(role, held, after)
            if begun is not None and held.weights is not None:
                reading.captures[role], reading.scratch[role] = held.weights, held.scratch
                reading.events.extend(begun)
            elif not written:
                reading.wait()  # Nobody would know of it.
                return None
        return reading

    def finish_reading(
        self, reading: Reading, fingerprint_seconds: float
    ) -> dict[RunnerRole, WeightCapture]:
        """Compare what was read before an update with what the last one left; what was there, of
        roles of which that is known."""
        known = {}
        for role, weights in reading.captures.items():
            held = self.of(role)
            if self._fingerprints is not None and reading.is_of(role, held.weights):
                self._fingerprints.take(
                    role, held, fingerprint_seconds, written=False, after=None, begun=True
                )
                held.passes = reading.passes
                known[role] = held.weights or weights
        return known

    def without_scratch(
        self, role: RunnerRole, before: WeightCapture, scratch: tuple[str, ...]
    ) -> WeightCapture:
        """A capture from before an update without what has turned out to be no weights since;
        ``scratch``: what was known of that then."""
        held = self.of(role)
        if self._fingerprints is None or held.scratch == scratch:
            return before
        return self._fingerprints.without_scratch(held, before)

    def _keep_contents(self, role: RunnerRole) -> None:
        """What the first update of a role is compared with."""
        weights = self.of(role).weights
        if self._fingerprints is not None and weights is not None:
            contents = self._contents.setdefault(role, RoleContents())
            contents.begin(weights.table, role.runner.model)

    def changed_contents(
        self, role: RunnerRole, before: WeightCapture | None
    ) -> ChangedRows | None:
        """What an update has changed that has just been captured; ``None``: nobody knows."""
        after = self.of(role).weights
        if self._fingerprints is None or before is None or after is None:
            return None
        contents = self._contents.setdefault(role, RoleContents())
        return contents.changes(before.table, after.table, role.runner.model)

    def _capture_adapters(self, role: RunnerRole) -> None:
        loaded = self._adapters.get(role)
        if loaded is None:
            loaded = self._adapters[role] = LoadedAdapters(
                fingerprinter=self._fingerprinter, report=self._report, clock=self._clock
            )
        loaded.capture(role.runner)

    def read_part(
        self, role: RunnerRole, part: int, parts: int, fingerprint_seconds: float
    ) -> bool:
        """Fingerprints of a part of the weights, which nothing has moved since the last capture;
        whether all of them are there now."""
        if self._fingerprints is None:
            return False
        self._captures.drop_rebound(role, self._segments(role.device, Segments.of_cuda))
        held = self._captures.known(role)
        if part == 0:
            held.passes_of_parts = self._passes()
        complete = self._fingerprints.take_part(
            role,
            held,
            fingerprint_seconds if self.memory_is_there else 0.0,
            part=part,
            parts=parts,
            captured_at=self._clock(),
            after=self._forward_stream(),
        )
        if complete:
            held.passes = held.passes_of_parts
        return complete

    def learn_scratch(self, role: RunnerRole) -> None:
        """Forward passes write what was found modified and is no parameter: it is scratch from now
        on, and no news."""
        held = self.of(role)
        names = [name for name, kind in held.modified.items() if kind != "parameter"]
        if names and self._fingerprints is not None:
            before = held.weights
            self._captures.drop_scratch(role, names, self._segments(role.device, Segments.of_cuda))
            self._fingerprints.drop_scratch(held, before)

    def _segments(self, device: str, on_gpu: Callable[[], Segments]) -> Callable[[], Segments]:
        if self._allocations is not None:
            allocations = self._allocations
            return _Once(lambda: allocations(device))
        return on_gpu if device.startswith("cuda") else Segments.none

    def begin_arrival(self) -> Arrival | None:
        """A call begins that receives weights; ``None`` where no device does it by itself."""
        try:
            return arrival(self._clock)
        except Exception as error:
            self._report("arrival", error)
            return None

    def asked_so_far(self) -> torch.cuda.Event | None:
        """The end of what a device was asked for in this thread's stream; ``None``: of nothing."""
        try:
            return asked_so_far()
        except Exception as error:
            self._report("arrival", error)
            return None

    def begin_update(self, *roles: RunnerRole) -> None:
        """Weights are about to be written. What was bound anew since the last capture is scratch,
        and not moved by the update."""
        for role in roles:
            self._captures.drop_rebound(role, self._segments(role.device, Segments.of_cuda))
        try:
            self.memory.begin_update()
        except Exception as error:
            self._report("memory", error)

    def end_update(self) -> None:
        """SGLang goes on, and what it needs from now on is no part of the update."""
        self.read_memory(thorough=False)
        self.memory.end_update()

    def begin_flush(self) -> int | None:
        """The prefix cache is about to be flushed, and with it what torch has cached, maybe in the
        middle of an update. As :meth:`cached_tokens`."""
        try:
            self.memory.note_update()
        except Exception as error:
            self._report("memory", error)
        return self.cached_tokens()

    def read_memory(
        self, segments: Callable[[], Segments] | None = None, *, thorough: bool = True
    ) -> None:
        """Read the account of the GPUs again. ``thorough``: its parts in any case."""
        try:
            self.memory.read(
                segments or Segments.of_cuda,
                lambda: owned_storages(self._captures),
                self._captures.pool_storages,
                thorough=thorough,
            )
        except Exception as error:
            self._report("memory", error)

    def describe_out_of_memory(
        self, *, device: int, requested: int, limit: int, free: int
    ) -> tuple[OutOfMemory, tuple[Segment, ...]]:
        """What held a GPU's memory when an allocation failed, and what torch had of it."""
        return describe_out_of_memory(
            self._captures,
            self.memory,
            at=self._clock(),
            device=device,
            requested=requested,
            limit=limit,
            free=free,
        )

    def pool_owners(self) -> tuple[MemoryOwner, ...]:
        """Pools, adapter slots and tables by address, as of the last captures."""
        return tuple(pool_owners(self._captures))

    def dump_memory(self) -> Callable[[], MemoryDump] | None:
        """torch's memory as it is now, with the names of what is known, to be written down on any
        thread; ``None``: no GPU."""
        return dump_memory(self._captures, at=self._clock())


class _Once(Generic[_Made]):
    """Asked for when it is needed, and not again in the same capture."""

    def __init__(self, make: Callable[[], _Made]) -> None:
        self._make = make
        self._made: list[_Made] = []

    def __call__(self) -> _Made:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]
