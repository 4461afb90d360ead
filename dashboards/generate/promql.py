# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of Prometheus: the selection, and what several panels are built of."""

from __future__ import annotations

# What every per-rank series is narrowed by. "All" is `.*`, which also matches the empty gpu_uuid
# of a CPU engine.
SELECTED = (
    'instance=~"$instance", model_name=~"$model", engine=~"$engine", role=~"$role", '
    'gpu_uuid=~"$gpu"'
)
RANK = (
    "instance, model_name, engine, role, tp_rank, pp_rank, dp_rank, moe_ep_rank, device, gpu_uuid"
)
ENGINE = "instance, model_name, engine"


def select(metric: str, extra: str = "") -> str:
    return f"{metric}{{{SELECTED}{', ' + extra if extra else ''}}}"


def by_name(name_regex: str) -> str:
    """All series whose names match, in one selector: a missing one (no LoRA) is not a gap."""
    return f'{{__name__=~"{name_regex}", {SELECTED}}}'


TARGET = 'role="target"'
OURS = "sglang_weight_resident_bytes|sglang_lora_pool_bytes|sglang_kv_pool_resident_bytes"


def per_gpu(expression: str) -> str:
    return f"sum by (instance, gpu_uuid) ({expression})"


def nvml(metric: str) -> str:
    """An NVML series of the GPUs that hold a selected rank; `max` forgives a GPU scraped twice."""
    return (
        f"(max by (instance, gpu_uuid) ({metric})"
        f" and on (instance, gpu_uuid) {select('sglang_weight_resident_bytes')})"
    )


def labelled(per_gpu_expression: str) -> str:
    """One label, `where`, that people recognise: the target and NVML's index of the GPU; without
    NVML, and for a MIG instance, the head of the UUID; without a GPU the word CPU."""
    index = (
        "label_replace(label_replace(max by (instance, gpu_uuid, gpu)"
        " (sglang_gpu_memory_total_bytes) > bool 0,"
        ' "place", "GPU $1", "gpu", "(.*)"), "place", "$1", "gpu_uuid", "(MIG-.{8}).*")'
    )
    without_index = (
        f'label_replace(label_replace({per_gpu_expression}, "place", "$1",'
        ' "gpu_uuid", "(.{12}).*"), "place", "CPU", "gpu_uuid", "")'
    )
    return (
        f"sum by (where) (label_join({per_gpu_expression}"
        f" * on (instance, gpu_uuid) group_left (place) {index}"
        f" or on (instance, gpu_uuid) {without_index},"
        ' "where", " ", "instance", "place"))'
    )


def happened(counter: str, extra: str = "") -> str:
    """Growth of a counter from one point of the graph to the next: whole numbers, each event in
    exactly one point. increase() would extrapolate, and count an event in several points or none.
    """
    now = select(counter, extra)
    return f"clamp_min({now} - {now} offset $__interval, 0)"


def reloads_by_source(counter: str) -> str:
    """Counted once an engine: every rank of it counts the same reload. A source without any in
    the whole range is left out."""
    any_in_range = f"sum by (source) (increase({select(counter, TARGET)}[$__range] @ end())) > 0"
    return (
        f"sum by (source) (max by ({ENGINE}, source) ({happened(counter, TARGET)}))"
        f" and on (source) {any_in_range}"
    )


def reloads_in_range(counter: str) -> str:
    per_engine = f"max by ({ENGINE}, source) (increase({select(counter, TARGET)}[$__range]))"
    return f"sum(round({per_engine}))"


RELOADED_AT = (
    f"max by ({ENGINE}) ({select('sglang_weight_last_update_timestamp_seconds')}"
    f" > {select('sglang_weight_loaded_timestamp_seconds')})"
)

GPU_SPLIT = {
    # An encoder's are part of the target, and a weight-cache daemon's are all of it.
    "Target weights": per_gpu(select("sglang_weight_resident_bytes", 'role!~"draft.*"')),
    "Draft weights": per_gpu(select("sglang_weight_resident_bytes", 'role=~"draft.*"')),
    "LoRA": per_gpu(select("sglang_lora_pool_bytes")),
    "KV pool": per_gpu(select("sglang_kv_pool_resident_bytes")),
    "Everything else in use": (
        f"clamp_min({nvml('sglang_gpu_memory_used_bytes')}"
        f" - on (instance, gpu_uuid) {per_gpu(by_name(OURS))}, 0)"
    ),
    "Free": (
        f"({nvml('sglang_gpu_memory_total_bytes')}"
        f" - on (instance, gpu_uuid) {nvml('sglang_gpu_memory_used_bytes')})"
    ),
}

# SGLang's own series come from another port of the same host (or pod), so `instance` cannot match;
# the host part and SGLang's own rank labels do.
# (moe_ep_rank follows from tp_rank, and older releases of SGLang do not have it as a label.)
SGLANG_RANK = "host, model_name, tp_rank, pp_rank, dp_rank"


def host(expression: str) -> str:
    return f'label_replace({expression}, "host", "$1", "instance", "(.*?)(:[0-9]+)?")'


TARGET_KV = host(select("sglang_kv_pool_resident_bytes", TARGET))
KV_BYTES_BY_SGLANG_RANK = (
    f"(sum by ({SGLANG_RANK}) ({TARGET_KV})"
    # Two engines of one model on one host cannot be told apart by SGLang's labels: no answer.
    f" unless on ({SGLANG_RANK}) count by ({SGLANG_RANK}) ({TARGET_KV}) > 1)"
)
SGLANG_LEGEND = "{{host}} {{rank}}"


def ranked(expression: str) -> str:
    """One label for legends, as a label that a series lacks would show as its own name."""
    return f'label_join({expression}, "rank", "/", "tp_rank", "pp_rank", "dp_rank")'


# FB_* of dcgm-exporter is in MiB. Series of a GPU may come several times (one a pod): `max`.
# MIG instances share the parent's UUID and are left out.
FRAMEBUFFER_USED = 'max by (UUID) (DCGM_FI_DEV_FB_USED{GPU_I_ID="", UUID=~"$gpu"} * 1048576)'


def by_uuid(expression: str) -> str:
    return f'sum by (UUID) (label_replace({expression}, "UUID", "$1", "gpu_uuid", "(.+)"))'
