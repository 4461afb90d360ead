# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The account of one process, put together from its parts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sglang_weight_exporter.ledger.counters import Counters
from sglang_weight_exporter.ledger.loads import Loads
from sglang_weight_exporter.ledger.open_update import FinishedUpdate
from sglang_weight_exporter.ledger.prefix_cache import PrefixCache
from sglang_weight_exporter.ledger.roles import RoleAccounts
from sglang_weight_exporter.ledger.updates import Updates
from sglang_weight_exporter.records.contents import ChangedRows
from sglang_weight_exporter.records.snapshot import Role, RoleProgress
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableChanges


class Ledger:
    """Loads, updates, the prefix cache and counters of one process.

    What has ended is collected with :meth:`take_finished`. ``trace_id``: update number → the trace
    of its span. ``cached_tokens``: as in :class:`PrefixCache`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        thread: Callable[[], int] = threading.get_ident,
        trace_id: Callable[[int], str] = lambda number: "",
        cached_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._roles = RoleAccounts(clock=clock, trace_id=trace_id)
        self._lock = self._roles.lock
        self.costs = self._roles.costs
        self.counters = Counters(self._lock, clock=clock)
        self.prefix_cache = PrefixCache(self._lock, clock=clock, cached_tokens=cached_tokens)
        self.loads = Loads(self._roles)
        self.updates = Updates(self._roles, self.prefix_cache, thread=thread)

    def add_role(self, name: str) -> None:
        """A model runner of this role has appeared."""
        with self._lock:
            self._roles.add(name)

    @property
    def roles(self) -> tuple[str, ...]:
        """All that have appeared."""
        with self._lock:
            return tuple(self._roles.by_name)

    @property
    def weight_version(self) -> str:
        return self._roles.weight_version

    def begin_start(self) -> None:
        """A scheduler loads its models."""
        self.loads.begin_start()
        self.prefix_cache.start()

    def begin_flush(self) -> None:
        """The prefix cache is about to be flushed."""
        self.updates.begin_flush()

    def end_flush(self, *, succeeded: bool) -> None:
        """It was flushed, or SGLang refused."""
        with self._lock:
            self.updates.end_flush(succeeded=succeeded)
            self.prefix_cache.flush(succeeded=succeeded)

    def continue_generation(self) -> None:
        """Who sends buckets in a pause, and says of none that it is the last, has sent them all."""
        with self._lock:
            self.updates.finish_idle(0.0)
            self.prefix_cache.continue_generation()

    def take_finished(self) -> list[FinishedUpdate]:
        """Loads and updates that have ended since this was asked last, in order."""
        with self._lock:
            return self._roles.take_finished()

    def complete(
        self,
        finished: FinishedUpdate,
        *,
        model_path: str,
        changes: TableChanges,
        contents: ChangedRows | None = None,
    ) -> Update | None:
        """Complete what has ended by what the capture after it found.
        ``contents``: which tensors hold other bytes, as fingerprints say."""
        with self._lock:
            return self._roles.complete(
                finished, model_path=model_path, changes=changes, contents=contents
            )

    def progress(self) -> dict[str, RoleProgress]:
        """By role, what changes while updates go on; of roles that have one."""
        with self._lock:
            found = {name: role.progress() for name, role in self._roles.by_name.items()}
            return {name: progress for name, progress in found.items() if progress is not None}

    def describe(self, name: str, record: Role) -> Role:
        """The record of a role with what this ledger knows of it."""
        with self._lock:
            return self._roles[name].describe(record)
