# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not exist, for ``serve --simulate ENGINESxRANKS``.

To try dashboards, rules and a collector in seconds, without SGLang and without a GPU. What SGLang
would do and what its memory would be is made up here. The account of it is kept by the
ledger and written through the store, as a rank's is, so that a reader finds no difference:
the model's name begins with ``simulated/``, and the exporter says so in its build info.

:class:`Simulation` reads no clock: it plays all that happens up to a moment, and the same seed
plays the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import logging
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.ledger import Ledger, Verdict
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.simulation.rank import MODEL, SimulatedRank, weights_of
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

logger = logging.getLogger("sglang_weight_exporter")


#: Lived through before the start, so that a reader finds engines that are loaded.
WARM_UP_SECONDS = 60.0

#: From one version of the weights to the next, and from the start to the first. All engines of the
#: fleet follow, each a second after the one before it.
ROUND_SECONDS, FIRST_SECONDS = 30.0, 5.0

#: Every so many of an engine's reloads fails, and every so many moves its tensors; the engines
#: take turns, so one of them is behind the others.
FAILS_EVERY, MOVES_EVERY = 5, 7

#: How each engine of the fleet is updated, in turn.
_SOURCES: tuple[Source, ...] = ("disk", "distributed", "tensor", "ipc")

#: Calls that load one version: a bucket each, the disk's all at once.
_CALLS: dict[Source, int] = {"disk": 1, "distributed": 4, "tensor": 4, "ipc": 2}


class Simulation:
    """Engines that live from a moment on. ``start``, ``now``: Unix seconds.

    Raises ``OSError`` where the runtime directory cannot be written.
    """

    def __init__(
        self, runtime_dir: RuntimeDir, engines: int, ranks: int, *, start: float, seed: int = 0
    ) -> None:
        self._now = start - WARM_UP_SECONDS

        def clock() -> float:
            return self._now

        self._ranks: list[SimulatedRank] = []
        #: When the life of an engine goes on; the number decides between equal times.
        self._next: list[tuple[float, int, Iterator[float]]] = []
        for number in range(engines):
            facts = f"{seed}|{start}|{number}"
            engine = Engine(
                name=str(30000 + number),
                instance=hashlib.sha256(facts.encode()).hexdigest()[:16],
                model_name=MODEL,
                model_path=MODEL,
                sglang_version="0.5.23",
                torch_version="2.11.0",
            )
            mine = [
                SimulatedRank(runtime_dir, engine, tp, number, number * ranks + tp, clock)
                for tp in range(ranks)
            ]
            chance = random.Random(f"{seed}|{number}")  # noqa: S311 (no secret comes of it)
            self._ranks += mine
            self._next.append((self._now, number, _life(mine, number, chance, start, clock)))
        self.advance(start)

    def advance(self, now: float) -> float:
        """Play all that happens until ``now``; returns when the next thing happens."""
        while self._next[0][0] <= now:
            moment, number, life = self._next[0]
            self._now = max(self._now, moment)
            heapq.heapreplace(self._next, (next(life), number, life))
        return self._next[0][0]

    def gpus(self) -> list[GpuMemory]:
        """Their GPUs, as NVML would have them; one a rank."""
        return [rank.gpu() for rank in self._ranks]

    def close(self) -> None:
        """All of them end."""
        for rank in self._ranks:
            rank.store.close()


@contextlib.contextmanager
def simulated_ranks(
    engines: int, ranks: int
) -> Iterator[tuple[Path, Callable[[], list[GpuMemory]]]]:
    """Ranks that live now, in a directory of their own: its path, and what reads their GPUs."""
    # Each holds four files open; the limit is 1,024 by custom, and every process may raise it.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="sglang-weight-exporter-simulated-") as directory:
        runtime_dir = RuntimeDir.open(Path(directory) / "runtime", os.environ)
        simulation = Simulation(runtime_dir, engines, ranks, start=time.time())
        logger.warning(
            "simulated: %d engines of %d ranks that do not exist, in %s; nothing of this is "
            "measured",
            engines,
            ranks,
            runtime_dir.path,
        )
        end = threading.Event()

        def live() -> None:
            while not end.wait(max(0.0, simulation.advance(time.time()) - time.time())):
                pass

        thread = threading.Thread(target=live, name="simulation", daemon=True)
        thread.start()
        try:
            yield runtime_dir.path, simulation.gpus
        finally:
            end.set()
            thread.join()
            simulation.close()


