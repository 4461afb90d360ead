# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a role's weights: taken after loads and updates, and compared with the last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import torch

from sglang_weight_exporter.capture.weights import WeightCapture, table_tensors
from sglang_weight_exporter.fingerprint.tables import TableFingerprints, without_rows
from sglang_weight_exporter.fingerprint.tensors import (
    Fingerprinter,
    FingerprintError,
    FingerprintTimeoutError,
)
from sglang_weight_exporter.records.fingerprints import Skip
from sglang_weight_exporter.runners.captures import RoleCapture
from sglang_weight_exporter.runners.roles import RunnerRole
from sglang_weight_exporter.runners.shares import RoleShares
from sglang_weight_exporter.weight_table import (
    modified_tensors,
    table_rows,
    with_names,
    without_fingerprints,
)

logger = logging.getLogger("sglang_weight_exporter")


class RoleFingerprints:
    """Puts fingerprints into a role's capture, or why there are none."""

    def __init__(
        self,
        fingerprinter: Fingerprinter,
        *,
        report: Callable[[str, BaseException], None],
        shares: RoleShares | None = None,
    ) -> None:
        self._fingerprinter = fingerprinter
        self._tables = TableFingerprints(fingerprinter)
        self._shares = shares
        self._report = report
        self._logged: set[Skip] = set()
        self._logged_shares = False

    def take(
        self,
        role: RunnerRole,
        held: RoleCapture,
        limit_seconds: float,
        *,
        written: bool,
        after: torch.cuda.Stream | None,
        begun: bool = False,
    ) -> None:
        """Anew or not at all: what was true before the update is true no more.

        ``limit_seconds``: 0 where the memory may not be read. ``written``: by a load or an update;
        otherwise the weights should be as the last one left them. ``after``: the stream of forward
        passes. ``begun``: devices have, by :meth:`begin` with the same capture.
        """
        held.skipped = None
        self._tables.begin_anew(role.name)
        if held.weights is not None:
            table = without_fingerprints(held.weights.table)
            held.weights = replace(held.weights, table=table)
            if not limit_seconds:
                held.skipped = "released"
            elif not role.has_placeholders:
                self._take(role, held, limit_seconds, after, begun=begun)
        self._compare(held, written=written)

    def has_kernels(self, role: RunnerRole) -> bool:
        """Whether the role's device can read its weights by their addresses."""
        return self._fingerprinter.has_kernels(torch.device(role.device))

    def can_begin_all(self, role: RunnerRole, held: RoleCapture) -> bool:
        """Whether nothing is left for :meth:`take` to read once devices have begun."""
        if held.weights is None or role.has_placeholders or self._shares is not None:
            return False
        try:
            return self._tables.reads_addresses(held.weights.table, skip=_no_weights(held))
        except Exception as error:
            self._report("fingerprint", error)
            return False

    def begin(
        self, role: RunnerRole, held: RoleCapture, after: torch.cuda.Stream | None
    ) -> list[torch.cuda.Event] | None:
        """Have devices begin to read what :meth:`take` takes then, and return: when each has ended.
        ``None`` where that has to be done at once."""
        if held.weights is None or role.has_placeholders:
            return None
        begun: list[torch.cuda.Event] = []
        try:
            skip = _no_weights(held)
            begun.extend(self._tables.begin(held.weights.table, skip=skip, after=after))
        except Exception as error:
            for end in begun:
                end.synchronize()  # Nobody would know of it.
            if not isinstance(error, FingerprintError):  # It is said when they are taken.
                self._report("fingerprint", error)
            return None
        return begun

    def _take(
        self,
        role: RunnerRole,
        held: RoleCapture,
        limit_seconds: float,
        after: torch.cuda.Stream | None,
        *,
        begun: bool,
    ) -> None:
        weights = held.weights
        assert weights is not None
        started = time.perf_counter()
        try:
            table = self._tables.take(
                weights.table,
                lambda: table_tensors(weights, role.runner.model),
                skip=_no_weights(held),
                limit_seconds=limit_seconds,
                after=after,
                begun=begun,
            )
            held.weights = replace(weights, table=table)
        except FingerprintError as error:
            held.skipped = _reason(error)
            self._log(held.skipped, error)
        except Exception as error:
            held.skipped = "error"
            self._report("fingerprint", error)
        else:
            self._take_shares(role, held, limit_seconds - (time.perf_counter() - started))

    def _take_shares(self, role: RunnerRole, held: RoleCapture, limit_seconds: float) -> None:
        """What was sent is compared by shares. Without them fingerprints are there all the same."""
        weights = held.weights
        if self._shares is None or weights is None:
            return
        try:
            table = self._shares.take(
                role.runner.model,
                weights.table,
                lambda: table_tensors(weights, role.runner.model),
                skip=_no_weights(held),
                limit_seconds=limit_seconds,
            )
            held.weights = replace(weights, table=table)
        except FingerprintError as error:
            if not self._logged_shares:
                self._logged_shares = True
                logger.warning(
                    "sglang_weight_exporter: no sums of shares were taken (%s: %s), so this update "
                    "is compared with no manifest. SGLang is not affected. Further ones are not "
                    "logged.",
                    _reason(error),
                    error,
                )
        except Exception as error:
            self._report("shares", error)

    def take_part(
        self,
        role: RunnerRole,
        held: RoleCapture,
        limit_seconds: float,
        *,
        part: int,
        parts: int,
        captured_at: float,
        after: torch.cuda.Stream | None,
    ) -> bool:
        """One part after another, with batches between; whether that was the last. Until then what
        was taken before is there, and an update begins anew."""
        weights = held.weights
        if weights is None or not limit_seconds or role.has_placeholders:
            return False
        try:
            table = self._tables.take_part(
                weights.table,
                lambda: table_tensors(weights, role.runner.model),
                part=part,
                parts=parts,
                skip=_no_weights(held),
                limit_seconds=limit_seconds,
                after=after,
            )
        except FingerprintError as error:
            self._log(_reason(error), error)
            return False
        if table is None:
            return False
        if table.fingerprint != weights.table.fingerprint:
            table = msgspec.structs.replace(table, shares=None)  # Their sums are of other bytes.
        held.weights = replace(
            weights, table=msgspec.structs.replace(table, captured_at=captured_at)
        )
        self._compare(held, written=False)
        return True

    def drop_scratch(self, held: RoleCapture, before: WeightCapture | None) -> None:
        """Tensors have turned out to be scratch; ``before``: the capture in which they were not."""
        for name in held.scratch:
            held.modified.pop(name, None)
        if held.weights is None or before is None or not before.table.fingerprint:
            return
        try:
            table = without_rows(before.table, held.weights.table, _no_weights(held))
        except Exception as error:
            self._report("fingerprint", error)
            return
        held.weights = replace(held.weights, table=table)
        if not held.modified:
            held.left = table

    def without_scratch(self, held: RoleCapture, before: WeightCapture) -> WeightCapture:
        """A capture in which scratch was not known as such, without it."""
        now = held.weights
        there = set() if now is None else {*now.table.names.decode().split("\n")}
        gone = {*held.scratch}.difference(there)
        kept = with_names(before.table, lambda name: name not in gone)
        return replace(before, table=without_rows(before.table, kept, _no_weights(held)))

    def _log(self, reason: Skip, error: FingerprintError) -> None:
        """Once: it is counted each time, and nothing went wrong."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning(
                "sglang_weight_exporter: no fingerprint of the weights was taken (%s: %s). SGLang "
                "is not affected. Further ones are counted and not logged.",
                reason,
                error,
            )

    def _compare(self, held: RoleCapture, *, written: bool) -> None:
        table = None if held.weights is None else held.weights.table
        if written:
            held.left, held.modified = (table if table and table.fingerprint else None), {}
        elif table is not None and held.left is not None:
            try:
                held.modified = modified_tensors(held.left, table)
            except Exception as error:
                held.modified = {}
                self._report("fingerprint", error)


def _reason(error: FingerprintError) -> Skip:
    return "time_limit" if isinstance(error, FingerprintTimeoutError) else "unsupported"


def _no_weights(held: RoleCapture) -> frozenset[str]:
    """Names of rows that a fingerprint is not of: what torch does not count to the model's state,
    and what forward passes write."""
    not_persistent = frozenset() if held.weights is None else held.weights.not_persistent
    return not_persistent.union(held.scratch)


def start_over(held: RoleCapture, *, known: bool) -> None:
    """Later captures are compared with the last one, or, unless ``known``, with none until the
    next update."""
    table = None if held.weights is None else held.weights.table
    held.left = table if known and table and table.fingerprint else None


def ignore(held: RoleCapture, storages: frozenset[int]) -> None:
    """That tensors in these storages hold other bytes is no news."""
    if storages and held.modified and held.weights is not None:
        there = {row.name for row in table_rows(held.weights.table) if row.storage_ptr in storages}
        held.modified = {name: kind for name, kind in held.modified.items() if name not in there}
