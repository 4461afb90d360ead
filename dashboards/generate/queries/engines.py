# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each engine and each rank of it holds, and the state it is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import (
    ENGINE,
    ENGINE_FACTS,
    FACTS,
    FIRST,
    RANK,
    TARGET,
    TOP,
    Selection,
    at_ends,
    engine_named,
    grown,
    rank_named,
    together,
)

#: Bars of ranks whose names can still be read one below the other.
MOST = 20

REPLICAS = "cluster, namespace, job, model_name"

#: The first 53 bits of the SHA-256 of "default", and how much of a hash is shown.
DEFAULT, DIGITS = 1958358390784813, 100_000_000


def alive(selection: Selection) -> str:
    return f"count({selection.series('sglang_weight_loaded_timestamp_seconds', TARGET)})"


def version_hash(selection: Selection) -> str:
    return f"max by ({ENGINE}) ({selection.series('sglang_weight_version_hash', FIRST)})"


def versions(selection: Selection) -> str:
    """By engine and `version`: the number where it is one, SGLang's `default` where nobody has
    given one, else eight digits that are equal where the strings are: strings are no labels."""
    number = f"max by ({ENGINE}) ({selection.series('sglang_weight_version', FIRST)})"
    digits = f"({version_hash(selection)} % {DIGITS} unless on ({ENGINE}) {number})"
    text = f'label_replace({counted(digits)}, "version", "#$1", "version", "(.*)")'
    default = f'label_replace({text}, "version", "default", "version", "#{DEFAULT % DIGITS}")'
    return f"{counted(number)} or {default}"


def counted(numbers: str) -> str:
    return f'count_values by ({ENGINE}) ("version", {numbers})'


def updated(selection: Selection) -> str:
    """When weights last changed, of ranks that have changed since their load."""
    changed = selection.series("sglang_weight_last_update_timestamp_seconds", FIRST)
    return f"({changed} > {selection.series('sglang_weight_loaded_timestamp_seconds', FIRST)})"


def reloaded_at(selection: Selection) -> str:
    """When the weights of each engine last changed after their first load."""
    return f"max by ({ENGINE}) ({updated(selection)})"


def changed_at(selection: Selection) -> str:
    changed = selection.series("sglang_weight_last_update_timestamp_seconds", FIRST)
    return f"max by ({ENGINE}) ({changed})"


def newest(selection: Selection) -> str:
    """When the newest update of each model ended. A first load is none."""
    return f"max by ({REPLICAS}) ({reloaded_at(selection)})"


def behind(selection: Selection) -> str:
    """Seconds since the newest update of the model, of engines that do not have it: they have
    another version than the engine that had it last, or half of the engines were updated within
    ten minutes of it and they were not."""
    versions, changed = version_hash(selection), changed_at(selection)
    same = f"on ({REPLICAS}) group_left ()"
    latest = f"({reloaded_at(selection)} == {same} {newest(selection)})"
    served = f"max by ({REPLICAS}) ({versions} and on ({ENGINE}) {latest})"
    rhythm = f"quantile by ({REPLICAS}) (0.5, {changed}) >= {newest(selection)} - 600"
    missed = f"({changed} < {same} ({newest(selection)} - 600) and on ({REPLICAS}) ({rhythm}))"
    since = f"(0 * {changed} + {same} (time() - {newest(selection)}))"
    return f"{since} and on ({ENGINE}) ({versions} != {same} {served} or {missed})"


def number_behind(selection: Selection) -> str:
    return f"count({behind(selection)}) or 0 * count({version_hash(selection)})"


def took(selection: Selection) -> str:
    """Seconds of the last update of each engine that succeeded."""
    seconds = selection.series("sglang_weight_last_update_duration_seconds", FIRST)
    return f"max by ({ENGINE}) ({seconds})"


def ranks_of_each(selection: Selection) -> str:
    loaded = selection.series("sglang_weight_loaded_timestamp_seconds", TARGET)
    return f"count by ({ENGINE}) ({loaded})"


def weights_of_each(selection: Selection) -> str:
    return f"sum by ({ENGINE}) ({selection.series('sglang_weight_bytes')})"


def number_released(selection: Selection) -> str:
    """Ranks that hold weights of which less than half is there: a little may lie outside of the
    memory saver's regions. 0 where all do."""
    resident = f"sum by ({RANK}) ({selection.series('sglang_weight_resident_bytes')})"
    reserved = f"sum by ({RANK}) ({selection.series('sglang_weight_bytes')})"
    all_of_them = f"count({selection.series('sglang_weight_resident_bytes')})"
    return f"count({resident} < 0.5 * {reserved}) or 0 * {all_of_them}"


def state(selection: Selection) -> str:
    """By engine, by its first rank: 5 paused, else 4 in an update, else 1 weights released + 2 KV
    pool released.

    What is an engine's usual state is one comparison with a number or with what a store has worked
    out once: each further step is one for every engine at every point of a graph.
    """

    def of(metric: str, condition: str = "") -> Callable[[Selection], str]:
        return lambda chosen: f"sum by ({ENGINE}) ({chosen.series(metric, FIRST)}{condition})"

    def half_gone(what: str) -> str:
        held = of(f"sglang_{what}_resident_bytes")(selection)
        of_all = of(f"sglang_{what}_bytes")
        # At one point of time there is no start.
        has = of_all(selection) if selection.at else at_ends(selection, of_all)
        return f"0 * ({held} < 0.5 * {has})"

    paused = of("sglang_kv_cache_paused", " > 0")(selection)
    updating, any_state = (
        of("sglang_weight_update_in_progress", condition)(selection) for condition in (" > 0", "")
    )
    gone = together({"weights": f"1 + {half_gone('weight')}", "KV": f"2 + {half_gone('kv_pool')}"})
    return (
        f"(5 + 0 * {paused} or 4 + 0 * {updating} or sum by ({ENGINE}) ({gone}) or 0 * {any_state})"
    )


def states(selection: Selection) -> str:
    """Of as many engines as can be read one below the other, those first that are not at work."""
    now = replace(selection, at="end")
    return engine_named(f"({state(selection)} and on ({ENGINE}) topk({MOST}, {state(now)}))")


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
    return f"sum by (pool) (max by ({ENGINE}, pool, dp_rank) ({tokens}))"


def least_kv_tokens(selection: Selection) -> str:
    tokens = selection.series("sglang_kv_pool_tokens", f'{TARGET}, pool=~"full|unified"')
    held = f"sum by ({ENGINE}) (max by ({ENGINE}, pool, dp_rank) ({tokens}))"
    return engine_named(f"bottomk({TOP}, {held})")


def operations(selection: Selection) -> dict[str, str]:
    """By operation, those that happened in the time range."""
    counts = {
        "done": grown(selection.series("sglang_weight_operations_total")),
        "failed": grown(selection.series("sglang_weight_operation_failures_total")),
    }
    return {name: f"sum by (operation) ({each}) > 0" for name, each in counts.items()}
