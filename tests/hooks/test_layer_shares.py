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


def held(layer: Any) -> tuple[list[tuple[int, int]], list[str]]:
    """First rows and numbers of rows, and what is not explained."""
    registrations = Registrations()
    table = capture_weights(
        layer, role="target", captured_at=1.0, registrations=registrations
    ).table
    found = capture_shares(layer, table, frozenset())
    shares = [(share.first_row, share.rows) for share in shares_of(found)]
    return shares, list(reasons_of(found).values())


def test_a_layer_that_is_only_called_otherwise_holds_the_same() -> None:
    """As the Transformers backend makes them (``replace_linear_class``)."""
    assert held(column_parallel()) == ([(8, 8)], [])
    otherwise = {"parent_cls": property(lambda self: None), "forward": lambda self, x: x}
    assert held(column_parallel(**otherwise)) == ([(8, 8)], [])


def test_a_layer_that_is_loaded_otherwise_is_not_explained() -> None:
    why = "HFCompatibleLinear may load it otherwise than ColumnParallelLinear"
    for name in ("weight_loader", "__init__"):
        loads = {name: lambda self, *given: torch.nn.Module.__init__(self)}
        assert held(column_parallel(**loads)) == ([], [why])
