# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the memory of the GPUs went."""

from __future__ import annotations

from dataclasses import replace

from . import ENGINE, ENGINES, GPU, PLACE, TOP, Selection, at_ends, host, named, together

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
#: What holds memory, by its series, role and part. Of weights, an encoder's are part of the target,
#: and a weight-cache daemon's are all of it. The first that fits is what it is.
NAMES = {
    "Draft weights": "sglang_weight_resident_bytes draft.*",
    "Target weights": "sglang_weight_resident_bytes .*",
    "LoRA": "sglang_lora_pool_bytes .*",
    "KV pool": "sglang_kv_pool_resident_bytes .*",
    **{name: f"sglang_rank_memory_bytes .* ({part})" for name, part in ACCOUNTED.items()},
    "Outside torch": "sglang_rank_memory_outside_torch_bytes .*",
}
#: What is drawn over time, in the order of the stack.
STACKED = {
    "Target weights": ("sglang_weight_resident_bytes", 'role!~"draft.*"'),
    "Draft weights": ("sglang_weight_resident_bytes", 'role=~"draft.*"'),
    "LoRA": ("sglang_lora_pool_bytes", ""),
    "KV pool": ("sglang_kv_pool_resident_bytes", ""),
}
FULLEST = 16


def free(total: str, used: str) -> str:
    return f"({total} - on ({GPU}) {used})"


def held(selection: Selection) -> str:
    """All that is known to be somebody's, in one selector: only the account has a `part`."""
    parts = "|".join(ACCOUNTED.values())
    of_all = selection.by_name(f"{OURS}|sglang_rank_memory_bytes")
    return f'{of_all[:-1]}, part=~"|{parts}"}}'


def of_all(selection: Selection, metric: str) -> str:
    """The sum of an NVML series of the GPUs that hold a selected rank."""
    selected = selection.series("sglang_weight_resident_bytes")
    return f"sum({selection.of_targets(metric)} and on ({GPU}) {selected})"


def total(selection: Selection) -> str:
    return of_all(selection, "sglang_gpu_memory_total_bytes")


def total_over_time(selection: Selection) -> str:
    """The same while each host has a rank. GPUs do not change, so a store adds them up once."""

    def of_hosts(at: Selection) -> str:
        held = at.series("sglang_weight_resident_bytes")
        whole = at.of_targets("sglang_gpu_memory_total_bytes")
        return f"sum by ({PLACE}) ({whole} and on ({GPU}) {held})"

    ranks = selection.of_targets("sglang_weight_exporter_ranks")
    return f"sum({at_ends(selection, of_hosts)} and on ({PLACE}) ({ranks} > 0))"


def over_time(selection: Selection) -> str:
    """Parts and the GPUs' total, summed, each with its name as `part` behind its place in the
    stack: a store gives series by name. What is neither weights nor pool, the bars have."""
    summed = {name: f"sum({selection.series(*of_it)})" for name, of_it in STACKED.items()}
    summed["GPU memory"] = total_over_time(selection)
    return together(
        {f"{place:02} {name}": each for place, (name, each) in enumerate(summed.items())}
    )


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


def on_selected(selection: Selection, expression: str) -> str:
    """Of the GPUs that hold a selected rank."""
    selected = selection.series("sglang_weight_resident_bytes")
    return f"({expression} and on ({GPU}) {selected})"


def room(selection: Selection) -> str:
    """Bytes of each GPU that nobody had at the worst moment of the last minute."""
    whole, used = (
        selection.of_targets(f"sglang_gpu_memory_{each}_bytes") for each in ("total", "used_max")
    )
    return on_selected(selection, f"{whole} - {used}")


def room_after_resume(selection: Selection) -> str:
    """What is free now less what ranks take when they resume, of GPUs on which something is
    released."""
    whole, used, back = (
        selection.of_targets(f"sglang_gpu_memory_{each}_bytes")
        for each in ("total", "used", "resume")
    )
    return on_selected(selection, f"{whole} - {used} - {back}")


def least_room(selection: Selection) -> dict[str, str]:
    """The GPUs with the least, and how much more it is in an hour at the pace of the range. The
    pace is of as many points as a graph has: all samples of a week are too many for a store."""
    least = f"bottomk({TOP}, {room(selection)})"
    used = selection.of_targets("sglang_gpu_memory_used_max_bytes")
    pace = f"(-3600 * deriv({used}[$__range:$__interval]) and on ({GPU}) {least})"
    return {"Room": index_named(least), "In an hour": index_named(pace)}


