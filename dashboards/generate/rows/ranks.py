# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each rank holds."""

from __future__ import annotations

from ..grafana import (
    NOT_LOADED,
    Json,
    override,
    queries,
    query,
    row,
    stacked_bars,
    table,
    timeseries,
)
from ..promql import (
    ENGINE,
    RANK,
    TARGET,
    happened,
    ranked,
    select,
)


def ranks() -> list[Json]:
    def rank_sum(metric: str) -> str:
        return f"sum by ({RANK}) ({select(metric)})"

    columns = {
        "Facts": (
            f"label_join({select('sglang_weight_info')},"
            ' "rank", "/", "tp_rank", "pp_rank", "dp_rank", "moe_ep_rank")'
        ),
        "Weights": rank_sum("sglang_weight_bytes"),
        "Tensors": rank_sum("sglang_weight_tensors"),
        "Regions": rank_sum("sglang_weight_regions"),
        "KV pool": rank_sum("sglang_kv_pool_bytes"),
        "KV tokens": f"max by ({RANK}) ({select('sglang_kv_pool_tokens')})",
        "KV bytes a token": (
            f"sum by ({RANK}) ({select('sglang_kv_pool_bytes')}"
            f" / {select('sglang_kv_pool_tokens')})"
        ),
        "Weight version": f"max by ({RANK}) ({select('sglang_weight_version')})",
        "Last change": (
            f"max by ({RANK}) ({select('sglang_weight_last_update_timestamp_seconds')}) * 1000"
        ),
        "Resident": rank_sum("sglang_weight_resident_bytes"),
        "Load time": f"max by ({RANK}) ({select('sglang_weight_load_duration_seconds')})",
    }
    targets = queries(columns, instant=True, format="table")
    letters = {target["legendFormat"]: f"Value #{target['refId']}" for target in targets}
    units = {
        "Weights": "bytes",
        "Resident": "bytes",
        "KV pool": "bytes",
        "KV bytes a token": "bytes",
        "Last change": "dateTimeAsIso",
        "Load time": "s",
        "Tensors": "none",
        "Regions": "none",
        "KV tokens": "none",
        "Weight version": "none",
    }
    widths = {
        "Target": 130,
        "Engine": 85,
        "Role": 75,
        "TP/PP/DP/EP": 120,
        "Device": 85,
        "GPU": 125,
        "Model path": 190,
        "Weights": 100,
        "Tensors": 95,
        "Regions": 95,
        "KV pool": 100,
        "KV tokens": 110,
        "KV bytes a token": 155,
        "Weight version": 140,
        "Last change": 165,
        "Resident": 105,
        "Load time": 110,
    }
    order = [
        "instance",
        "engine",
        "role",
        "rank",
        "device",
        "gpu_uuid",
        "model_path",
        *(letters[name] for name in list(columns)[1:]),
        "quantization",
        "architecture",
        "gpu_name",
        "sglang_version",
        "torch_version",
    ]
    hidden = ["Time", "__name__", "job", "model_name", "tp_rank", "pp_rank", "dp_rank"]
    hidden += ["moe_ep_rank", "pci_bus_id", letters["Facts"]]
    renamed = {
        "instance": "Target",
        "engine": "Engine",
        "role": "Role",
        "rank": "TP/PP/DP/EP",
        "device": "Device",
        "gpu_uuid": "GPU",
        "model_path": "Model path",
        "quantization": "Quantization",
        "architecture": "Architecture",
        "gpu_name": "GPU model",
        "sglang_version": "SGLang",
        "torch_version": "torch",
    }
    bar = ranked(select("sglang_weight_bytes"))
    dtypes = query(
        "sum by (where, dtype)"
        f' (label_join({bar}, "where", " ", "instance", "engine", "role", "rank"))',
        instant=True,
        format="table",
    )
    return row(
        "Ranks",
        table(
            "What each rank holds",
            "One line a rank, role and device: what is loaded, from where, how much memory it "
            "spans, and what its KV pool holds. Model path is the path at launch.",
            targets,
            [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": dict.fromkeys(hidden, True),
                        "indexByName": {name: i for i, name in enumerate(order)},
                        "renameByName": {
                            **renamed,
                            **{letters[name]: name for name in list(columns)[1:]},
                        },
                    },
                },
            ],
            NOT_LOADED,
            # The words for an empty panel are not meant for an empty cell.
            {
                "matcher": {"id": "byRegexp", "options": "/.*/"},
                "properties": [{"id": "noValue", "value": "-"}],
            },
            *(override(name, unit=unit) for name, unit in units.items()),
            *(override(name, custom__width=width) for name, width in widths.items()),
        ),
        stacked_bars(
            "Dtype mix",
            "Bytes of weights by dtype, one bar a rank (target, engine, role, TP/PP/DP).",
            [dtypes],
            [
                {
                    "id": "groupingToMatrix",
                    "options": {"columnField": "dtype", "rowField": "where", "valueField": "Value"},
                },
            ],
            "where\\dtype",
            NOT_LOADED,
            share=False,
            width=9,
            height=8,
        ),
        timeseries(
            "KV capacity in tokens",
            "Tokens that each engine's KV pools can hold. Tensor and pipeline ranks hold parts of "
            "the same tokens and count once, data-parallel ranks add up.",
            [
                query(
                    f"sum by ({ENGINE}, pool) (max by ({ENGINE}, pool, dp_rank)"
                    f" ({select('sglang_kv_pool_tokens', TARGET)}))",
                    "{{instance}} {{engine}} {{pool}}",
                )
            ],
            "short",
            "No KV pool allocated yet",
            width=8,
        ),
        timeseries(
            "Who else touched weights",
            "Calls that read, save, send or check weights, or load adapters or open update groups, "
            "summed over ranks; failed ones apart.",
            [
                query(
                    f"sum by (operation) ({happened('sglang_weight_operations_total')})",
                    "{{operation}}",
                ),
                query(
                    f"sum by (operation) ({happened('sglang_weight_operation_failures_total')})",
                    "failed: {{operation}}",
                    ref="B",
                ),
            ],
            "short",
            NOT_LOADED,
            width=7,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
    )
