# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the memory of the GPUs went: the engine board's first screen, and what is below it."""

from __future__ import annotations

from ..colours import BLUE, COLOURS, CRIMSON, CYAN, GOLD, GREEN, OLIVE, SPREAD, VIOLET, YELLOW
from ..grafana import (
    NO_ACCOUNT,
    NO_NVML,
    NOT_LOADED,
    Json,
    by_name,
    coarse,
    coloured,
    linked,
    override,
    query,
    runbook,
    stacked_bars,
    stat,
    state_timeline,
    timeseries,
)
from ..queries import ENGINES, TOP, Selection, engines, exporter, memory, spread, updates

DASHED = {"fill": "dash", "dash": [8, 6]}

#: By what `queries.engines.state` gives.
STATES = {
    0: ("resident", GREEN),
    1: ("weights released", BLUE),
    2: ("KV pool released", GOLD),
    3: ("both released", VIOLET),
    4: ("updating", YELLOW),
    5: ("paused", CRIMSON),
}


def gpu_bars(selection: Selection, *, width: int, height: int) -> Json:
    shown = {name: number for number, name in enumerate(("where", *COLOURS, "gpu_uuid"))}
    return stacked_bars(
        "Where did my GPU memory go",
        f"Memory now of the {memory.FULLEST} GPUs with the most in use, by host and index: weights "
        "by role, LoRA slots, KV pool and its tables, CUDA graphs, other tensors, what torch's "
        "allocator keeps unused, what engines have outside of torch (contexts, kernels, "
        "communicators), everything else in use (other processes, and all that is not accounted "
        "for) and what is free. Weights and KV are measured from their storages, torch's parts "
        "are as of each rank's last capture, the rest is NVML's, where free includes what the "
        "driver keeps for itself. A CPU engine has no NVML part.",
        [query(memory.fullest(selection), instant=True)],
        [
            {"id": "labelsToFields", "options": {"mode": "columns", "valueLabel": "is"}},
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {"indexByName": shown, "excludeByName": {"Time": True}},
            },
        ],
        "where",
        NOT_LOADED,
        *map(coloured, COLOURS),
        # No bar: Grafana shows it with the others in the tooltip.
        override("gpu_uuid", displayName="UUID"),
        width=width,
        height=height,
    )


def first_screen() -> list[Json]:
    bars, *graphs = now()
    return [*totals(), *zero_when_healthy(), bars, *map(coarse, graphs)]


def totals() -> list[Json]:
    resident = "sglang_weight_resident_bytes"
    return [
        stat(
            "Weights",
            "Bytes of weights that physical memory backs now, all selected ranks: target, draft "
            "and buffers. Each storage counts once. Falls while SGLang has released them.",
            f"sum({ENGINES.series(resident)})",
            "bytes",
            NOT_LOADED,
            (None, BLUE),
        ),
        stat(
            "KV pool",
            "Bytes of KV pools that physical memory backs now, all selected ranks and pools.",
            f"sum({ENGINES.series('sglang_kv_pool_resident_bytes')})",
            "bytes",
            "No KV pool allocated yet",
            (None, GOLD),
        ),
        stat(
            "Weight share",
            "Resident weights as a share of the total memory of the GPUs that hold them (NVML).",
            memory.weight_share(ENGINES),
            "percentunit",
            NO_NVML,
            (None, "green"),
            (0.6, "orange"),
            (0.85, "red"),
        ),
        stat(
            "Ranks",
            "Ranks of the target model that are alive.",
            engines.alive(ENGINES),
            "short",
            NOT_LOADED,
        ),
        stat(
            "Last update, age",
            "Time since weights last changed after they were first loaded, the latest engine "
            "counts. The first load is no update.",
            f"time() - max({engines.reloaded_at(ENGINES)})",
            "s",
            "Not updated since they were loaded",
        ),
        stat(
            "Updates done",
            "Logical updates that changed weights in the time range, once an engine and not once "
            "a rank.",
            updates.in_range(ENGINES, "sglang_weight_updates_total"),
            "short",
            NOT_LOADED,
        ),
    ]


