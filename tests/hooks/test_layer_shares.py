# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that derive from those of which it is known what they hold. What those hold themselves is
what ``tests/manifests`` and ``tests/zoo`` show with real ranks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from typing import Any  # noqa: E402

from sglang_weight_exporter.capture.references import Registrations  # noqa: E402
from sglang_weight_exporter.capture.weights import capture_weights  # noqa: E402
from sglang_weight_exporter.records.shares import reasons_of, shares_of  # noqa: E402
from sglang_weight_exporter.runners.layer_shares import capture_shares  # noqa: E402
from sglang_weight_exporter.verification.names import candidates  # noqa: E402
from sglang_weight_exporter.weight_table import WeightTable  # noqa: E402


def column_parallel(**members: Any) -> Any:
    """The second rank of two of SGLang's layer, or of one that derives from it."""

    def weight_loader(self: Any, parameter: Any, loaded: Any) -> None: ...

    base = type(
        "ColumnParallelLinear",
        (torch.nn.Module,),
        {"__module__": "sglang.srt.layers.linear", "weight_loader": weight_loader},
    )
    kind = type("HFCompatibleLinear", (base,), members) if members else base
    layer = kind()
    layer.tp_rank, layer.tp_size, layer.output_size = 1, 2, 16
    layer.weight = torch.nn.Parameter(torch.zeros(8, 4))
    return layer


def table_of(layer: Any) -> WeightTable:
    registrations = Registrations()
    return capture_weights(layer, role="target", captured_at=1.0, registrations=registrations).table


def held(layer: Any) -> tuple[list[tuple[int, int]], list[str]]:
    """First rows and numbers of rows, and what is not explained."""
    found = capture_shares(layer, table_of(layer), frozenset())
    shares = [(share.first_row, share.rows) for share in shares_of(found)]
    return shares, list(reasons_of(found).values())


def test_a_layer_that_is_only_called_otherwise_holds_the_same() -> None:
    """As the Transformers backend makes them (``replace_linear_class``)."""
    assert held(column_parallel()) == ([(8, 8)], [])
    otherwise = {"parent_cls": property(lambda self: None), "forward": lambda self, x: x}
    assert held(column_parallel(**otherwise)) == ([(8, 8)], [])


def test_an_expert_that_all_tokens_share_lies_behind_the_others() -> None:
    """``mlp.shared_expert.`` of Qwen3-Next and ``mlp.shared_experts`` of DeepSeek are loaded as the
    expert after the last (``models/qwen3_next.py``, ``deepseek_weight_loader.py``)."""
    base = type(
        "FusedMoE",
        (torch.nn.Module,),
        {"__module__": "sglang.srt.layers.moe.fused_moe_triton.layer"},
    )
    layer = base()
    layer.quant_method = type("UnquantizedFusedMoEMethod", (), {})()
    layer.moe_ep_rank, layer.moe_tp_rank, layer.moe_tp_size = 0, 1, 2
    layer.intermediate_size_per_partition, layer.num_fused_shared_experts = 4, 1
    layer.w2_weight = torch.nn.Parameter(torch.zeros(3, 16, 4))
    shares = shares_of(capture_shares(layer, table_of(layer), frozenset()))
    assert [(each.part, each.offset, each.first_column) for each in shares] == [
        ("0.w2", 0, 2),
        ("1.w2", 256, 2),
        ("shared.w2", 512, 2),
    ]
    names = [each.name for each in candidates("model.layers.0.mlp.experts.w2_weight", "shared.w2")]
    assert names == [
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "model.layers.0.mlp.shared_experts.down_proj.weight",
    ]


def test_a_layer_that_is_loaded_otherwise_is_not_explained() -> None:
    why = "HFCompatibleLinear may load it otherwise than ColumnParallelLinear"
    for name in ("weight_loader", "__init__"):
        loads = {name: lambda self, *given: torch.nn.Module.__init__(self)}
        assert held(column_parallel(**loads)) == ([], [why])
