# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What updates have changed in the bytes of weights, by class of layer."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from sglang_weight_exporter.records.base import Count, Record

#: What a tensor is for: attention, or what takes its place, such as a state-space mixer; the dense
#: part of what follows it, routers and shared experts included; routed experts.
Layer = Literal["attention", "mlp", "experts", "embedding", "norm", "other"]
LAYERS: tuple[Layer, ...] = get_args(Layer)


class ContentChanges(Record, frozen=True, kw_only=True):
    """Tensors that hold other bytes than before an update: how many, and how many bytes they have,
    memory that several share counted once. Of each class that the model has, 0 included."""

    tensors: dict[Layer, Count] = {}
    nbytes: dict[Layer, Count] = {}
    #: The first :data:`~sglang_weight_exporter.records.weights.NAMED_CHANGES` of them.
    names: tuple[str, ...] = ()


class ChangedRows(NamedTuple):
    """The same, with the rows of the table that changed."""

    changes: ContentChanges
    #: A bit a row.
    rows: int
    #: Whether every byte is as it was just before, garbage that a release had left included.
    same: bool
    #: Counts the tables of other names: rows of two of them are not the same tensors.
    table: int
