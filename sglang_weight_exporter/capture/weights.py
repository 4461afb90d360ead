# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A model's tensors → the pointer table and the bytes per device, kind and dtype.

This runs inside the engine, between the last byte of an update and the first token after it, so
the loop is written for speed: one pass over the tensors, one append a column, no object a tensor.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_weight_exporter.capture.regions import AllocationMap, Regions, merge_spans
from sglang_weight_exporter.records import Kind, WeightTable, WeightUsage, table_sha256


def named_tensors(model: torch.nn.Module) -> tuple[list[str], list[torch.Tensor], int]:
    """Names and tensors of every parameter, then of every buffer; and how many are parameters.

    Unlike ``named_parameters()`` a tied tensor appears under all its names. Wrapper subclasses
    (DTensor, torchao's quantized tensors) own no memory themselves and are replaced by the
    tensors inside them, named ``NAME.INNER``.
    """
    parameters: tuple[list[str], list[torch.Tensor]] = ([], [])
    buffers: tuple[list[str], list[torch.Tensor]] = ([], [])
    is_wrapper = _IsWrapper()
    stack: list[tuple[str, torch.nn.Module, tuple[int, ...]]] = [("", model, ())]
    while stack:
        prefix, module, ancestors = stack.pop()
        for (names, tensors), own in (parameters, module._parameters), (buffers, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if is_wrapper[type(tensor)]:
                    for inner_name, inner in _flattened(prefix + name, tensor):
                        names.append(inner_name)
                        tensors.append(inner)
                else:
                    names.append(prefix + name)
                    tensors.append(tensor)
        if module._modules:
            path = (*ancestors, id(module))
            for name, child in reversed(module._modules.items()):
                if child is not None and id(child) not in path:
                    stack.append((f"{prefix}{name}.", child, path))
    return parameters[0] + buffers[0], parameters[1] + buffers[1], len(parameters[0])


class _IsWrapper(dict[type, bool]):
    """By type: asking a tensor for an attribute that it lacks costs more than reading it."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = hasattr(kind, "__tensor_flatten__")
        return self[kind]


def _flattened(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, attribute)
        if isinstance(inner, torch.Tensor):  # DTensor names its device mesh among them.
            yield from _flattened(f"{name}.{attribute}", inner)


def _codes() -> defaultdict[Any, int]:
    """Numbers values by first appearance, at the speed of a dictionary."""
    return defaultdict(itertools.count().__next__)


@dataclass(frozen=True)
class WeightCapture:
    """What one look at a model found."""

    table: WeightTable
    usage: tuple[WeightUsage, ...]
    #: Address of each unique storage that was counted here.
    storages: frozenset[int]
    #: Addresses that were left out because they are counted elsewhere.
    counted_elsewhere: frozenset[int]
    #: Device name to number of regions.
    regions: dict[str, int]


def capture_weights(
    model: torch.nn.Module,
    *,
    role: str,
    captured_at: float,
    counted_elsewhere: frozenset[int] = frozenset(),
    allocations: Callable[[], AllocationMap] = AllocationMap.of_storages,
    previous: WeightCapture | None = None,
) -> WeightCapture:
    """Read the table of a model.

    ``counted_elsewhere``: storages that are counted already, by another role (a draft model uses
    the target's embeddings) or another process (a weight-cache daemon); they are rows of the table
    and add no bytes but ``shared`` ones.
    ``allocations``: asked for the boundaries of regions, and only when the table differs from
    ``previous``, because that costs more than the table itself.
    """
    names, tensors, parameters = named_tensors(model)
    dtypes, shapes, strides, devices, kinds = _codes(), _codes(), _codes(), _codes(), _codes()
    storages = [tensor.untyped_storage() for tensor in tensors]
    columns = {
        "data_ptr": np.array([tensor.data_ptr() for tensor in tensors], dtype="<u8"),
        "nbytes": np.array([tensor.nbytes for tensor in tensors], dtype="<u8"),
        "storage_ptr": np.array([storage.data_ptr() for storage in storages], dtype="<u8"),
        "storage_nbytes": np.array([storage.nbytes() for storage in storages], dtype="<u8"),
        "dtype": np.array([dtypes[tensor.dtype] for tensor in tensors], dtype="<u4"),
        "shape": np.array([shapes[tensor.shape] for tensor in tensors], dtype="<u4"),
        "stride": np.array([strides[tensor.stride()] for tensor in tensors], dtype="<u4"),
        "device": np.array([devices[tensor.device] for tensor in tensors], dtype="<u4"),
        "kind": np.array(
            [kinds["parameter" if row < parameters else "buffer"] for row in range(len(names))],
            dtype="<u4",
        ),
    }
    for device, code in devices.items():
        if device.type == "meta":  # Has a size and no memory.
            columns["nbytes"][columns["device"] == code] = 0
            columns["storage_nbytes"][columns["device"] == code] = 0
    dtype_values = tuple(str(value).removeprefix("torch.") for value in dtypes)
    device_values = tuple(str(value) for value in devices)
    kind_values: tuple[Kind, ...] = tuple(kinds)
    fields: dict[str, Any] = {
        "rows": len(names),
        "names": "\n".join(names).encode(),
        **{name: column.tobytes() for name, column in columns.items()},
        "dtype_values": dtype_values,
        "shape_values": tuple(tuple(value) for value in shapes),
        "stride_values": tuple(strides),
        "device_values": device_values,
        "kind_values": kind_values,
    }
    sha256 = table_sha256(fields)
    if (
        previous is not None
        and previous.table.sha256 == sha256
        and previous.counted_elsewhere == counted_elsewhere
    ):
        return replace(
            previous, table=msgspec.structs.replace(previous.table, captured_at=captured_at)
        )
    regions = _regions(columns, fields["stride_values"], fields["shape_values"], allocations)
    usage, counted = _usage(columns, dtype_values, device_values, kind_values, counted_elsewhere)
    return WeightCapture(
        table=WeightTable(
            role=role,
            captured_at=captured_at,
            sha256=sha256,
            region_ptr=regions.ptr.tobytes(),
            region_nbytes=regions.nbytes.tobytes(),
            region_device=regions.device.tobytes(),
            **fields,
        ),
        usage=usage,
        storages=counted,
        counted_elsewhere=counted_elsewhere,
        regions=dict(
            zip(
                device_values,
                np.bincount(regions.device, minlength=len(device_values)).tolist(),
                strict=True,
            )
        ),
    )


def storages_of(model: torch.nn.Module) -> frozenset[int]:
    """Addresses of the storages behind a model's tensors, as ``WeightCapture.storages``."""
    _, tensors, _ = named_tensors(model)
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors) - {0}


def _regions(
    columns: dict[str, Any],
    stride_values: tuple[tuple[int, ...], ...],
    shape_values: tuple[tuple[int, ...], ...],
    allocations: Callable[[], AllocationMap],
) -> Regions:
    pairs = list(zip(columns["shape"].tolist(), columns["stride"].tolist(), strict=True))
    dense = {
        (shape, stride): _is_dense(shape_values[shape], stride_values[stride])
        for shape, stride in set(pairs)
    }
    # The span of a tensor with holes is not its nbytes: its whole storage stands for it.
    whole = np.array([not dense[pair] for pair in pairs], dtype=bool)
    return merge_spans(
        start=np.where(whole, columns["storage_ptr"], columns["data_ptr"]),
        nbytes=np.where(whole, columns["storage_nbytes"], columns["nbytes"]),
        allocation=allocations().lookup(columns["storage_ptr"]),
        device=columns["device"],
    )


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill a run of memory, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def _usage(
    columns: dict[str, Any],
    dtype_values: tuple[str, ...],
    device_values: tuple[str, ...],
    kind_values: tuple[Kind, ...],
    counted_elsewhere: frozenset[int],
) -> tuple[tuple[WeightUsage, ...], frozenset[int]]:
    group = (columns["device"].astype(np.int64) * len(kind_values) + columns["kind"]) * len(
        dtype_values
    ) + columns["dtype"]
    groups = len(device_values) * len(kind_values) * len(dtype_values)
    tensors = np.bincount(group, minlength=groups)
    unique, first, inverse = np.unique(
        columns["storage_ptr"], return_index=True, return_inverse=True
    )
    size = np.zeros(len(unique), dtype=np.uint64)
    np.maximum.at(size, inverse.reshape(-1), columns["storage_nbytes"])
    size[unique == 0] = 0
    nbytes = np.zeros(groups, dtype=np.uint64)
    shared = np.zeros(groups, dtype=np.uint64)
    if counted_elsewhere:
        elsewhere = np.isin(unique, np.fromiter(counted_elsewhere, dtype=np.uint64))
        np.add.at(shared, group[first[elsewhere]], size[elsewhere])
        size[elsewhere] = 0
    np.add.at(nbytes, group[first], size)
    usage = tuple(
        WeightUsage(
            device=device_values[index // (len(dtype_values) * len(kind_values))],
            kind=kind_values[index // len(dtype_values) % len(kind_values)],
            dtype=dtype_values[index % len(dtype_values)],
            nbytes=int(nbytes[index]),
            tensors=int(tensors[index]),
            shared=int(shared[index]),
        )
        for index in range(groups)
        if tensors[index]
    )
    return usage, frozenset(unique[size > 0].tolist())