def _life(
    ranks: list[SimulatedRank],
    number: int,
    chance: random.Random,
    start: float,
    clock: Callable[[], float],
) -> Iterator[float]:
    """What happens to one engine; yields the moment until which nothing more does.

    It loads, and then follows every version of the fleet a little after the engine before it.
    Every other engine gives its memory back while it waits, as in reinforcement learning.
    """
    _apply(ranks, lambda ledger: ledger.begin_start())
    loading = [rank.ledger.loads.begin() for rank in ranks]
    yield clock() + chance.uniform(30.0, 45.0)
    for rank, began_at in zip(ranks, loading, strict=True):
        for role in rank.roles:
            rank.ledger.loads.end(role, began_at, model_path=MODEL, weight_version="0")
        rank.ledger.loads.end_start()
        rank.publish()
    source = _SOURCES[number % len(_SOURCES)]
    for version in itertools.count(1):
        yield start + (version - 1) * ROUND_SECONDS + FIRST_SECONDS + number
        releases = number % 2 == 1
        if releases:
            _apply(ranks, lambda ledger: ledger.counters.release({"weights", "kv_cache"}))
            yield clock() + chance.uniform(4.0, 6.0)
            _apply(ranks, lambda ledger: ledger.counters.resume({"weights"}))
        fails, moves = (not (version + number) % every for every in (FAILS_EVERY, MOVES_EVERY))
        for seconds in _reload(ranks, source, version, chance, fails=fails, moves=moves):
            yield clock() + seconds
        if releases:
            _apply(ranks, lambda ledger: ledger.counters.resume({"kv_cache"}))


def _reload(
    ranks: list[SimulatedRank],
    source: Source,
    version: int,
    chance: random.Random,
    *,
    fails: bool,
    moves: bool,
) -> Iterator[float]:
    """One version of the weights comes, or fails to; yields seconds."""
    message = "simulated: the peer went away" if fails else ""
    pauses = source == "tensor"
    if pauses:
        _apply(ranks, lambda ledger: ledger.prefix_cache.pause("retract"))
        yield chance.uniform(1.0, 2.0)
    _apply(
        ranks,
        lambda ledger: ledger.updates.begin_request(flush_cache=True, weight_version=str(version)),
    )
    for call, role in itertools.product(range(_CALLS[source]), ranks[0].roles):
        tokens = [rank.ledger.updates.begin(role, source, ends_with="request") for rank in ranks]
        for rank in ranks:
            if source != "ipc":
                brought = sum(
                    usage.nbytes for usage in weights_of(role) if usage.kind == "parameter"
                )
                rank.ledger.updates.add_bytes(brought // _CALLS[source])
            rank.publish()
        yield chance.uniform(0.4, 1.6)
        failed = fails and call == _CALLS[source] - 1
        verdict = Verdict(False, "undefined", message) if failed else Verdict(True, "changed")
        for rank, token in zip(ranks, tokens, strict=True):
            rank.ledger.updates.finish(token, verdict)
    for rank in ranks:
        rank.place += moves
        rank.content = rank.content if fails else str(version)
    _apply(
        ranks,
        lambda ledger: ledger.updates.end_request(
            succeeded=not fails, message=message, raised=False
        ),
    )
    if pauses:
        _apply(ranks, lambda ledger: ledger.prefix_cache.continue_generation())


def _apply(ranks: list[SimulatedRank], what: Callable[[Ledger], None]) -> None:
    for rank in ranks:
        what(rank.ledger)
        rank.publish()