def index_named(expression: str) -> str:
    """`where` of NVML's series, which have the index: pod or host, and GPU or MIG instance."""
    placed = f'label_replace({host(expression)}, "place", "GPU $1", "gpu", "(.*)")'
    placed = f'label_replace({placed}, "place", "$1", "gpu_uuid", "(MIG-.{{8}}).*")'
    return f"max by (where) ({named(placed, 'cluster', 'host', 'place')})"


def room_in_tokens(selection: Selection) -> str:
    """That room as tokens of each engine's KV pools, drafts' pools included; its fullest GPU."""
    rank = f"{ENGINE}, tp_rank, pp_rank, dp_rank, gpu_uuid"
    capacity = selection.series("sglang_kv_pool_tokens", 'pool=~"full|unified"')
    of_a_token = (
        f"(sum by ({rank}) ({selection.series('sglang_kv_pool_bytes')})"
        f" / max by ({rank}) ({capacity}))"
    )
    tokens = f"{room(selection)} / on ({GPU}) group_right () {of_a_token}"
    return f"({tokens})"


def parts_named(expression: str) -> str:
    """`is`: what a reader calls it. What matches later goes before."""
    found = f'label_join({expression}, "is", " ", "__name__", "role", "part")'
    for name, pattern in NAMES.items():
        found = f'label_replace({found}, "is", "{name}", "is", "{pattern}")'
    return found


def chosen(selection: Selection) -> str:
    """The GPUs with the most memory in use."""
    resident = selection.series("sglang_weight_resident_bytes")
    used = f"sglang_gpu_memory_used_bytes{{{selection.narrowed}}}"
    used = f"max by ({GPU}) ({used} and on ({GPU}) {resident})"
    return f"topk({FULLEST}, {used} or on ({GPU}) sum by ({GPU}) ({resident}))"


def of_chosen() -> Selection:
    """Ranks on the GPUs that the variable has, so that a store reads no series of the others; and
    ranks without one."""
    return replace(ENGINES, narrowed='gpu_uuid=~"($fullest).*|"')


def fullest(selection: Selection) -> str:
    """Parts of the GPUs with the most memory in use, in one query, each with its name as `part`;
    they add up to NVML's total. What is chosen is chosen first: of thousands of GPUs all that
    follows is of a few.

    `where` is what people recognise: cluster, pod or host, and NVML's index of the GPU; without
    NVML, and for a MIG instance, the head of the UUID; without a GPU the word CPU.
    """
    resident = selection.series("sglang_weight_resident_bytes")
    these = chosen(selection)

    def of_these(series: str, *more: str) -> str:
        return f"{', '.join([GPU, *more])}) ({series} and on ({GPU}) {these})"

    def nvml(metric: str, *more: str) -> str:
        """`max` forgives a GPU that is scraped twice."""
        return f"max by ({of_these(f'{metric}{{{selection.narrowed}}}', *more)}"

    whole, used = (nvml(f"sglang_gpu_memory_{each}_bytes") for each in ("total", "used"))
    held_by = f"sum by ({of_these(held(selection), '__name__', 'role', 'part')}"
    parts = f"sum by ({GPU}, is) ({parts_named(held_by)}) or " + together(
        {
            "Everything else in use": (
                f"clamp_min({used} - on ({GPU}) sum by ({of_these(held(selection))}, 0)"
            ),
            "Free": free(whole, used),
        },
        "is",
    )
    index = (
        f"label_replace(label_replace({nvml('sglang_gpu_memory_total_bytes', 'gpu')} > bool 0,"
        ' "place", "GPU $1", "gpu", "(.*)"), "place", "$1", "gpu_uuid", "(MIG-.{8}).*")'
    )
    without_index = (
        f'label_replace(label_replace(group by ({of_these(resident)}, "place", "$1",'
        ' "gpu_uuid", "(.{1,12}).*"), "place", "CPU", "gpu_uuid", "")'
    )
    # One series a GPU on both sides: where one of the left ends, VictoriaMetrics goes on with the
    # values of whatever matches it on the right.
    place = f"({index} or on ({GPU}) {without_index})"
    placed = f"(({parts}) * on ({GPU}) group_left (place) {place})"
    return f"sum by (where, gpu_uuid, is) ({named(host(placed), 'cluster', 'host', 'place')})"
