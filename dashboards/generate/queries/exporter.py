# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter itself."""

from __future__ import annotations

from . import ENGINE, PLACE, TOP, Selection, grown, host, named

BUILD = "sglang_weight_exporter_build_info"
TARGET = PLACE.removesuffix(", pod")


def known(selection: Selection) -> str:
    """Targets that an exporter answered on within the last hour."""
    return f"group by ({TARGET}) (last_over_time({selection.of_targets(BUILD)}[1h]))"


def answering(selection: Selection) -> str:
    return f"group by ({TARGET}) ({selection.of_targets(BUILD)})"


def silent(selection: Selection) -> str:
    """Those that do not, by name."""
    gone = f"{known(selection)} unless on ({TARGET}) {answering(selection)}"
    return named(host(f"({gone})"), "cluster", "host")


def number_silent(selection: Selection) -> str:
    """0 where all answer."""
    return f"count({known(selection)}) - (count({answering(selection)}) or vector(0))"


def versions(selection: Selection) -> str:
    return f"count by (version) ({selection.of_targets(BUILD)})"


def scrapes(selection: Selection) -> str:
    return selection.of_targets("sglang_weight_exporter_scrape_duration_seconds")


def slowest_scrapes(selection: Selection) -> str:
    return named(host(f"topk({TOP}, {scrapes(selection)})"), "cluster", "host")


def hooks_failed(selection: Selection) -> str:
    failed = selection.of_targets("sglang_weight_exporter_hooks", 'state="failed"')
    return f"sum({failed}) or 0 * count({selection.of_targets('sglang_weight_exporter_ranks')})"


def hook_errors(selection: Selection) -> str:
    return f"sum({selection.series('sglang_weight_exporter_hook_errors_total')})"


def read_errors(selection: Selection) -> str:
    return f"sum({selection.of_targets('sglang_weight_exporter_read_errors_total')})"


def troubles(selection: Selection) -> dict[str, str]:
    """What went wrong in the time range; 0 of each is health."""
    files, spans = (
        grown(selection.of_targets(f"sglang_weight_exporter_{each}_total"))
        for each in ("read_errors", "spans_dropped")
    )
    hooks = grown(selection.series("sglang_weight_exporter_hook_errors_total"))
    return {
        "errors in hooks": f"sum({hooks})",
        "files unread": f"sum({files})",
        "spans dropped": f"sum({spans})",
    }


def ranks(selection: Selection) -> str:
    return f"sum({selection.of_targets('sglang_weight_exporter_ranks')})"


def hooks(selection: Selection) -> str:
    return f"sum by (state) ({selection.of_targets('sglang_weight_exporter_hooks')})"


def cost(selection: Selection) -> str:
    seconds = selection.series("sglang_weight_exporter_snapshot_seconds")
    return f"max by ({ENGINE}) ({seconds})"


def spans(selection: Selection) -> dict[str, str]:
    exported = selection.of_targets("sglang_weight_exporter_spans_exported_total")
    waiting = selection.of_targets("sglang_weight_exporter_spans_waiting")
    dropped = selection.of_targets("sglang_weight_exporter_spans_dropped_total")
    return {
        "exported": f"sum({exported})",
        "waiting": f"sum({waiting})",
        "dropped": f"sum({dropped})",
    }
