# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the memory of the GPUs went."""

from __future__ import annotations

from . import ENGINE, GPU, RANK, Selection, engine_named, host, named, together

OURS = (
    "sglang_weight_resident_bytes|sglang_lora_pool_bytes|sglang_kv_pool_resident_bytes"
    "|sglang_rank_memory_outside_torch_bytes"
)

#: What a rank's account has beside weights, slots and pools; without one it is everything else.
ACCOUNTED = {
    "KV tables": "kv_tables",
    "CUDA graphs": "cuda_graphs",
    "Other tensors": "other_tensors",
    "Unused in torch": "rounding|fragments|cached",
}
FULLEST = 16


def per_gpu(expression: str) -> str:
    return f"sum by ({GPU}) ({expression})"


def nvml(selection: Selection, metric: str) -> str:
    """An NVML series of the GPUs that hold a selected rank; `max` forgives a GPU scraped twice."""
    return (
        f"(max by ({GPU}) ({metric})"
        f" and on ({GPU}) {selection.series('sglang_weight_resident_bytes')})"
    )


def free(selection: Selection) -> str:
    return (
        f"({nvml(selection, 'sglang_gpu_memory_total_bytes')}"
        f" - on ({GPU}) {nvml(selection, 'sglang_gpu_memory_used_bytes')})"
    )


def held(selection: Selection) -> str:
    """Bytes of each GPU that are known to be somebody's."""
    accounted = selection.series(
        "sglang_rank_memory_bytes", f'part=~"{"|".join(ACCOUNTED.values())}"'
    )
    return per_gpu(f"{selection.by_name(OURS)} or {accounted}")


def parts(selection: Selection) -> dict[str, str]:
    """Bytes of each GPU by what holds them; they add up to NVML's total."""
    resident = "sglang_weight_resident_bytes"
    return {
        # An encoder's are part of the target, and a weight-cache daemon's are all of it.
        "Target weights": per_gpu(selection.series(resident, 'role!~"draft.*"')),
        "Draft weights": per_gpu(selection.series(resident, 'role=~"draft.*"')),
        "LoRA": per_gpu(selection.series("sglang_lora_pool_bytes")),
        "KV pool": per_gpu(selection.series("sglang_kv_pool_resident_bytes")),
        **{
            name: per_gpu(selection.series("sglang_rank_memory_bytes", f'part=~"{part}"'))
            for name, part in ACCOUNTED.items()
        },
        "Outside torch": per_gpu(selection.series("sglang_rank_memory_outside_torch_bytes")),
        "Everything else in use": (
            f"clamp_min({nvml(selection, 'sglang_gpu_memory_used_bytes')}"
            f" - on ({GPU}) {held(selection)}, 0)"
        ),
        "Free": free(selection),
    }


def total(selection: Selection) -> str:
    return f"sum({nvml(selection, 'sglang_gpu_memory_total_bytes')})"


def over_time(selection: Selection) -> str:
    """Parts and the GPUs' total, summed, each with its name as `part`."""
    summed = {name: f"sum({e})" for name, e in parts(selection).items() if name != "Free"}
    return together({**summed, "GPU memory": total(selection)})


def reserved_and_resident(selection: Selection) -> str:
    return together(
        {
            "Weights reserved": f"sum({selection.series('sglang_weight_bytes')})",
            "Weights resident": f"sum({selection.series('sglang_weight_resident_bytes')})",
            "KV pool reserved": f"sum({selection.series('sglang_kv_pool_bytes')})",
            "KV pool resident": f"sum({selection.series('sglang_kv_pool_resident_bytes')})",
        }
    )


def weight_share(selection: Selection) -> str:
    on_gpus = selection.series("sglang_weight_resident_bytes", 'gpu_uuid!=""')
    return f"sum({on_gpus}) / {total(selection)}"


def headroom(selection: Selection) -> str:
    return together(
        {"least free": f"min({free(selection)})", "median": f"quantile(0.5, {free(selection)})"}
    )


def room(selection: Selection) -> str:
    """Bytes of each GPU that nobody had at the worst moment of the last minute."""
    return (
        f"({nvml(selection, 'sglang_gpu_memory_total_bytes')}"
        f" - on ({GPU}) {nvml(selection, 'sglang_gpu_memory_used_max_bytes')})"
    )


def room_in_tokens(selection: Selection) -> str:
    """That room as tokens of each engine's KV pools, drafts' pools included; its fullest GPU."""
    rank = f"{ENGINE}, tp_rank, pp_rank, dp_rank, gpu_uuid"
    capacity = selection.series("sglang_kv_pool_tokens", 'pool=~"full|unified"')
    of_a_token = (
        f"(sum by ({rank}) ({selection.series('sglang_kv_pool_bytes')})"
        f" / max by ({rank}) ({capacity}))"
    )
    tokens = f"{room(selection)} / on ({GPU}) group_right () {of_a_token}"
    return f"min by (where) ({engine_named(tokens)})"


def by_rank(selection: Selection, metric: str) -> str:
    """The largest of an engine's ranks."""
    return f"max by (where) ({engine_named(f'max by ({RANK}) ({selection.series(metric)})')})"


def gpu_named(expression: str, *kept: str) -> str:
    """`where`, that people recognise: cluster, host and NVML's index of the GPU; without NVML, and
    for a MIG instance, the head of the UUID; without a GPU the word CPU."""
    index = (
        f"label_replace(label_replace(max by ({GPU}, gpu)"
        " (sglang_gpu_memory_total_bytes) > bool 0,"
        ' "place", "GPU $1", "gpu", "(.*)"), "place", "$1", "gpu_uuid", "(MIG-.{8}).*")'
    )
    without_index = (
        f'label_replace(label_replace(group by ({GPU}) ({expression}), "place", "$1",'
        ' "gpu_uuid", "(.{1,12}).*"), "place", "CPU", "gpu_uuid", "")'
    )
    # One series a GPU on both sides: where one of the left ends, VictoriaMetrics goes on with the
    # values of whatever matches it on the right.
    place = f"({index} or on ({GPU}) {without_index})"
    placed = f"({expression} * on ({GPU}) group_left (place) {place})"
    by = ", ".join(["where", *kept])
    return f"sum by ({by}) ({named(host(placed), 'cluster', 'host', 'place')})"


def fullest(selection: Selection) -> str:
    """Parts of the GPUs with the most memory in use, in one query, each with its name as `part`."""
    used = f"({nvml(selection, 'sglang_gpu_memory_used_bytes')} or on ({GPU}) {held(selection)})"
    shown = f"(({together(parts(selection))}) and on ({GPU}) topk({FULLEST}, {used}))"
    return gpu_named(shown, "gpu_uuid", "part")