def zero_when_healthy() -> list[Json]:
    failed = updates.in_range(ENGINES, "sglang_weight_update_failures_total")
    orange = ((None, "green"), (1, "orange"))
    return [
        linked(
            stat(
                "Failed updates",
                "Updates that failed in the time range, once an engine. A failed update may have "
                "left weights half written.",
                failed,
                "short",
                NOT_LOADED,
                (None, "green"),
                (1, "red"),
                width=5,
            ),
            runbook("SGLangWeightReloadFailed"),
        ),
        linked(
            stat(
                "Tensors moved",
                "Engines of which an update in the time range has given tensors another address. "
                "CUDA graphs keep the old ones, so an in-place update should move none.",
                updates.that_moved(ENGINES),
                "short",
                NOT_LOADED,
                *orange,
                width=5,
            ),
            runbook("SGLangWeightTensorsMoved"),
        ),
        linked(
            stat(
                "Hooks failed",
                "Functions of SGLang, times ranks, that could not be hooked although that release "
                "should have them: updates on those paths are not seen.",
                exporter.hooks_failed(ENGINES),
                "short",
                NOT_LOADED,
                *orange,
                width=5,
            ),
            runbook("SGLangWeightExporterIncomplete"),
        ),
        linked(
            stat(
                "Errors in hooks",
                "Exceptions of this exporter's own hooks that were caught inside engines.",
                exporter.hook_errors(ENGINES),
                "short",
                NOT_LOADED,
                *orange,
                width=5,
            ),
            runbook("SGLangWeightExporterIncomplete"),
        ),
        stat(
            "Files unread",
            "Files of ranks that the exporter could not read.",
            exporter.read_errors(ENGINES),
            "short",
            NOT_LOADED,
            *orange,
            width=4,
        ),
    ]


def now() -> list[Json]:
    return [
        gpu_bars(memory.of_chosen(), width=12, height=8),
        timeseries(
            "Weights against KV pool",
            "Resident bytes of all selected ranks over time, stacked, the legend in the order of "
            "the stack from below. The dashed line is the total memory of their GPUs (NVML), of "
            "hosts that have a rank. What is between, the bars say.",
            [query(memory.over_time(ENGINES), "{{part}}")],
            "bytes",
            NOT_LOADED,
            override(
                "GPU memory",
                color={"mode": "fixed", "fixedColor": "text"},
                custom__stacking={"mode": "none", "group": "B"},
                custom__fillOpacity=0,
                custom__lineStyle=DASHED,
            ),
            colours={name: COLOURS[name] for name in memory.STACKED},
            transformations=[
                {
                    "id": "renameByRegex",
                    "options": {"regex": "^[0-9]+ (.*)$", "renamePattern": "$1"},
                }
            ],
            stacked=True,
            explained_by_updates=True,
        ),
        linked(
            state_timeline(
                "State of weights and KV pool",
                f"By engine, of {engines.MOST} at most, as its first rank is: "
                "generation is paused (pause_generation); else an update is in progress; "
                "else memory was released (release_memory_occupation), or all of it is there.",
                [query(engines.states(ENGINES), "{{where}}")],
                STATES,
                NOT_LOADED,
                width=24,
                height=6,
            ),
            runbook("SGLangWeightReloadStuck"),
            runbook("SGLangWeightsReleased"),
        ),
    ]


