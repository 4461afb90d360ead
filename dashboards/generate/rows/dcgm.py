# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Joined with dcgm-exporter's metrics."""

from __future__ import annotations

from ..colours import SPREAD
from ..grafana import NO_DCGM, Json, query, text, timeseries
from ..queries import ENGINES, neighbours, spread


def panels() -> list[Json]:
    return [
        timeseries(
            "Weights' share of used framebuffer",
            "Resident weights over DCGM_FI_DEV_FB_USED, joined by the GPU's UUID: the GPU with the "
            "most and the one in the middle.",
            [query(spread(neighbours.share_of_framebuffer(ENGINES), worst="max"), "{{part}}")],
            "percentunit",
            NO_DCGM,
            colours=SPREAD,
            width=8,
            maximum=1,
        ),
        timeseries(
            "Framebuffer that is neither weights nor KV",
            "DCGM_FI_DEV_FB_USED minus weights, LoRA slots and KV pool: activations, CUDA graphs, "
            "contexts, other processes; most and median. Growth here while the "
            "rest stands still is a leak.",
            [query(spread(neighbours.rest_of_framebuffer(ENGINES), worst="max"), "{{part}}")],
            "bytes",
            NO_DCGM,
            colours=SPREAD,
            width=8,
        ),
        text(
            "When these panels are empty",
            "These two need [dcgm-exporter](https://github.com/NVIDIA/dcgm-exporter) scraped by "
            "the same Prometheus.\n\n"
            "* dcgm-exporter listens on **:9400**, as this exporter does. On one host set "
            "`SGLANG_WEIGHT_EXPORTER_PORT`, or start dcgm-exporter with `--address :9401`.\n"
            "* The join is `gpu_uuid` = dcgm's `UUID`. MIG instances, which share one, are left "
            "out.\n"
            "* `DCGM_FI_DEV_FB_USED` has to stay in its counters file.",
            8,
            8,
        ),
    ]
