# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Requests of a scheduler that are not finished."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_weight_exporter.records.costs import LiveRequests


def live_requests(scheduler: Any) -> LiveRequests:
    """Running and queued requests of a scheduler: those that it would put into a batch.

    Of engines that split prefill and decode, requests that wait for another engine are not among
    them.
    """
    running = {request.rid: len(request.output_ids) for request in _running(scheduler)}
    waiting = [*scheduler.waiting_queue, *_of_grammars(scheduler)]
    queued = {
        request.rid: len(request.output_ids) for request in waiting if request.rid not in running
    }
    return LiveRequests(running=running, queued=queued)


def has_live_requests(scheduler: Any) -> bool:
    """Whether there is one; the others are not asked for it."""
    queued = scheduler.waiting_queue or _of_grammars(scheduler)
    return bool(queued) or any(True for _ in _running(scheduler))


def goes_on(request: Any) -> bool:
    """Whether a request is neither finished nor about to be, because it is aborted."""
    aborted = getattr(request, "to_finish", None) or getattr(request, "to_abort", False)
    return not (aborted or request.finished())


def count_version_events(scheduler: Any) -> int | None:
    """How often the weight version has changed under requests that have tokens, summed over those
    that are there (``Scheduler.record_weight_version_change`` of 0.5.21 and later); ``None`` where
    this release does not note it."""
    found = None
    for request in {
        id(each): each for each in (*_held(scheduler), *scheduler.waiting_queue)
    }.values():
        events = getattr(request, "weight_version_events", None)
        if events is None:
            return None
        found = (found or 0) + len(events)
    return found


def _running(scheduler: Any) -> Iterator[Any]:
    return (request for request in _held(scheduler) if goes_on(request))


def _held(scheduler: Any) -> Iterator[Any]:
    """Of batches that run or have just run; with pipeline stages there are several."""
    batches = [getattr(scheduler, name, None) for name in ("running_batch", "last_batch")]
    for name in ("running_mbs", "mbs"):
        batches += getattr(scheduler, name, None) or ()
    for batch in batches:
        if batch is not None:
            yield from batch.reqs or ()
    chunked = getattr(scheduler, "chunked_req", None)
    if chunked is not None:
        yield chunked


def _of_grammars(scheduler: Any) -> list[Any]:
    """Requests whose grammar is being compiled."""
    manager = getattr(scheduler, "grammar_manager", scheduler)
    return list(getattr(manager, "grammar_queue", None) or ())
