# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When weights changed, how, and whether it worked."""

from __future__ import annotations

from . import ENGINE, TARGET, Selection, engine_named, happened, host, named, rank_named, together

BUCKETS = "sglang_weight_update_duration_seconds_bucket"


def by_source(selection: Selection, counter: str) -> str:
    """Counted once an engine: every rank of it counts the same reload. A source without any in
    the whole range is left out."""
    series = selection.series(counter, TARGET)
    any_in_range = f"sum by (source) (increase({series}[$__range] @ end())) > 0"
    return (
        f"sum by (source) (max by ({ENGINE}, source) ({happened(series)}))"
        f" and on (source) {any_in_range}"
    )


def in_range(selection: Selection, counter: str) -> str:
    """How many, once an engine."""
    series = selection.series(counter, TARGET)
    return f"sum(round(max by ({ENGINE}, source) (increase({series}[$__range]))))"


def moved_in_range(selection: Selection) -> str:
    return (
        f"sum(round(increase({selection.series('sglang_weight_tensors_moved_total')}[$__range])))"
    )


def reloaded_at(selection: Selection) -> str:
    """When the weights of each engine last changed after their first load."""
    return (
        f"max by ({ENGINE}) ({selection.series('sglang_weight_last_update_timestamp_seconds')}"
        f" > {selection.series('sglang_weight_loaded_timestamp_seconds')})"
    )


def age(selection: Selection) -> str:
    """Seconds since the weights of each engine last changed, the first load included."""
    changed = selection.series("sglang_weight_last_update_timestamp_seconds")
    return f"time() - min by ({ENGINE}) ({changed})"


def age_named(selection: Selection) -> str:
    return engine_named(f"({age(selection)})")


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
    """Seconds that updates took on the ranks that they took longest on."""
    sums = "sglang_weight_update_duration_seconds_sum"
    grown = f"sum without (source) ({since_the_first(selection, sums, '', TARGET)})"
    return f"topk(3, {named(rank_named(host(grown)), 'cluster', 'host', 'engine', 'rank')} > 0)"


def bytes_a_second(selection: Selection) -> str:
    """While they came and were written, by source; each rank's are its own."""
    came = selection.series("sglang_weight_update_bytes_total")
    busy = selection.series("sglang_weight_update_phase_seconds_total", 'phase=~"receive|load"')
    return (
        f"sum by (source) (increase({came}[$__rate_interval]))"
        f" / (sum by (source) (increase({busy}[$__rate_interval])) > 0)"
    )


def slowest(selection: Selection) -> str:
    """Median and 99th percentile over ranks of targets; only where an update ended."""
    grown = f"sum by (le) ({since_the_first(selection, BUCKETS, 'le', TARGET)})"
    return together(
        {
            "median": f"(histogram_quantile(0.5, {grown}) >= 0)",
            "p99": f"(histogram_quantile(0.99, {grown}) >= 0)",
        }
    )


def changes(selection: Selection) -> dict[str, str]:
    moved = happened(selection.series("sglang_weight_tensors_moved_total"))
    changed = happened(selection.series("sglang_weight_table_changes_total"))
    return {"moved": f"sum({moved})", "{{change}}": f"sum by (change) ({changed})"}


def groups(selection: Selection) -> str:
    """Process groups open for distributed updates."""
    return engine_named(f"sum by ({ENGINE}) ({selection.series('sglang_weight_update_groups')})")
