# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each rank holds."""

from __future__ import annotations

from ..colours import BEIGE, BLUE, CRIMSON, CYAN, GOLD, GREEN, OLIVE, VIOLET, YELLOW
from ..grafana import (
    NOT_LOADED,
    Json,
    dash,
    in_colour,
    override,
    queries,
    query,
    stacked_bars,
    table,
)
from ..queries import ENGINES, engines
from ..queries.engines import MOST

DTYPES = {
    "bfloat16": BLUE,
    "float16": CYAN,
    "float32": VIOLET,
    "float8_e4m3fn": GOLD,
    "float8_e8m0fnu": YELLOW,
    "float4_e2m1fn_x2": OLIVE,
    "int8": BEIGE,
    "uint8": CRIMSON,
    "int32": GREEN,
}
UNITS = {
    "Weights": "bytes",
    "Resident": "bytes",
    "Tensors": "none",
    "Regions": "none",
    "KV pool": "bytes",
    "KV tokens": "none",
    "Fingerprint": "none",
    "Last change": "dateTimeAsIso",
    "First load": "s",
}
#: Column to label and width in pixels, in the order in which they stand.
WORDS = {
    "Target": ("instance", 150),
    "Engine": ("engine", 80),
    "Role": ("role", 75),
    "Rank": ("rank", 80),
    "Device": ("device", 80),
    "Model path": ("model_path", 190),
    "Quantization": ("quantization", 120),
    "GPU": ("gpu_uuid", 360),
    "GPU model": ("gpu_name", 210),
    "Architecture": ("architecture", 190),
    "SGLang": ("sglang_version", 90),
    "torch": ("torch_version", 110),
}
WIDTHS = {"Last change": 170, "KV tokens": 100, "Fingerprint": 170, "First load": 95}
HIDDEN = ["Time", "__name__", "cluster", "namespace", "job", "pod", "host", "model_name"]
HIDDEN += ["tp_rank", "pp_rank", "dp_rank", "moe_ep_rank", "tp", "pp", "dp"]
HIDDEN += ["tp_size", "pp_size", "ep_size"]


def panels() -> list[Json]:
    targets = queries(engines.columns(ENGINES), instant=True, format="table")
    fields = {target["legendFormat"]: f"Value #{target['refId']}" for target in targets}
    labels = [label for label, _ in WORDS.values()]
    at = labels.index("model_path")
    order = [*labels[:at], *(fields[name] for name in UNITS), *labels[at:]]
    return [
        table(
            "What each rank holds",
            "One line a rank, role and device: how much memory its weights span, what its KV pool "
            "holds, and what is loaded, from where. Model path is the path at launch.",
            targets,
            [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": dict.fromkeys([*HIDDEN, fields["Facts"]], True),
                        "indexByName": {name: i for i, name in enumerate(order)},
                        "renameByName": {
                            **{label: name for name, (label, _) in WORDS.items()},
                            **{fields[name]: name for name in UNITS},
                        },
                    },
                },
            ],
            NOT_LOADED,
            dash(),
            *(override(name, custom__width=width) for name, (_, width) in WORDS.items()),
            *(
                override(name, unit=unit, custom__width=WIDTHS.get(name, 90))
                for name, unit in UNITS.items()
            ),
        ),
        stacked_bars(
            "Dtype mix",
            f"Bytes of weights by dtype, one bar a rank, of the {MOST} ranks with the most.",
            [query(engines.dtypes(ENGINES), instant=True, format="table")],
            [
                {
                    "id": "groupingToMatrix",
                    "options": {"columnField": "dtype", "rowField": "on", "valueField": "Value"},
                },
            ],
            "on\\dtype",
            NOT_LOADED,
            *(in_colour(name, colour) for name, colour in DTYPES.items()),
            width=14,
            height=12,
            legend="bottom",
        ),
        table(
            "Who else touched weights",
            "Calls in the time range that read, saved, sent or checked weights, or loaded adapters "
            "or opened update groups, summed over ranks; failed ones apart.",
            queries(engines.operations(ENGINES), instant=True, format="table"),
            [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": {"Time": True},
                        "indexByName": {"operation": 0, "Value #A": 1, "Value #B": 2},
                        "renameByName": {
                            "operation": "Operation",
                            "Value #A": "Done",
                            "Value #B": "Failed",
                        },
                    },
                },
                {"id": "sortBy", "options": {"sort": [{"field": "Operation", "desc": False}]}},
            ],
            "No such call in this time range",
            dash(),
            *(override(name, unit="short", custom__width=80) for name in ("Done", "Failed")),
            width=10,
            height=12,
            filterable=False,
        ),
    ]
