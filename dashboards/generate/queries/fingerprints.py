# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the bytes of the weights say: which replicas agree, what changed and what did not."""

from __future__ import annotations

from . import ENGINE, FACTS, Selection, happened
from .updates import by_source

#: Replicas of one shard, as the rule SGLangWeightReplicasDiffer has them.
SHARD = f"cluster, namespace, job, model_name, role, tp_rank, pp_rank, moe_ep_rank, {FACTS}"


def different(selection: Selection) -> str:
    """How many different sets of weights the replicas of each shard hold; 1 where they agree."""
    located = (
        f"{selection.series('sglang_weight_fingerprint')} * ignoring ({FACTS}) "
        f"group_left ({FACTS}) {selection.series('sglang_weight_info')}"
    )
    sets = f'count without (weights) (count_values by ({SHARD}) ("weights", {located}))'
    return f"max({sets})"


def without_change(selection: Selection) -> str:
    return by_source(selection, "sglang_weight_updates_without_change_total")


def modified(selection: Selection) -> str:
    counted = happened(selection.series("sglang_weight_tensors_altered_total"))
    return f"sum by (during) ({counted})"


def seconds(selection: Selection) -> str:
    return f"max by ({ENGINE}) ({selection.series('sglang_weight_fingerprint_seconds')})"


def skipped(selection: Selection) -> str:
    counted = happened(selection.series("sglang_weight_fingerprint_skipped_total"))
    return f"sum by (reason) ({counted})"
