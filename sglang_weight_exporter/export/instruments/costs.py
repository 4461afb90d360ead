# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates cost those who wait for tokens. Of sources that were used, and once a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_weight_exporter.export.instruments.base import Instrument, RoleReader, Sample
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.records.costs import DISCARDED, FATES, UpdateCost


def _by_source(read: Callable[[UpdateCost], Iterator[Sample]]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        for source, cost in view.snapshot.costs.items() if view.is_first else ():
            for sample in read(cost):
                yield sample._replace(labels=(source, *sample.labels))

    return samples


def _seconds(cost: UpdateCost) -> Iterator[Sample]:
    yield Sample((), cost.paused_seconds)


def _straddling(cost: UpdateCost) -> Iterator[Sample]:
    yield Sample((), cost.straddling)


def _requests(cost: UpdateCost) -> Iterator[Sample]:
    for fate in FATES:
        yield Sample((fate,), cost.requests.get(fate, 0))


def _requests_that_were(cost: UpdateCost) -> Iterator[Sample]:
    return (sample for sample in _requests(cost) if sample.value)


def _discarded(cost: UpdateCost) -> Iterator[Sample]:
    for kind in DISCARDED:
        yield Sample((kind,), cost.discarded.get(kind, 0))


INSTRUMENTS = (
    Instrument(
        "sglang_weight_update_paused_seconds",
        "counter",
        "s",
        "Seconds in which updates kept the scheduler from making tokens: from the pause, or from "
        "the first call, to the first batch after it; where no request waited, until one could "
        "have run. Known when the update ends, and the rest with that batch.",
        ("source",),
        _by_source(_seconds),
    ),
    Instrument(
        "sglang_weight_update_requests",
        "counter",
        "{request}",
        "Requests that were running or queued when updates began: they went on with what they had "
        "(kept), went back to the queue to be computed again (retracted), or were aborted.",
        ("source", "fate"),
        _by_source(_requests),
        lean_role=_by_source(_requests_that_were),
    ),
    Instrument(
        "sglang_weight_update_straddling_requests",
        "counter",
        "{request}",
        "Requests with tokens of the weight version before, which went on with the new one.",
        ("source",),
        _by_source(_straddling),
        preset="full",
    ),
    Instrument(
        "sglang_weight_update_discarded_tokens",
        "counter",
        "{token}",
        "Tokens that updates threw away: those that aborted requests had generated (generated), "
        "and those of the prefix cache, which are to be computed again (cached).",
        ("source", "kind"),
        _by_source(_discarded),
        preset="full",
    ),
)
