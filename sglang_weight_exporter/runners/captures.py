# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each role holds, as it was captured last: its weights, KV pools and adapter slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.object_tensors import Storage
from sglang_weight_exporter.capture.references import Registrations
from sglang_weight_exporter.capture.tensors import DerivedPaths
from sglang_weight_exporter.capture.weights import (
    WeightCapture,
    capture_weights,
    in_pools_of_weights,
    storages_of,
)
from sglang_weight_exporter.records.fingerprints import Skip
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.weights import NAMED_CHANGES, Kind
from sglang_weight_exporter.runners import pools as runner_pools
from sglang_weight_exporter.runners.roles import Roles, RunnerRole
from sglang_weight_exporter.weight_table import WeightTable

logger = logging.getLogger("sglang_weight_exporter")


@dataclass
class RoleCapture:
    """The last capture of a role; ``None``: it could not be read, or is not there yet."""

    weights: WeightCapture | None = None
    kv_pools: tuple[KvPoolUsage, ...] | None = None
    kv_storages: tuple[Storage, ...] = ()
    #: Device name to bytes of KV pools that keep their memory while the pools are released.
    kv_outside_saver: dict[str, int] | None = None
    lora: tuple[LoraUsage, ...] = ()
    lora_storages: tuple[Storage, ...] = ()
    #: Of what keeps the pools' books.
    table_storages: tuple[Storage, ...] = ()
    #: Where the last load has left derived weights, without what has turned out to be scratch.
    derived: DerivedPaths | None = None
    #: Names of tensors that forward passes write: no weights, whatever they looked like.
    scratch: tuple[str, ...] = ()
    #: Why fingerprints were not taken; ``None`` where they were, or were not asked for.
    skipped: Skip | None = None
    #: The table as the last load or update left it, with fingerprints. ``None``: nobody knows.
    left: WeightTable | None = None
    #: Forward passes that the scheduler had begun when fingerprints were taken last.
    passes: int | None = None
    #: The same of the first part, where they are taken in parts.
    passes_of_parts: int | None = None
    #: Name → kind of tensors that hold other bytes than that.
    modified: dict[str, Kind] = field(default_factory=dict)


