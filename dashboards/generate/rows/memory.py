# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The first screen: where the memory of the GPUs went."""

from __future__ import annotations

from ..grafana import (
    COLOURS,
    NO_NVML,
    NOT_LOADED,
    Json,
    coloured,
    override,
    queries,
    stacked_bars,
    stat,
    timeseries,
)
from ..promql import (
    GPU_SPLIT,
    RELOADED_AT,
    TARGET,
    labelled,
    nvml,
    reloads_in_range,
    select,
)


def gpu_bars(title: str, description: str, *, share: bool, width: int) -> Json:
    split = queries(
        {name: labelled(e) for name, e in GPU_SPLIT.items()}, instant=True, format="table"
    )
    values = {f"Value #{target['refId']}": target["legendFormat"] for target in split}
    return stacked_bars(
        title,
        description,
        split,
        [
            {"id": "joinByField", "options": {"byField": "where", "mode": "outer"}},
            {
                "id": "filterFieldsByName",
                "options": {"include": {"names": ["where", *values]}},
            },
        ],
        "where",
        NOT_LOADED,
        *(coloured_value(field, name) for field, name in values.items()),
        share=share,
        width=width,
        height=9,
    )


def coloured_value(field: str, name: str) -> Json:
    return override(field, displayName=name, color={"mode": "fixed", "fixedColor": COLOURS[name]})


def where_the_memory_went() -> list[Json]:
    weights = select("sglang_weight_resident_bytes")
    kv = select("sglang_kv_pool_resident_bytes")
    on_gpus = select("sglang_weight_resident_bytes", 'gpu_uuid!=""')
    targets = select("sglang_weight_loaded_timestamp_seconds", TARGET)
    total = f"sum({nvml('sglang_gpu_memory_total_bytes')})"
    return [
        stat(
            "Weights",
            "Bytes of weights that physical memory backs now, all selected ranks: target, draft "
            "and buffers. Each storage counts once. Falls to 0 while SGLang has released them.",
            f"sum({weights})",
            "bytes",
            NOT_LOADED,
            (None, "blue"),
            sparkline=True,
        ),
        stat(
            "KV pool",
            "Bytes of KV pools that physical memory backs now, all selected ranks and pools.",
            f"sum({kv})",
            "bytes",
            "No KV pool allocated yet",
            (None, "orange"),
            sparkline=True,
        ),
        stat(
            "Weight share",
            "Resident weights as a share of the total memory of the GPUs that hold them (NVML).",
            f"sum({on_gpus}) / {total}",
            "percentunit",
            NO_NVML,
            (None, "green"),
            (0.6, "orange"),
            (0.85, "red"),
        ),
        stat(
            "Last reload, age",
            "Time since weights last changed after they were first loaded, the latest engine "
            "counts. The first load is not a reload. Dashed lines in the graphs mark each one.",
            f"time() - max({RELOADED_AT})",
            "s",
            "Not reloaded since they were loaded",
        ),
        stat(
            "Reloads",
            "Logical updates that changed weights in the time range, once an engine and not once "
            "a rank.",
            reloads_in_range("sglang_weight_updates_total"),
            "short",
            NOT_LOADED,
        ),
        stat(
            "Failed reloads",
            "Updates that failed in the time range, once an engine. A failed update may have left "
            "weights half written: see the alert's runbook.",
            reloads_in_range("sglang_weight_update_failures_total"),
            "short",
            NOT_LOADED,
            (None, "green"),
            (1, "red"),
        ),
        stat(
            "Tensors moved",
            "Tensors whose address changed in an update in the time range. CUDA graphs keep the "
            "old addresses, so an in-place reload should move none.",
            f"sum(round(increase({select('sglang_weight_tensors_moved_total')}[$__range])))",
            "short",
            NOT_LOADED,
            (None, "green"),
            (1, "orange"),
        ),
        stat(
            "Ranks",
            "Ranks of the target model that are alive.",
            f"count({targets})",
            "short",
            NOT_LOADED,
        ),
        gpu_bars(
            "Where did my GPU memory go",
            "Each GPU's memory now: weights by role, LoRA slots, KV pool, what else is in use "
            "(activations, CUDA graphs, contexts, other processes) and what is free. Weights and "
            "KV are measured from their storages, the rest is NVML's, where free includes what the "
            "driver keeps for itself. A CPU engine has no NVML part.",
            share=False,
            width=14,
        ),
        gpu_bars(
            "… as share",
            "The same as a share of each GPU.",
            share=True,
            width=10,
        ),
        timeseries(
            "Weights against KV pool",
            "Resident bytes of all selected ranks over time, stacked. The dashed line is the total "
            "memory of their GPUs (NVML).",
            queries(
                {
                    **{
                        name: f"sum({GPU_SPLIT[name]})"
                        for name in GPU_SPLIT
                        if name not in ("Free",)
                    },
                    "GPU memory": total,
                }
            ),
            "bytes",
            NOT_LOADED,
            *(coloured(name) for name in GPU_SPLIT if name != "Free"),
            override(
                "GPU memory",
                color={"mode": "fixed", "fixedColor": "text"},
                custom__stacking={"mode": "none", "group": "B"},
                custom__fillOpacity=0,
                custom__lineStyle={"fill": "dash", "dash": [8, 6]},
            ),
            stacked=True,
        ),
        timeseries(
            "Reserved against resident",
            "Reserved is what the tensors span, resident what physical memory backs. They part "
            "while SGLang has released memory (release_memory_occupation): the addresses stay, "
            "the memory goes.",
            queries(
                {
                    "Weights reserved": f"sum({select('sglang_weight_bytes')})",
                    "Weights resident": f"sum({weights})",
                    "KV pool reserved": f"sum({select('sglang_kv_pool_bytes')})",
                    "KV pool resident": f"sum({kv})",
                }
            ),
            "bytes",
            NOT_LOADED,
            *(
                override(
                    f"{what} {state}",
                    color={"mode": "fixed", "fixedColor": colour},
                    **(
                        {"custom__lineStyle": {"fill": "dash", "dash": [8, 6]}}
                        if state == "reserved"
                        else {"custom__fillOpacity": 15}
                    ),
                )
                for what, colour in (("Weights", "blue"), ("KV pool", "orange"))
                for state in ("reserved", "resident")
            ),
        ),
    ]
