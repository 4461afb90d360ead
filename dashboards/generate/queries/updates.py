# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When weights changed, how, and whether it worked."""

from __future__ import annotations

from . import (
    ENGINE,
    FIRST,
    TARGET,
    TOP,
    Selection,
    at_end,
    grown,
    happened,
    host,
    named,
    rank_named,
    together,
)
from .engines import changed_at, newest

BUCKETS = "sglang_weight_update_duration_seconds_bucket"


def by_source(selection: Selection, counter: str) -> str:
    """Counted once an engine: every rank of it counts the same reload. A source without any in
    the whole range is left out."""
    series = selection.series(counter, FIRST)
    any_in_range = f"max by (source) ({at_end(series)}) != 0"
    # Most engines have one source: of the others there is nothing to compare.
    grew = f"({series} > 0) - {series} offset $__interval > 0"
    return f"sum by (source) ({grew}) or 0 * ({any_in_range})"


def in_range(selection: Selection, counter: str) -> str:
    """How many, once an engine, as its first rank counts them."""
    return f"sum({grown(selection.series(counter, FIRST), f'{ENGINE}, source')})"


def that_moved(selection: Selection) -> str:
    """Engines of which a tensor has moved in the range."""
    moved = grown(selection.series("sglang_weight_tensors_moved_total"), ENGINE)
    return f"sum({moved} > bool 0)"


def sources(selection: Selection) -> str:
    """The source of most of an engine's updates in the range."""
    counted = grown(selection.series("sglang_weight_updates_total", FIRST), f"{ENGINE}, source")
    return f"topk by ({ENGINE}) (1, {counted} > 0)"


def lines(selection: Selection) -> str:
    """Milliseconds at which the newest update of each model ended."""
    return f"{newest(selection)} * 1000"


def age(selection: Selection) -> str:
    """Seconds since the weights of each engine last changed, the first load included."""
    return f"(time() - {changed_at(selection)})"


def ages(selection: Selection) -> str:
    old = age(selection)
    return together({"oldest": f"max({old})", "median": f"quantile(0.5, {old})"})


def since_the_first(selection: Selection, series: str, further: str, *matchers: str) -> str:
    """As :func:`happened`, of series that appear with the first update of their source: what they
    begin with is growth where the rank had been seen before. ``further``: labels that the count of
    updates has not."""
    counted = selection.series(series, *matchers)
    seen = selection.series("sglang_weight_updates_total", *matchers)
    before = (
        f"{counted} offset $__interval"
        f" or (0 * {counted} and ignoring ({further}) {seen} offset $__interval)"
    )
    return f"clamp_min({counted} - ({before}), 0)"


def durations(selection: Selection) -> str:
    """Updates that ended, by how long they took."""
    return f"sum by (le) ({since_the_first(selection, BUCKETS, 'le')})"


def phases(selection: Selection) -> str:
    """Seconds of the slowest rank of each engine, by what they went to."""
    grown = since_the_first(selection, "sglang_weight_update_phase_seconds_total", "phase", TARGET)
    slowest_rank = f"max by ({ENGINE}, phase) (sum without (source) ({grown}))"
    return f"sum by (phase) ({slowest_rank})"


def slowest_ranks(selection: Selection) -> str:
    """Seconds of all updates in the range, on the ranks that they took longest on."""
    sums = grown(selection.series("sglang_weight_update_duration_seconds_sum", TARGET))
    most = f"topk({TOP}, sum without (source) ({sums}) > 0)"
    return named(rank_named(host(most)), "cluster", "host", "engine", "rank")


def bytes_a_second(selection: Selection) -> str:
    """While they came and were written, by source; each rank's are its own."""
    came = selection.series("sglang_weight_update_bytes_total")
    busy = selection.series("sglang_weight_update_phase_seconds_total", 'phase=~"receive|load"')
    return (
        f"sum by (source) (increase({came}[$__rate_interval]))"
        f" / (sum by (source) (increase({busy}[$__rate_interval])) > 0)"
    )


def slowest(selection: Selection) -> str:
    """Seconds of the slowest engine and of the one in the middle, where an update ended since the
    point before: of the last one of each, on its first rank. By what they took, and not by buckets,
    which know no more than between which two bounds it was."""
    begun = selection.series("sglang_weight_last_update_start_timestamp_seconds", FIRST)
    seconds = selection.series("sglang_weight_last_update_duration_seconds", FIRST)
    taken = f"({seconds} and {begun} > {begun} offset $__interval)"
    return together({"slowest": f"max({taken})", "median": f"quantile(0.5, {taken})"})


def paused(selection: Selection) -> str:
    """Seconds in which schedulers made no tokens, as each engine's first rank counts them."""
    held = since_the_first(selection, "sglang_weight_update_paused_seconds_total", "", FIRST)
    return f"sum by (source) ({held})"


def requests(selection: Selection) -> str:
    """What became of those that waited, as each engine's first rank counts them."""
    of_it = since_the_first(selection, "sglang_weight_update_requests_total", "fate", FIRST)
    return f"sum by (fate) ({of_it})"


def held(selection: Selection) -> str:
    """The share of the engines that are paused, and that are being updated."""
    series = {
        "paused": selection.series("sglang_kv_cache_paused"),
        "updating": selection.series("sglang_weight_update_in_progress"),
    }
    return together({name: f"avg(max by ({ENGINE}) ({each}))" for name, each in series.items()})


def changes(selection: Selection) -> dict[str, str]:
    moved = happened(selection.series("sglang_weight_tensors_moved_total"))
    changed = since_the_first(selection, "sglang_weight_table_changes_total", "change, source")
    return {"moved": f"sum({moved})", "{{change}}": f"sum by (change) ({changed})"}


def groups(selection: Selection) -> str:
    """Process groups open for distributed updates."""
    return f"sum({selection.series('sglang_weight_update_groups')})"
