# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is counted beside loads and updates, and which memory is released."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from sglang_weight_exporter.records.fingerprints import During, FingerprintCounts, Skip
from sglang_weight_exporter.records.updates import OperationCounts
from sglang_weight_exporter.records.weights import Kind


class Counters:
    """Operations, update groups, fingerprints, and tags of the memory saver."""

    def __init__(self, lock: threading.RLock, *, clock: Callable[[], float]) -> None:
        self._lock = lock
        self._clock = clock
        self._operations: dict[str, OperationCounts] = {}
        #: Operations that run → when each of them began.
        self._running: dict[str, list[float]] = {}
        self._groups: set[str] = set()
        self._released: set[str] = set()
        #: ``None``: torch does not report them.
        self._out_of_memory: int | None = None
        #: By role; they belong to the process and outlive its runners.
        self._skipped: dict[str, Counter[Skip]] = {}
        self._modified: dict[str, dict[During, Counter[Kind]]] = {}

    def begin_operation(self, operation: str) -> None:
        """Weights are about to be read, saved, sent or checked, or an update group to be made,
        which may wait for others."""
        with self._lock:
            self._running.setdefault(operation, []).append(self._clock())

    def end_operation(self, operation: str, *, failed: bool) -> None:
        with self._lock:
            began = self._running.get(operation, [])
            if began:
                began.pop()
            if not began:
                self._running.pop(operation, None)
            counts = self._operations.get(operation, OperationCounts())
            self._operations[operation] = OperationCounts(
                calls=counts.calls + 1, failures=counts.failures + failed
            )

    @property
    def running(self) -> dict[str, float]:
        """Operations that have begun and not ended, and since when."""
        with self._lock:
            return {operation: min(began) for operation, began in self._running.items()}

    @property
    def operations(self) -> dict[str, OperationCounts]:
        with self._lock:
            return dict(self._operations)

    def set_group(self, name: str, *, is_open: bool) -> None:
        """A process group for distributed updates is there, or is gone."""
        with self._lock:
            (self._groups.add if is_open else self._groups.discard)(name)

    @property
    def update_groups(self) -> int:
        return len(self._groups)

    def release(self, tags: set[str]) -> None:
        """Physical memory goes, addresses stay."""
        with self._lock:
            self._released |= tags

    def resume(self, tags: set[str]) -> None:
        with self._lock:
            self._released -= tags

    @property
    def released(self) -> frozenset[str]:
        """Tags of the memory saver whose physical memory is given back now."""
        with self._lock:
            return frozenset(self._released)

    def watch_out_of_memory(self) -> None:
        """From now on torch reports its out-of-memory errors."""
        with self._lock:
            self._out_of_memory = self._out_of_memory or 0

    def count_out_of_memory(self) -> None:
        with self._lock:
            self._out_of_memory = (self._out_of_memory or 0) + 1

    @property
    def out_of_memory(self) -> int | None:
        """CUDA out-of-memory errors that torch has raised; ``None``: nobody would know."""
        return self._out_of_memory

    def count_skipped(self, role: str, reason: Skip) -> None:
        """A fingerprint was not taken."""
        with self._lock:
            self._skipped.setdefault(role, Counter())[reason] += 1

    def count_modified(self, role: str, during: During, kinds: Iterable[Kind]) -> None:
        """Tensors of these kinds hold other bytes than the last load or update left in them."""
        with self._lock:
            self._modified.setdefault(role, {}).setdefault(during, Counter()).update(kinds)

    def fingerprints(self, role: str) -> FingerprintCounts:
        with self._lock:
            modified = self._modified.get(role, {})
            return FingerprintCounts(
                skipped=dict(self._skipped.get(role, {})),
                modified={during: dict(kinds) for during, kinds in modified.items()},
            )
