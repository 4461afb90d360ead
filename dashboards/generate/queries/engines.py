# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each engine and each rank of it holds, and the state it is in."""

from __future__ import annotations

from . import (
    ENGINE,
    ENGINE_FACTS,
    FACTS,
    RANK,
    TARGET,
    Selection,
    engine_named,
    happened,
    rank_named,
)

#: Bars of ranks whose names can still be read one below the other.
MOST = 20

REPLICAS = "cluster, namespace, job, model_name"


def alive(selection: Selection) -> str:
    return f"count({selection.series('sglang_weight_loaded_timestamp_seconds', TARGET)})"


def version(selection: Selection) -> str:
    return f"max by ({ENGINE}) ({selection.series('sglang_weight_version', TARGET)})"


def behind(selection: Selection) -> str:
    """Engines with an older version than another of the same model, namespace and job has."""
    versions = version(selection)
    newest = f"max by ({REPLICAS}) ({versions})"
    return f"sum({versions} < bool on ({REPLICAS}) group_left () {newest})"


def ranks_of_each(selection: Selection) -> str:
    loaded = selection.series("sglang_weight_loaded_timestamp_seconds", TARGET)
    return f"count by ({ENGINE}) ({loaded})"


def weights_of_each(selection: Selection) -> str:
    return f"sum by ({ENGINE}) ({selection.series('sglang_weight_bytes')})"


def released(resident: str, reserved: str) -> str:
    """1 for a rank that holds memory of which less than half is there, else 0: a little may lie
    outside of the memory saver's regions."""
    return f"(sum by ({RANK}) ({resident}) < bool 0.5 * sum by ({RANK}) ({reserved}))"


def weights_released(selection: Selection) -> str:
    return released(
        selection.series("sglang_weight_resident_bytes"), selection.series("sglang_weight_bytes")
    )


def kv_released(selection: Selection) -> str:
    return released(
        selection.series("sglang_kv_pool_resident_bytes"),
        selection.series("sglang_kv_pool_bytes"),
    )


def state(selection: Selection) -> str:
    """By engine: 1 weights released + 2 KV pool released + 4 in an update + 8 paused."""
    updating = f"max by ({ENGINE}) ({selection.series('sglang_weight_update_in_progress')})"
    weights = f"max by ({ENGINE}) ({weights_released(selection)})"
    kv = f"max by ({ENGINE}) ({kv_released(selection)})"
    paused = f"max by ({ENGINE}) ({selection.series('sglang_kv_cache_paused')})"
    # An engine may have no KV pool (yet), or nothing that can be paused: `or` keeps it.
    none = f"0 * {updating}"
    return engine_named(
        f"({updating} * 4 + {weights} + (2 * {kv} or {none}) + (8 * {paused} or {none}))"
    )


def facts(selection: Selection) -> str:
    """What both infos say that a reader of the table asks for."""
    asked = "model_path, architecture, torch_version"
    return (
        f"{selection.series('sglang_weight_info')} * ignoring ({FACTS}, {ENGINE_FACTS}) "
        f"group_left ({asked}) {selection.series('sglang_weight_engine_info')}"
    )


def columns(selection: Selection) -> dict[str, str]:
    """The table of ranks: the first is the one with the words, the others a number each."""

    def one(metric: str, how: str = "sum") -> str:
        return f"{how} by ({RANK}) ({selection.series(metric)})"

    return {
        "Facts": rank_named(facts(selection)),
        "Weights": one("sglang_weight_bytes"),
        "Resident": one("sglang_weight_resident_bytes"),
        "Tensors": one("sglang_weight_tensors"),
        "Regions": one("sglang_weight_regions"),
        "KV pool": one("sglang_kv_pool_bytes"),
        "KV tokens": one("sglang_kv_pool_tokens", "max"),
        "Version": one("sglang_weight_version", "max"),
        "Fingerprint": one("sglang_weight_fingerprint", "max"),
        "Last change": f"{one('sglang_weight_last_update_timestamp_seconds', 'max')} * 1000",
        "First load": one("sglang_weight_first_load_seconds", "max"),
    }


def dtypes(selection: Selection) -> str:
    weights = selection.series("sglang_weight_bytes")
    most = f"topk({MOST}, sum by ({RANK}) ({weights}))"
    ranks = engine_named(rank_named(f"({weights} and on ({RANK}) {most})"))
    return f'sum by (on, dtype) (label_join({ranks}, "on", " ", "where", "role", "rank"))'


def kv_tokens(selection: Selection) -> str:
    """Tensor and pipeline ranks hold parts of the same tokens; data-parallel ranks add up."""
    tokens = selection.series("sglang_kv_pool_tokens", TARGET)
    return engine_named(f"sum by ({ENGINE}, pool) (max by ({ENGINE}, pool, dp_rank) ({tokens}))")


def operations(selection: Selection) -> dict[str, str]:
    done = happened(selection.series("sglang_weight_operations_total"))
    failed = happened(selection.series("sglang_weight_operation_failures_total"))
    return {
        "{{operation}}": f"sum by (operation) ({done})",
        "failed: {{operation}}": f"sum by (operation) ({failed})",
    }
