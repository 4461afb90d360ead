# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The prefix cache, whose keys and values are those of the weights that computed them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec

from sglang_weight_exporter.ledger.open_update import Verdict
from sglang_weight_exporter.records.pools import PAUSES, CacheCounts, Pause


class PrefixCache:
    """Flushes, pauses, and whether the cache holds what old weights have computed.

    ``cached_tokens``: how many tokens it holds now, ``None`` where that is not known; asked when
    weights have been written.
    """

    def __init__(
        self,
        lock: threading.RLock,
        *,
        clock: Callable[[], float],
        cached_tokens: Callable[[], int | None],
    ) -> None:
        self._lock = lock
        self._clock = clock
        self._cached_tokens = cached_tokens
        self._counts: CacheCounts | None = None

    def start(self) -> None:
        """There is a scheduler, which has one."""
        with self._lock:
            self._counts = CacheCounts(pauses=dict.fromkeys(PAUSES, 0))

    @property
    def counts(self) -> CacheCounts | None:
        """Flushes and pauses; ``None`` where no scheduler serves requests."""
        with self._lock:
            # What was left behind may have been evicted, or thrown away without a flush.
            if self._counts is not None and self._counts.stale and self._cached_tokens() == 0:
                self._change(stale=False)
            return self._counts

    def mark_stale(self, verdict: Verdict) -> None:
        """Weights were written; what the cache holds now is the old ones'."""
        if verdict.effect == "unchanged" or self._counts is None:
            return
        tokens = self._cached_tokens()
        if tokens is not None:
            self._change(stale=tokens > 0)
        elif not self._counts.stale:
            self._change(stale=None)

    def flush(self, *, succeeded: bool) -> None:
        """The cache was to be flushed, and is empty, or SGLang refused."""
        with self._lock:
            counts = self._counts
            if counts is None:
                return
            if succeeded:
                self._change(flushes=counts.flushes + 1, flushed_at=self._clock(), stale=False)
            else:
                self._change(failures=counts.failures + 1)

    def pause(self, how: Pause) -> None:
        """Generation was interrupted. One that aborts all holds the requests that come in front of
        the scheduler, which has none and is not paused."""
        with self._lock:
            counts = self._counts
            if counts is not None:
                pauses = {**counts.pauses, how: counts.pauses.get(how, 0) + 1}
                self._change(pauses=pauses, paused=counts.paused or how != "abort")

    def continue_generation(self) -> None:
        """Generation goes on."""
        with self._lock:
            self._change(paused=False)

    def _change(self, **changes: Any) -> None:
        if self._counts is not None:
            self._counts = msgspec.structs.replace(self._counts, **changes)
