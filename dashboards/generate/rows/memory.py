# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the memory of the GPUs went: the engine board's first screen, and what is below it."""

from __future__ import annotations

from ..grafana import (
    COLOURS,
    NO_ACCOUNT,
    NO_NVML,
    NOT_LOADED,
    Json,
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
from ..queries import ENGINES, Selection, engines, exporter, memory, updates

DASHED = {"fill": "dash", "dash": [8, 6]}

#: By what `queries.engines.state` adds up.
STATES = {
    0: ("resident", "green"),
    1: ("weights released", "blue"),
    2: ("KV pool released", "orange"),
    3: ("both released", "purple"),
    4: ("updating", "yellow"),
    5: ("updating, weights released", "semi-dark-yellow"),
    6: ("updating, KV pool released", "semi-dark-orange"),
    7: ("updating, both released", "dark-yellow"),
    8: ("paused", "#8e929b"),
    9: ("paused, weights released", "super-light-blue"),
    10: ("paused, KV pool released", "super-light-orange"),
    11: ("paused, both released", "super-light-purple"),
    12: ("paused, updating", "light-yellow"),
    13: ("paused, updating, weights released", "super-light-yellow"),
    14: ("paused, updating, KV pool released", "super-light-yellow"),
    15: ("paused, updating, both released", "super-light-yellow"),
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
        "are as of each rank's last look, the rest is NVML's, where free includes what the driver "
        "keeps for itself. A CPU engine has no NVML part.",
        [query(memory.fullest(selection), instant=True)],
        [
            {"id": "labelsToFields", "options": {"mode": "columns", "valueLabel": "part"}},
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
        share=False,
        width=width,
        height=height,
    )


def first_screen() -> list[Json]:
    return [*totals(), *zero_when_healthy(), *now()]


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
            (None, "blue"),
        ),
        stat(
            "KV pool",
            "Bytes of KV pools that physical memory backs now, all selected ranks and pools.",
            f"sum({ENGINES.series('sglang_kv_pool_resident_bytes')})",
            "bytes",
            "No KV pool allocated yet",
            (None, "orange"),
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
            f"time() - max({updates.reloaded_at(ENGINES)})",
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
                "Tensors whose address changed in an update in the time range. CUDA graphs keep "
                "the old addresses, so an in-place update should move none.",
                updates.moved_in_range(ENGINES),
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
        gpu_bars(ENGINES, width=12, height=8),
        timeseries(
            "Weights against KV pool",
            "Resident bytes of all selected ranks over time, stacked. The dashed line is the total "
            "memory of their GPUs (NVML). Yellow lines are updates.",
            [query(memory.over_time(ENGINES), "{{part}}")],
            "bytes",
            NOT_LOADED,
            *(coloured(name) for name in COLOURS if name != "Free"),
            override(
                "GPU memory",
                color={"mode": "fixed", "fixedColor": "text"},
                custom__stacking={"mode": "none", "group": "B"},
                custom__fillOpacity=0,
                custom__lineStyle=DASHED,
            ),
            stacked=True,
            explained_by_updates=True,
        ),
        linked(
            state_timeline(
                "State of weights and KV pool",
                "By engine, as soon as one of its ranks is in that state: weights and KV pool are "
                "there, were released (release_memory_occupation), an update is in progress, or "
                "generation is paused (pause_generation).",
                [query(engines.state(ENGINES), "{{where}}")],
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
                for what, colour in (("Weights", "blue"), ("KV pool", "orange"))
                for state in ("reserved", "resident")
            ),
            explained_by_updates=True,
        ),
        timeseries(
            "Room on the GPUs at the worst moment",
            "By GPU, what nobody had in use at the worst moment of each minute (NVML, looked at "
            "once a second). An update's peak, a long prompt or one more adapter has to fit into "
            "it.",
            [query(memory.gpu_named(memory.room(ENGINES)), "{{where}}")],
            "bytes",
            NO_NVML,
            explained_by_updates=True,
        ),
        timeseries(
            "Room in tokens of KV",
            "The same room as tokens, at the bytes that a token takes in each engine's KV pools, "
            "the draft's included; by engine, on its fullest GPU. What a larger "
            "--mem-fraction-static could still turn into KV pool, if nothing needed the room.",
            [query(memory.room_in_tokens(ENGINES), "{{where}}")],
            "short",
            NO_NVML,
        ),
        timeseries(
            "Reserved by torch",
            "By engine, its largest rank: what torch's allocator had reserved at the last look, "
            "after updates among others, and the most that it ever had. A line that climbs with "
            "the updates and does not come back is a leak.",
            [
                query(
                    memory.by_rank(ENGINES, "sglang_rank_memory_reserved_bytes"),
                    "{{where}}",
                ),
                query(
                    memory.by_rank(ENGINES, "sglang_rank_memory_reserved_peak_bytes"),
                    "{{where}} peak",
                    ref="B",
                ),
            ],
            "bytes",
            NO_ACCOUNT,
            explained_by_updates=True,
        ),
        timeseries(
            "What an update adds, what a release leaves",
            "By engine, its largest rank: by how much the last update has changed what torch has "
            "reserved, and what torch kept of the GPU in the last release.",
            [
                query(
                    memory.by_rank(ENGINES, "sglang_rank_memory_update_growth_bytes"),
                    "{{where}} growth",
                ),
                query(
                    memory.by_rank(ENGINES, "sglang_rank_memory_after_release_bytes"),
                    "{{where}} left",
                    ref="B",
                ),
            ],
            "bytes",
            NO_ACCOUNT,
        ),
        timeseries(
            "KV capacity in tokens",
            "Tokens that each engine's KV pools can hold. Tensor and pipeline ranks hold parts of "
            "the same tokens and count once, data-parallel ranks add up.",
            [query(engines.kv_tokens(ENGINES), "{{where}} {{pool}}")],
            "short",
            "No KV pool allocated yet",
            explained_by_updates=True,
        ),
    ]