class Captures:
    """The captures of all roles of a process, in the roles' order.

    ``report`` is called with what could not be read; ``registrations``: the process's.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float],
        registrations: Registrations,
    ) -> None:
        self._roles = roles
        self._registrations = registrations
        self._report = report
        self._clock = clock
        self._captures: dict[RunnerRole, RoleCapture] = {}
        #: Addresses of storages that a weight-cache daemon holds, which count there.
        self._mapped: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[tuple[RunnerRole, RoleCapture]]:
        return iter(self._captures.items())

    def of(self, role: RunnerRole) -> RoleCapture:
        """What is known of a role; empty where it was never captured."""
        return self._captures.get(role, RoleCapture())

    def known(self, role: RunnerRole) -> RoleCapture:
        """The same, to be filled."""
        return self._captures.setdefault(role, RoleCapture())

    def drop_collected(self) -> None:
        """Roles whose runner is gone hold nothing any more."""
        living = set(self._roles)
        self._captures = {role: held for role, held in self._captures.items() if role in living}

    @property
    def pool_storages(self) -> list[Storage]:
        """Of the KV pools of all roles."""
        return [storage for held in self._captures.values() for storage in held.kv_storages]

    def map(self, model: object) -> None:
        """A model's tensors were mapped from a weight-cache daemon, where they count."""
        if isinstance(model, torch.nn.Module):
            self._mapped |= storages_of(model)

    def capture_weights(
        self,
        role: RunnerRole,
        segments: Callable[[], Segments],
        *,
        loaded: bool = False,
        renamed: bool = False,
    ) -> None:
        """``loaded``: by a load that has just ended, so that derived weights are those that it has
        left; ``renamed``: modules may have other names than at the last capture."""
        held = self.known(role)
        try:
            model = getattr(role.runner, "model", None)
            if not isinstance(model, torch.nn.Module):
                held.weights = None
                return
            if loaded or held.derived is None:
                held.derived = _left_by_load(model, segments)
                held.scratch = runner_pools.paged_parameters(model)
            elif renamed:
                found = held.derived.renamed(model)
                held.derived = held.derived if found.paths == held.derived.paths else found
            held.weights = self._weights(role, model, held, segments)
        except Exception as error:
            held.weights = None
            self._report("capture", error)

    def drop_rebound(self, role: RunnerRole, segments: Callable[[], Segments]) -> None:
        """Derived weights that are other tensors now although no update has begun are scratch."""
        held = self.of(role)
        known = None if held.weights is None else held.weights.remembered
        if known is None or not known.present or held.derived is None:
            return
        try:
            rebound = set(known.rebound())
        except Exception as error:
            self._report("capture", error)
            return
        if rebound:
            self.drop_scratch(role, [known.derived.names()[row] for row in rebound], segments)

    def drop_scratch(
        self, role: RunnerRole, names: Collection[str], segments: Callable[[], Segments]
    ) -> None:
        """These tensors are scratch from now on: no rows of the table where they are derived, and
        in no fingerprint."""
        held = self.known(role)
        new = [name for name in names if name not in held.scratch]
        if not new:
            return
        held.scratch = (*held.scratch, *new)
        logger.info(
            "sglang_weight_exporter: %d tensors of the %s model are written while nothing updates "
            "weights, so they count as scratch and not as weights from now on: %s",
            len(new),
            role.name,
            ", ".join(new[:NAMED_CHANGES]),
        )
        if held.derived is not None:
            all_names = held.derived.names()
            kept = [row for row, name in enumerate(all_names) if name not in held.scratch]
            if len(kept) < len(all_names):
                held.derived = held.derived.only(kept)
                self.capture_weights(role, segments)

    def _weights(
        self,
        role: RunnerRole,
        model: torch.nn.Module,
        held: RoleCapture,
        segments: Callable[[], Segments],
    ) -> WeightCapture:
        before = held.weights
        counted = self._mapped
        for other in self._earlier(role):
            if other.weights is not None:
                counted |= other.weights.storages
        capture = capture_weights(
            model,
            role=role.name,
            captured_at=self._clock(),
            counted_elsewhere=counted,
            segments=segments,
            previous=before,
            derived=held.derived,
            registrations=self._registrations,
        )
        for usage in capture.usage:
            self._roles.describe(usage.device)
        if capture.unreadable and (before is None or before.unreadable != capture.unreadable):
            self._report("capture", UnreadableTensorsError(capture.unreadable))
        return capture

    def capture_pools(self, role: RunnerRole, segments: Callable[[], Segments]) -> None:
        """KV pools and adapter slots."""
        held = self.known(role)
        try:
            self._pools(role, held, segments)
        except Exception as error:
            held.kv_pools, held.kv_outside_saver, held.lora = None, None, ()
            held.kv_storages, held.lora_storages = (), ()
            self._report("kv_pool", error)

    def _pools(self, role: RunnerRole, held: RoleCapture, segments: Callable[[], Segments]) -> None:
        runner = role.runner
        counted = {each.address for other in self._earlier(role) for each in other.kv_storages}
        storages = runner_pools.kv_storages(runner, counted)
        held.lora_storages = tuple(runner_pools.lora_storages(runner))
        held.lora = runner_pools.lora_usage(runner, held.lora_storages)
        if storages is None:
            held.kv_pools, held.kv_outside_saver, held.kv_storages = None, None, ()
            return
        held.kv_storages = tuple(storages)
        held.kv_pools = runner_pools.kv_usage(runner, storages)
        held.kv_outside_saver = _outside_saver(storages, segments())

    def capture_tables(self) -> None:
        """What keeps the pools' books, of all roles: a flush makes lists of free slots anew, and
        so does each request that ends."""
        pools = frozenset(storage.address for storage in self.pool_storages)
        for role, held in self._captures.items():
            held.table_storages = ()
            if held.kv_pools is not None and role.runner is not None:
                held.table_storages = tuple(runner_pools.table_storages(role.runner, pools))

    def _earlier(self, role: RunnerRole) -> list[RoleCapture]:
        earlier = []
        for other in self._roles:
            if other is role:
                break
            earlier.append(self.of(other))
        return earlier


def _left_by_load(model: torch.nn.Module, segments: Callable[[], Segments]) -> DerivedPaths:
    """Tensors of the model's own modules, where weights may lie. Graphs may have been captured
    before a load has ended (with overlapped loading), and a forward pass binds scratch."""
    found = DerivedPaths.of(model, foreign=runner_pools.is_lora_layer)
    return in_pools_of_weights(model, found, segments()) if found.paths else found


class UnreadableTensorsError(Exception):
    """Tensors that have no row in the table, by name."""

    def __init__(self, sentences: tuple[str, ...]) -> None:
        super().__init__(
            f"{len(sentences)} tensors have no storage that could be read, so they are in no "
            f"table and no sum: {'; '.join(sentences[:10])}"
        )


def _outside_saver(storages: list[Storage], segments: Segments) -> dict[str, int]:
    devices = tuple(dict.fromkeys(storage.device for storage in storages))
    return segments.outside_saver(
        np.array([storage.address for storage in storages], dtype=np.uint64),
        np.array([storage.nbytes for storage in storages], dtype=np.uint64),
        np.array([devices.index(storage.device) for storage in storages], dtype=np.uint32),
        devices,
    )
