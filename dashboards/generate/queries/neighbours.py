# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Joined with the metrics of others: SGLang's own and dcgm-exporter's."""

from __future__ import annotations

from . import TARGET, Selection, address
from .memory import OURS

# SGLang's own series come from another port of the same host (or pod): that port is our `engine`.
# (moe_ep_rank follows from tp_rank, and older releases of SGLang do not have it as a label.)
JOIN = "cluster, namespace, host, engine, model_name, tp_rank, pp_rank, dp_rank"


def of_sglang(metric: str) -> str:
    # SGLang's `sglang:` arrives as `sglang_` where Prometheus and the client library behind
    # SGLang agree on OpenMetrics, which knows no colons.
    series = (
        f'{{__name__=~"sglang[:_]{metric}", cluster=~"$cluster", namespace=~"$namespace",'
        ' model_name=~"$model"}'
    )
    by_port = f'label_replace({address(series)}, "engine", "$1", "instance", ".*:([0-9]+)")'
    return f"max by ({JOIN}) ({by_port})"


def tokens_a_second() -> str:
    """Of all engines. The gauge keeps its value while the scheduler is held, a counter does not."""
    counted = (
        '{__name__=~"sglang[:_]realtime_tokens_total", mode="decode", cluster=~"$cluster",'
        ' namespace=~"$namespace", model_name=~"$model"}'
    )
    return f"sum(rate({counted}[$__rate_interval])) or sum({of_sglang('gen_throughput')})"


def pool(selection: Selection) -> str:
    return f"sum by ({JOIN}) ({address(selection.series('sglang_kv_pool_resident_bytes', TARGET))})"


def kv_in_use(selection: Selection) -> dict[str, str]:
    """Of the ranks that both know."""
    used, held = of_sglang("token_usage"), pool(selection)
    return {
        "used": f"sum({used} * on ({JOIN}) {held})",
        "pool": f"sum({held} and on ({JOIN}) {used})",
    }


# FB_* of dcgm-exporter is in MiB. Series of a GPU may come several times (one a pod): `max`.
# MIG instances share the parent's UUID and are left out. No two GPUs have one UUID.
FRAMEBUFFER_USED = 'max by (UUID) (DCGM_FI_DEV_FB_USED{GPU_I_ID="", UUID=~"$gpu"} * 1048576)'


def by_uuid(expression: str) -> str:
    return f'sum by (UUID) (label_replace({expression}, "UUID", "$1", "gpu_uuid", "(.+)"))'


def share_of_framebuffer(selection: Selection) -> str:
    weights = by_uuid(selection.series("sglang_weight_resident_bytes"))
    return f"{weights} / on (UUID) {FRAMEBUFFER_USED}"


def rest_of_framebuffer(selection: Selection) -> str:
    return f"{FRAMEBUFFER_USED} - on (UUID) {by_uuid(selection.by_name(OURS))}"
