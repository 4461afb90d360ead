# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When updates and pauses hold the scheduler, and when it makes tokens again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_weight_exporter.hooks.first_batch import watch_first_batch
from sglang_weight_exporter.ledger import Ledger
from sglang_weight_exporter.rank import Rank
from sglang_weight_exporter.records.pools import Pause
from sglang_weight_exporter.runners.requests import goes_on


class Holds:
    """Notifies a rank of what holds its scheduler. Without a scheduler there is nothing to hold.

    Requests are listed when an update or a pause begins, and when it ends; never between.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def begin(self, *, since: float | None = None) -> None:
        """A call of an update begins."""
        if self._rank.inspector.scheduler is not None:
            requests = None if self._rank.ledger.costs.holding else self._rank.inspector.requests()
            self._notify(lambda ledger: ledger.costs.begin_call(since, requests))

    def end(self) -> None:
        """A call of an update has ended."""
        if self._rank.ledger.costs.holding:
            waiting = self._rank.inspector.has_requests()
            self._rank.step(
                lambda ledger: ledger.costs.release(
                    waiting=waiting, in_progress=ledger.updates.in_progress
                ),
                then="note",
            )

    def pause(self, how: Pause) -> None:
        """Generation is about to be interrupted."""
        requests = self._rank.inspector.requests()
        self._notify(lambda ledger: ledger.costs.pause(how, requests))

    def continue_generation(self) -> None:
        """Generation goes on."""
        if self._rank.ledger.costs.holding:
            waiting = self._rank.inspector.has_requests()
            self._rank.step(
                lambda ledger: ledger.costs.continue_generation(waiting=waiting), then=""
            )

    def _notify(self, notify: Callable[[Ledger], None]) -> None:
        self._rank.step(notify, then="")
        scheduler = self._rank.inspector.scheduler
        if scheduler is not None:
            watch_first_batch(scheduler, _has_one_that_goes_on, self._begin_batch, self._report)

    def _report(self, error: BaseException) -> None:
        self._rank.report("first_batch", error)

    def _begin_batch(self) -> None:
        self._rank.step(
            lambda ledger: ledger.costs.begin_batch(in_progress=ledger.updates.in_progress),
            then="note",
        )


def _has_one_that_goes_on(batch: Any) -> bool:
    """A batch may be there to end aborted requests, or because other ranks have one."""
    return any(goes_on(request) for request in batch.reqs or ())
