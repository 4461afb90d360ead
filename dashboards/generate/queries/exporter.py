# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter itself."""

from __future__ import annotations

from . import ENGINE, Selection, engine_named


def hooks_failed(selection: Selection) -> str:
    failed = selection.of_targets("sglang_weight_exporter_hooks", 'state="failed"')
    return f"sum({failed}) or 0 * count({selection.of_targets('sglang_weight_exporter_ranks')})"


def hook_errors(selection: Selection) -> str:
    return f"sum({selection.series('sglang_weight_exporter_hook_errors_total')})"


def read_errors(selection: Selection) -> str:
    return f"sum({selection.of_targets('sglang_weight_exporter_read_errors_total')})"


def ranks(selection: Selection) -> str:
    return selection.of_targets("sglang_weight_exporter_ranks")


def hooks(selection: Selection) -> str:
    return f"sum by (state) ({selection.of_targets('sglang_weight_exporter_hooks')})"


def cost(selection: Selection) -> str:
    seconds = selection.series("sglang_weight_exporter_snapshot_seconds")
    return engine_named(f"max by ({ENGINE}) ({seconds})")


def spans(selection: Selection) -> dict[str, str]:
    exported = selection.of_targets("sglang_weight_exporter_spans_exported_total")
    waiting = selection.of_targets("sglang_weight_exporter_spans_waiting")
    dropped = selection.of_targets("sglang_weight_exporter_spans_dropped_total")
    return {
        "exported": f"sum({exported})",
        "waiting": f"sum({waiting})",
        "dropped: {{reason}}": f"sum by (reason) ({dropped})",
    }
