# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Once a second: what dead ranks left goes, and after the last rank the exporter process ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.metadata import MetadataFollower
from sglang_weight_exporter.export.otlp.pipeline import OtlpPipeline
from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.store.ended import keep, read_ended
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.reader import (
    RankDirectory,
    keep_from_cleaners,
    rank_directories,
    read_endpoint,
)
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, RuntimeDirError

logger = logging.getLogger("sglang_weight_exporter")

#: How long the exporter that ranks started stays after the last of them: an engine that starts
#: again finds its endpoint still there, and a host without engines is left alone soon.
LINGER_SECONDS = 10.0

#: Between two passes over the ranks.
PASS_SECONDS = 1.0

#: How long an exporter that somebody has started sees no rank before it says so. Loading SGLang and
#: its weights takes minutes, its hooks publish before that.
UNSEEN_SECONDS = 600.0

#: Between two times at which files are kept from cleaners, who count in days.
TOUCH_SECONDS = 3600.0


_UNSEEN = (
    "No rank has published anything in %s for %d s. If SGLang runs, its hooks are not loaded, or "
    "it has another SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR: in its container look at PYTHONPATH "
    "(another sitecustomize in front of ours?) and at its log for lines of sglang_weight_exporter."
)


class RankCare:
    """Looks after the ranks of a runtime directory.

    ``lock``: the exporter's. ``ends_with_ranks``: whether ranks have started this process.
    ``read``: makes a view of the host; the most in use of a GPU is what these have seen.
    ``died_in_update``: counted here, by model and engine. ``is_ours``: whether it is this process
    that says so of itself.
    """

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        lock: FileLock,
        *,
        ends_with_ranks: bool,
        pipeline: OtlpPipeline,
        metadata: MetadataFollower,
        read: Callable[[], object],
        guard: Guard,
        died_in_update: Counter[tuple[str, str]],
        is_ours: Callable[[ExporterEndpoint], bool],
    ) -> None:
        self._runtime_dir = runtime_dir
        self._lock = lock
        self._ends_with_ranks = ends_with_ranks
        self._pipeline = pipeline
        self._metadata = metadata
        self._read = read
        self._guard = guard
        self._died_in_update = died_in_update
        #: Ranks that have ended and are counted: what they left may not go.
        self._counted: set[str] = set()
        self._is_ours = is_ours
        self._strange_lock = False
        self._touched_at = -TOUCH_SECONDS

    async def run(self) -> None:
        """Returns when the exporter process has to end."""
        alone_since = began = time.monotonic()
        waiting = not self._ends_with_ranks
        while True:
            alive = True
            with self._guard.step("A pass over the ranks"):
                alive = await self._pass()
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
            if waiting and (alive or now - began >= UNSEEN_SECONDS):
                waiting = False
                if not alive:
                    logger.warning(_UNSEEN, self._runtime_dir.path, int(now - began))
            await asyncio.sleep(PASS_SECONDS)

    async def _pass(self) -> bool:
        """Whether any rank is alive, as far as is known; what dead ones left is removed."""
        if time.monotonic() - self._touched_at >= TOUCH_SECONDS:
            self._touched_at = time.monotonic()
            with self._guard.step("Keeping files from cleaners"):
                await asyncio.to_thread(keep_from_cleaners, self._runtime_dir)
        alive = False
        try:
            for directory in rank_directories(self._runtime_dir):
                lives = True
                with self._guard.step(f"Looking after the rank {directory.rank_id!r}"):
                    lives = self._care_for(directory)
                alive |= lives
                await asyncio.sleep(0)  # Thousands that are dead keep no scrape waiting.
        except OSError:
            alive = True  # Not known to be none. SnapshotReader counts it and says it.
        with self._guard.step("Keeping weights_metadata files"):
            await asyncio.to_thread(self._metadata.follow)
        await asyncio.to_thread(self._read)
        return alive

    def _care_for(self, directory: RankDirectory) -> bool:
        """Whether the rank is alive; what a dead one left is removed."""
        try:
            self._pipeline.discard(directory)
            if directory.is_alive():
                return True
            self._count(directory)
            if self._pipeline.is_done_with(directory):
                self._put_away(directory)
        except FileNotFoundError:
            pass  # It has gone meanwhile.
        return False

    def _count(self, directory: RankDirectory) -> None:
        """At once: what a dead rank left may wait for a collector."""
        if directory.rank_id not in self._counted:
            self._counted.add(directory.rank_id)
            ended = read_ended(directory)
            if ended is not None and ended.doing.updates:
                engine = ended.known.engine
                self._died_in_update[engine.model_name, engine.name] += 1

    def _put_away(self, directory: RankDirectory) -> None:
        """What a dead rank left goes; unless it reports an end that somebody will ask about."""
        ended = read_ended(directory)
        if ended is not None:
            logger.warning("%s. `sglang-weight-exporter status --last` says more.", ended)
            with contextlib.suppress(OSError):
                keep(self._runtime_dir, directory)
                return
        directory.remove()

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
            if self._lock.acquire():
                self._strange_lock = False
                return True
        except (OSError, RuntimeDirError):
            return True  # Not now, perhaps later; nobody else can have it either.
        other = read_endpoint(self._runtime_dir)
        if other is not None and not self._is_ours(other):
            return False
        if not self._strange_lock:
            self._strange_lock = True
            logger.warning(
                "%s is locked by something that is no exporter, such as a rank whose lock was "
                "linked or moved there. This process serves as before. Remove that file.",
                self._runtime_dir.exporter_lock,
            )
        return True
