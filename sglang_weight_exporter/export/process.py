# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process: one for all ranks of one user on one host, without torch or SGLang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import ProcessCollector

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.authenticator import Authenticator
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts
from sglang_weight_exporter.export.metadata import MetadataFollower
from sglang_weight_exporter.export.nvml import GpuMemory, Nvml
from sglang_weight_exporter.export.otlp.pipeline import OtlpPipeline
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.server import (
    EndpointError,
    MetricsApp,
    Server,
    bind,
    configure,
    url,
)
from sglang_weight_exporter.export.views import HostView, SpanCounts
from sglang_weight_exporter.export.web_configuration import (
    WebConfigurationError,
    WebConfigurationSource,
)
from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.reader import (
    RankDirectory,
    SnapshotReader,
    keep_from_cleaners,
    rank_directories,
    remove_endpoint,
    write_endpoint,
)
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, RuntimeDirError

logger = logging.getLogger("sglang_weight_exporter")

#: How long the exporter that ranks started stays after the last of them: an engine that starts
#: again finds its endpoint still there, and a host without engines is left alone soon.
LINGER_SECONDS = 10.0

#: Between two looks at which ranks are alive.
LOOK_SECONDS = 1.0

#: Between two times at which files are kept from cleaners, who count in days.
TOUCH_SECONDS = 3600.0

#: Between two tries to open the endpoint.
RETRY_SECONDS = 5.0


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
        self._lock = lock
        self._settings = settings
        self._ends_with_ranks = ends_with_ranks
        self._snapshots = SnapshotReader(runtime_dir, on_unreadable=logger.warning)
        self._simulated = simulated_gpus is not None
        self._gpus = simulated_gpus or Nvml().read
        self._accounts = GpuAccounts()
        self._reading = threading.Lock()
        self._spans = SpanCounts()
        self._telemetry = OtlpPipeline(
            runtime_dir, settings, environ, read=self._read, counts=self._spans
        )
        self._metadata = MetadataFollower(runtime_dir, settings.metadata_dir)
        self._exposition = Exposition(
            self._read,
            ProcessCollector(registry=None),
            exemplars=lambda: self._telemetry.exports_spans,
        )
        self._stop = asyncio.Event()
        self._started_at = time.time()
        self._said = ""

    async def run(self) -> None:
        """Serve until a signal comes, or no rank has been alive for a while."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._announce(None, "")
        self._telemetry.start()
        tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._look_after_ranks())]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            self._telemetry.stop()
            with contextlib.suppress(OSError):
                remove_endpoint(self._runtime_dir)

    def _read(self) -> HostView:
        with self._reading:  # A scrape, the thread that sends metrics, the look at GPUs.
            snapshots = tuple(snapshot for _, snapshot in self._snapshots.read())
            return HostView(
                snapshots=snapshots,
                gpus=self._look_at_gpus(snapshots),
                unreadable=self._snapshots.unreadable,
                spans=self._spans,
                started_at=self._started_at,
                simulated=self._simulated,
            )

    def _look_at_gpus(self, snapshots: tuple[Snapshot, ...]) -> tuple[GpuAccount, ...]:
        return self._accounts.read(snapshots, self._gpus(), time.monotonic())

    async def _serve(self) -> None:
        access = Authenticator()
        application = MetricsApp(self._exposition, access)
        web = WebConfigurationSource(self._settings)
        predecessor_may_leave = True
        while True:
            try:
                configuration = web.read()
                listener = bind(self._settings)
            except (EndpointError, WebConfigurationError) as error:
                if predecessor_may_leave:
                    # An exporter whose directory was removed finds out within a look.
                    predecessor_may_leave = False
                    await asyncio.sleep(2 * LOOK_SECONDS)
                    continue
                without = " No metrics are served until that changes."
                self._announce(None, f"{error}{without * isinstance(error, WebConfigurationError)}")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            access.use(configuration)
            self._announce(url(self._settings, tls=access.tls is not None), "")
            server = asyncio.create_task(Server(configure(application, access), listener).run())
            following = asyncio.create_task(self._follow(web, access))
            try:
                done, _ = await asyncio.wait(
                    [server, following], return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
            finally:
                following.cancel()
                server.cancel()
                await asyncio.gather(server, following, return_exceptions=True)
                listener.close()

    async def _follow(self, web: WebConfigurationSource, access: Authenticator) -> None:
        """Have each change of the web configuration and its certificates in force."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not await asyncio.to_thread(web.has_changed):
                continue
            try:
                access.use(await asyncio.to_thread(web.read))
                logger.info("The web configuration has changed and was read again.")
                problem = ""
            except WebConfigurationError as error:
                problem = f"{error} What was read before stays in force."
            self._announce(url(self._settings, tls=access.tls is not None), problem)

    def _announce(self, address: str | None, problem: str) -> None:
        """Say where the metrics are, or why they are not: in the log once, and for ``status``."""
        line = problem or (address and f"metrics are at {address}") or ""
        if line and line != self._said:
            logger.log(logging.WARNING if problem else logging.INFO, line)
        self._said = line
        record = ExporterEndpoint(
            pid=os.getpid(),
            started_at=self._started_at,
            version=__version__,
            url=address,
            problem=problem,
        )
        with contextlib.suppress(OSError):  # A full disk: `status` knows less, nothing else does.
            write_endpoint(self._runtime_dir, record)

    def _owns_the_directory(self) -> bool:
        """Whether the lock that is held is the one that others would take. After the directory
        was removed, one that somebody has started takes the new one; ranks start another."""
        if self._lock.is_current():
            return True
        if self._ends_with_ranks:
            return False
        self._lock.close()
        try:
            RuntimeDir.open(self._runtime_dir.path, {})
            return self._lock.acquire()
        except (OSError, RuntimeDirError):
            return True  # Not now, perhaps later; nobody else can have it either.

    async def _look_after_ranks(self) -> None:
        """Remove what dead ranks left, and end some time after the last one."""
        alone_since = time.monotonic()
        touched_at = -TOUCH_SECONDS
        while True:
            alive = False
            if time.monotonic() - touched_at >= TOUCH_SECONDS:
                await asyncio.to_thread(keep_from_cleaners, self._runtime_dir)
                touched_at = time.monotonic()
            try:
                for directory in rank_directories(self._runtime_dir):
                    alive |= self._look_after(directory)
                    await asyncio.sleep(0)  # Thousands that are dead keep no scrape waiting.
            except OSError:
                alive = True  # Not known to be none. SnapshotReader counts it and says it.
            await asyncio.to_thread(self._metadata.follow)
            # The most in use is what the looks between two scrapes have seen.
            await asyncio.to_thread(self._read)
            if not self._owns_the_directory():
                logger.warning(
                    "%s was removed, so this process ends: whoever makes it anew serves it.",
                    self._runtime_dir.path,
                )
                return
            now = time.monotonic()
            if alive or not self._ends_with_ranks:
                alone_since = now
            elif now - alone_since > LINGER_SECONDS:
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _look_after(self, directory: RankDirectory) -> bool:
        """Whether the rank is alive; what a dead one left is removed."""
        try:
            self._telemetry.discard(directory)
            if directory.is_alive():
                return True
            if self._telemetry.is_done_with(directory):
                directory.remove()
        except OSError:
            pass  # Nothing this time.
        return False


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