def over_time() -> list[Json]:
    return [
        timeseries(
            "Reserved against resident",
            "Reserved is what the tensors span, resident what physical memory backs. They part "
            "while SGLang has released memory (release_memory_occupation): the addresses stay, "
            "the memory goes.",
            [query(memory.reserved_and_resident(ENGINES), "{{part}}")],
            "bytes",
            NOT_LOADED,
            *(
                override(
                    f"{what} {state}",
                    color={"mode": "fixed", "fixedColor": colour},
                    **(
                        {"custom__lineStyle": DASHED}
                        if state == "reserved"
                        else {"custom__fillOpacity": 15}
                    ),
                )
                for what, colour in (("Weights", BLUE), ("KV pool", GOLD))
                for state in ("reserved", "resident")
            ),
            explained_by_updates=True,
        ),
        timeseries(
            "Room on the GPUs at the worst moment",
            "What nobody had in use at the worst moment of each minute (NVML, read once a second), "
            "on the GPU with the least and on the one in the middle. An update's peak, a long "
            "prompt or one more adapter has to fit into it.",
            [query(spread(memory.room(ENGINES), worst="min"), "{{part}}")],
            "bytes",
            NO_NVML,
            colours=SPREAD,
            explained_by_updates=True,
        ),
        timeseries(
            "Room after a resume",
            "What is free now less what ranks will take when they resume, on the GPU with the "
            "least and on the one in the middle, of GPUs on which something is released. Below 0 "
            "a resume fails. While a trainer has its turn that is as it should be: what counts is "
            "the moment before the resume.",
            [query(spread(memory.room_after_resume(ENGINES), worst="min"), "{{part}}")],
            "bytes",
            "Nothing was released in this time range",
            minimum=None,
            colours=SPREAD,
            explained_by_updates=True,
        ),
        timeseries(
            "Room in tokens of KV",
            "The same room as tokens, at the bytes that a token takes in each engine's KV pools, "
            "the draft's included; of the rank with the least and the one in the middle. What a "
            "larger --mem-fraction-static could still turn into KV pool, if nothing needed the "
            "room.",
            [query(spread(memory.room_in_tokens(ENGINES), worst="min"), "{{part}}")],
            "short",
            NO_NVML,
            colours=SPREAD,
        ),
        timeseries(
            "Reserved by torch",
            "What torch's allocator had reserved at the last capture, after updates among others, "
            "on the rank with the most and on the one in the middle, and the most that any ever "
            "had. A line that climbs with the updates and does not come back is a leak.",
            [
                query(
                    spread(ENGINES.series("sglang_rank_memory_reserved_bytes"), worst="max"),
                    "{{part}}",
                ),
                query(
                    f"max({ENGINES.series('sglang_rank_memory_reserved_peak_bytes')})",
                    "peak",
                    ref="B",
                ),
            ],
            "bytes",
            NO_ACCOUNT,
            colours={**SPREAD, "peak": VIOLET},
            explained_by_updates=True,
        ),
        timeseries(
            "What an update adds, what a release leaves",
            "Of the rank with the most: by how much the last update has changed what torch has "
            "reserved, and what torch kept of the GPU in the last release.",
            [
                query(f"max({ENGINES.series('sglang_rank_memory_update_growth_bytes')})", "growth"),
                query(
                    f"max({ENGINES.series('sglang_rank_memory_after_release_bytes')})",
                    "left",
                    ref="B",
                ),
            ],
            "bytes",
            NO_ACCOUNT,
            colours={"growth": BLUE, "left": GOLD},
        ),
        timeseries(
            "KV capacity in tokens",
            "Tokens that the engines' KV pools can hold, by kind of pool. Tensor and pipeline "
            "ranks hold parts of the same tokens and count once, data-parallel ranks add up.",
            [query(engines.kv_tokens(ENGINES), "{{pool}}")],
            "short",
            "No KV pool allocated yet",
            colours={"full": GOLD, "unified": BLUE, "swa": VIOLET, "mamba": CYAN, "index": OLIVE},
            explained_by_updates=True,
        ),
        by_name(
            "Least KV capacity",
            f"The {TOP} engines whose KV pools hold the fewest tokens. SGLang sizes them by the "
            "memory that is free at the start.",
            engines.least_kv_tokens(ENGINES),
            "Tokens",
            "short",
            "No KV pool allocated yet",
            width=12,
            least_first=True,
        ),
    ]
