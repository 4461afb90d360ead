# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process: one for all ranks of one user on one host, without torch or SGLang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import ProcessCollector

from sglang_weight_exporter.export.endpoint import Endpoint
from sglang_weight_exporter.export.following import Followers
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.manifests import ManifestFollower
from sglang_weight_exporter.export.metadata import MetadataFollower
from sglang_weight_exporter.export.nvml import GpuMemory, GpuWatch, Nvml
from sglang_weight_exporter.export.otlp.pipeline import OtlpPipeline
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.rank_care import RankCare
from sglang_weight_exporter.export.references import ReferenceFollower
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.reader import SnapshotReader, remove_endpoint
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

logger = logging.getLogger("sglang_weight_exporter")


#: How long the start waits for NVML, so that the first scrape has what later ones have.
FIRST_READING_SECONDS = 2.0


class HostReader:
    """What the store of one runtime directory and NVML say of this host. Safe from any thread."""

    def __init__(
        self,
        snapshots: SnapshotReader,
        *,
        gpus: Callable[[], Iterable[GpuMemory]],
        spans: SpanCounts,
        guard: Guard,
        followers: Followers,
        simulated: bool,
    ) -> None:
        self._snapshots = snapshots
        self._gpus = gpus
        self._accounts = GpuAccounts()
        self._spans = spans
        self._guard = guard
        self._followers = followers
        #: By model and engine; whoever looks after the ranks counts them.
        self.died_in_update: Counter[tuple[str, str]] = Counter()
        self._simulated = simulated
        self._started_at = time.time()
        self._reading = threading.Lock()
        self._served: dict[str, Snapshot] = {}
        #: Ranks of which it was said that they are left out.
        self._doubles: set[str] = set()

    def _distinct(self, snapshots: Sequence[Snapshot]) -> Iterator[Snapshot]:
        """Ranks take other names where their series would be the same (``claim_engine_name``); one
        that could not is left out, because of the same series twice a reader of the text takes
        either or refuses all."""
        first: dict[tuple[str, Ranks], Snapshot] = {}
        for each in sorted(snapshots, key=lambda snapshot: snapshot.started_at):
            first.setdefault((each.engine.name, each.ranks), each)
        doubles = set()
        for each in snapshots:
            other = first[each.engine.name, each.ranks]
            if other is each:
                yield each
                continue
            doubles.add(each.rank_id)
            if each.rank_id not in self._doubles:
                self._snapshots.complain(
                    f"Rank {each.rank_id} says that it is {each.ranks} of engine "
                    f"{each.engine.name}, which rank {other.rank_id} has been for longer, so it is "
                    "left out. Give its engine another port, or stop the other one."
                )
        self._doubles = doubles

    def _annotated(self, snapshot: Snapshot) -> Snapshot:
        """With what this process knows of it: the same object as long as that is the same, so that
        its text is kept."""
        annotated = self._followers.annotated(snapshot)
        kept = self._served.get(snapshot.rank_id)
        if kept != annotated:
            kept = self._served[snapshot.rank_id] = annotated
        return kept

    def read(self) -> HostView:
        with self._reading:  # A scrape, the thread that sends metrics, the care of ranks.
            alive = [snapshot for _, snapshot in self._snapshots.read()]
            snapshots = tuple(self._annotated(snapshot) for snapshot in self._distinct(alive))
            self._served = {each.rank_id: each for each in snapshots}
            gpus: tuple[GpuAccount, ...] = ()
            with self._guard.step("The account of the GPUs"):
                gpus = self._accounts.read(snapshots, self._gpus(), time.monotonic())
            return HostView(
                snapshots=snapshots,
                gpus=gpus,
                unreadable=self._snapshots.unreadable,
                spans=self._spans,
                died_in_update=Counter(self.died_in_update),
                errors=self._guard.errors,
                started_at=self._started_at,
                simulated=self._simulated,
            )


class Exporter:
    """Serves what the store of one runtime directory holds."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        settings: Settings,
        environ: Mapping[str, str],
        lock: FileLock,
        *,
        ends_with_ranks: bool,
        simulated_gpus: Callable[[], Iterable[GpuMemory]] | None = None,
    ) -> None:
        self._runtime_dir = runtime_dir
        spans, guard = SpanCounts(), Guard()
        gpus = simulated_gpus
        if gpus is None:
            watch = GpuWatch(Nvml(guard))
            watch.start(FIRST_READING_SECONDS)
            gpus = watch.read
        snapshots = SnapshotReader(runtime_dir, on_unreadable=logger.warning)
        self._followers = Followers(
            ReferenceFollower(snapshots, settings.reference_dir, environ, guard),
            ManifestFollower(snapshots, settings.manifest_dir, guard),
        )
        host = HostReader(
            snapshots,
            gpus=gpus,
            spans=spans,
            guard=guard,
            followers=self._followers,
            simulated=simulated_gpus is not None,
        )
        self._pipeline = pipeline = OtlpPipeline(
            snapshots,
            settings,
            environ,
            read=host.read,
            counts=spans,
            guard=guard,
            followers=self._followers,
        )
        exposition = Exposition(
            host.read,
            ProcessCollector(registry=None),
            exemplars=lambda: pipeline.exports_spans,
            guard=guard,
            metrics=settings.metrics,
        )
        self._endpoint = Endpoint(runtime_dir, settings, environ, exposition)
        self._care = RankCare(
            runtime_dir,
            lock,
            ends_with_ranks=ends_with_ranks,
            pipeline=pipeline,
            metadata=MetadataFollower(snapshots, settings.metadata_dir, guard),
            read=host.read,
            guard=guard,
            died_in_update=host.died_in_update,
            is_ours=self._endpoint.is_ours,
        )
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal comes, or no rank has been alive for a while."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._pipeline.start()
        self._followers.start()
        tasks = [
            asyncio.create_task(run)
            for run in (self._endpoint.serve(), self._care.run(), self._stop.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pipeline.stop()
            with contextlib.suppress(OSError):
                remove_endpoint(self._runtime_dir)


class AlreadyServedError(Exception):
    """Another exporter process serves this runtime directory."""


def serve(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    lock_descriptor: int | None = None,
    simulated_gpus: Callable[[], Iterable[GpuMemory]] | None = None,
) -> None:
    """Run the exporter process. Raises :class:`RuntimeDirError`, :class:`AlreadyServedError`.

    ``lock_descriptor``: the exporter's lock, handed down by the rank that started this process;
    such a process ends with the ranks. Without it the lock is taken here and kept.
    ``simulated_gpus``: of ranks that do not exist; takes the place of NVML.
    """
    runtime_dir = RuntimeDir.open(settings.runtime_dir, environ)
    lock = FileLock(runtime_dir.exporter_lock)
    if lock_descriptor is not None:
        lock.adopt(lock_descriptor)
    elif not lock.acquire():
        raise AlreadyServedError(
            f"Another exporter process serves {runtime_dir.path} already. Stop it, or have ranks "
            "start none (SGLANG_WEIGHT_EXPORTER_SERVE=off) and run this one first."
        )

    async def run() -> None:
        await Exporter(
            runtime_dir,
            settings,
            environ,
            lock,
            ends_with_ranks=lock_descriptor is not None,
            simulated_gpus=simulated_gpus,
        ).run()

    _raise_descriptor_limit()
    asyncio.run(run())


def _raise_descriptor_limit() -> None:
    """To the hard limit: the soft one, 1,024 for the sake of select(2), is met by idle clients."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
