# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A model's tensors → the pointer table and the bytes per device, kind and dtype.

This runs inside the engine, between the last byte of an update and the first token after it, so
the loop is written for speed: one pass a column, no object a tensor.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.references import Registrations
from sglang_weight_exporter.capture.regions import Regions, merge_spans
from sglang_weight_exporter.capture.tensors import (
    DerivedPaths,
    NamedTensors,
    PreviousCapture,
    named_tensors,
)
from sglang_weight_exporter.records.weights import Kind, WeightUsage
from sglang_weight_exporter.weight_table import (
    CODED,
    HASHED,
    WeightTable,
    is_dense,
    table_sha256,
)

StorageRanges: TypeAlias = tuple[
    npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.bool_]
]


def _no_ranges() -> StorageRanges:
    return np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool)


@dataclass(frozen=True)
class WeightCapture:
    """What one capture of a model has found."""

    table: WeightTable
    usage: tuple[WeightUsage, ...]
    #: Addresses that were left out because they are counted elsewhere.
    counted_elsewhere: frozenset[int]
    #: Device name to number of regions.
    regions: dict[str, int]
    #: Device name to bytes that keep their memory while SGLang's memory saver has released the
    #: weights: what lies outside of its regions, and what is not on a GPU.
    outside_saver: dict[str, int]
    #: Why tensors have no row, a sentence each: they have no storage (uninitialized, sparse).
    unreadable: tuple[str, ...] = ()
    #: Address and bytes of each storage that was counted here, and whether it is derived.
    ranges: StorageRanges = field(default_factory=_no_ranges, repr=False, compare=False)
    #: Names of buffers that torch does not count to the model's state.
    not_persistent: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    #: Where derived weights hang.
    derived: DerivedPaths = field(default_factory=DerivedPaths, repr=False, compare=False)
    remembered: PreviousCapture | None = field(default=None, repr=False, compare=False)

    @cached_property
    def storages(self) -> frozenset[int]:
        """Address of each unique storage that was counted here."""
        return frozenset(self.ranges[0].tolist())


def capture_weights(
    model: torch.nn.Module,
    *,
    role: str,
    captured_at: float,
    counted_elsewhere: frozenset[int] = frozenset(),
    segments: Callable[[], Segments] = Segments.none,
    previous: WeightCapture | None = None,
    derived: DerivedPaths | None = None,
    registrations: Registrations | None = None,
) -> WeightCapture:
    """Read the table of a model.

    ``counted_elsewhere``: storages that are counted already, by another role (a draft model uses
    the target's embeddings) or another process (a weight-cache daemon); they are rows of the table
    and add no bytes but ``shared`` ones.
    ``segments``: asked for the boundaries of regions, and only when the table differs from
    ``previous``, because that costs more than the table itself.
    ``derived``: where derived weights hang; ``None``: where ``previous`` has them, or wherever
    there is a tensor. Nothing is read again if nothing has changed.
    ``registrations``: of the process; without them the modules are walked each time.
    """
    if derived is None:
        derived = DerivedPaths.of(model) if previous is None else previous.derived
    known = None
    if previous is not None and previous.derived is derived:
        known = previous.remembered
    now = None if known is None else _capture_again(known, model)
    unreadable: tuple[str, ...] = ()
    remembered: PreviousCapture | None = None
    if previous is not None and now is not None:
        if now is known and previous.counted_elsewhere == counted_elsewhere:
            return _again(previous, captured_at)
        remembered, not_persistent = now, previous.not_persistent
        columns, fields = _moved(previous.table, now)
    else:
        found = named_tensors(model, derived.paths)
        not_persistent = found.not_persistent
        columns, values, unreadable = _columns(found)
        fields = _fields(columns, values)
        if not unreadable:
            remembered = _remembered(model, found, derived, columns, values, registrations)
    sha256 = table_sha256(fields)
    if (
        previous is not None
        and previous.table.sha256 == sha256
        and previous.counted_elsewhere == counted_elsewhere
    ):
        again = _again(previous, captured_at)
        return replace(again, not_persistent=not_persistent, derived=derived, remembered=remembered)
    table = WeightTable(role=role, captured_at=captured_at, sha256=sha256, **fields)
    made = _weight_capture(table, columns, counted_elsewhere, segments())
    return replace(
        made,
        unreadable=unreadable,
        not_persistent=not_persistent,
        derived=derived,
        remembered=remembered,
    )


def _weight_capture(
    table: WeightTable,
    columns: dict[str, npt.NDArray[Any]],
    counted_elsewhere: frozenset[int],
    segments: Segments,
) -> WeightCapture:
    """What follows from a table: its regions, and the bytes of unique storages."""
    regions = _regions(columns, table.stride_values, table.shape_values, segments)
    usage, ranges, outside_saver = _usage(
        columns,
        table.dtype_values,
        table.device_values,
        cast("tuple[Kind, ...]", table.kind_values),
        counted_elsewhere,
        segments,
    )
    counts = np.bincount(regions.device, minlength=len(table.device_values)).tolist()
    return WeightCapture(
        table=msgspec.structs.replace(
            table,
            region_ptr=regions.ptr.tobytes(),
            region_nbytes=regions.nbytes.tobytes(),
            region_device=regions.device.tobytes(),
        ),
        usage=usage,
        counted_elsewhere=counted_elsewhere,
        regions=dict(zip(table.device_values, counts, strict=True)),
        outside_saver=outside_saver,
        ranges=ranges,
    )


def _fields(columns: dict[str, npt.NDArray[Any]], values: dict[str, Any]) -> dict[str, Any]:
    """Of a table, from its columns."""
    return {
        "rows": len(columns["kind"]),
        "names": joined(values["names"]),
        **{name: column.tobytes() for name, column in columns.items()},
        "dtype_values": tuple(str(value).removeprefix("torch.") for value in values["dtype"]),
        "shape_values": tuple(map(tuple, values["shape"])),
        "stride_values": tuple(values["stride"]),
        "device_values": tuple(str(value) for value in values["device"]),
        "kind_values": tuple(values["kind"]),
    }


def _remembered(
    model: torch.nn.Module,
    found: NamedTensors,
    derived: DerivedPaths,
    columns: dict[str, npt.NDArray[Any]],
    values: dict[str, Any],
    registrations: Registrations | None,
) -> PreviousCapture | None:
    return PreviousCapture.of(
        model,
        found,
        derived,
        data_ptr=columns["data_ptr"].tolist(),
        shape=_decoded(columns["shape"], values["shape"]),
        dtype=_decoded(columns["dtype"], values["dtype"]),
        storage_ptr=columns["storage_ptr"].tolist(),
        storage_nbytes=columns["storage_nbytes"].tolist(),
        registrations=registrations,
    )


def in_pools_of_weights(
    model: torch.nn.Module, derived: DerivedPaths, segments: Segments
) -> DerivedPaths:
    """Without tensors in pools that no parameter or buffer lies in: those are captured graphs'.
    torch's default pool may hold weights. So what is read for a fingerprint is there whenever
    weights are: SGLang's memory saver may release graphs without them."""
    found = named_tensors(model).tensors
    pools = set(segments.pool_of(_storage_ptrs(found)).tolist()) | {-1}
    tensors = [(index, each) for index, each in enumerate(derived.tensors()) if each is not None]
    there = segments.pool_of(_storage_ptrs([tensor for _, tensor in tensors])).tolist()
    kept = [index for (index, _), pool in zip(tensors, there, strict=True) if pool in pools]
    return derived if len(kept) == len(derived.paths) else derived.only(kept)


def _storage_ptrs(tensors: Iterable[torch.Tensor]) -> npt.NDArray[np.uint64]:
    readable = (0 if obstacle(each) else each.untyped_storage().data_ptr() for each in tensors)
    return np.fromiter(readable, dtype=np.uint64)


def _capture_again(known: PreviousCapture, model: torch.nn.Module) -> PreviousCapture | None:
    """``None`` too where a tensor is strange now: the whole capture finds out which one."""
    try:
        return known.capture(model)
    except Exception:
        return None


def _moved(
    table: WeightTable, now: PreviousCapture
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Columns and fields of a table whose tensors are elsewhere and otherwise the same."""
    addresses = {
        "data_ptr": np.array(now.data_ptr, dtype="<u8"),
        "storage_ptr": np.array(now.storage_ptr, dtype="<u8"),
        "storage_nbytes": np.array(now.storage_nbytes, dtype="<u8"),
    }
    codes = {name: np.frombuffer(getattr(table, name), dtype="<u4") for name in CODED}
    nbytes = np.frombuffer(table.nbytes, dtype="<u8")
    fields = {name: getattr(table, name) for name in ("rows", *HASHED)}
    fields.update((name, column.tobytes()) for name, column in addresses.items())
    return {**addresses, **codes, "nbytes": nbytes}, fields


def _again(capture: WeightCapture, captured_at: float) -> WeightCapture:
    table = msgspec.structs.replace(capture.table, captured_at=captured_at)
    return replace(capture, table=table)


def storages_of(model: torch.nn.Module) -> frozenset[int]:
    """Addresses of the storages behind a model's tensors, as ``WeightCapture.storages``."""
    found = named_tensors(model, DerivedPaths.of(model).paths)
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in found.tensors) - {0}


def table_tensors(capture: WeightCapture, model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors behind the rows of a capture's table, in their order. Raises ValueError where
    they are not the table's any more."""
    found = named_tensors(model, capture.derived.paths)
    names, tensors = found.names, found.tensors
    if len(names) != capture.table.rows:  # Some have no row, because they have no storage.
        there = [row for row, tensor in enumerate(tensors) if not obstacle(tensor)]
        names, tensors = [names[row] for row in there], [tensors[row] for row in there]
    if joined(names) != capture.table.names:
        raise ValueError("The model's tensors are not those of its table.")
    return tensors


def joined(names: list[str]) -> bytes:
    """One name a line, as UTF-8; torch lets a module be called by what fits into neither."""
    lines = "\n".join(names)
    if lines.count("\n") >= len(names):
        lines = "\n".join(name.replace("\n", "\\n") for name in names)
    return lines.encode(errors="backslashreplace")


def _decoded(codes: npt.NDArray[Any], values: Iterable[Any]) -> list[Any]:
    return list(map(list(values).__getitem__, codes.tolist()))


def _codes() -> defaultdict[Any, int]:
    """Numbers values by first appearance, at the speed of a dictionary."""
    return defaultdict(itertools.count().__next__)


def _columns(
    found: NamedTensors,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any], tuple[str, ...]]:
    """Columns, the values that their codes stand for with the names, and what has no row."""
    names, tensors = found.names, found.tensors
    kinds: npt.NDArray[Any] = np.zeros(len(tensors), dtype="<u4")
    kinds[found.parameters :] = 1
    kinds[found.parameters + found.buffers :] = 2
    unreadable: tuple[str, ...] = ()
    try:
        columns, values = _read(tensors)
    except Exception:
        # One of them is strange. Which one is asked only now, because it costs.
        reasons = list(map(obstacle, tensors))
        unreadable = tuple(
            f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason
        )
        readable = [row for row, reason in enumerate(reasons) if not reason]
        names = [names[row] for row in readable]
        kinds = kinds[readable]
        columns, values = _read([tensors[row] for row in readable])
    # Not numpy.unique, whose plain form imports numpy.ma: that would be inside SGLang's load.
    there = np.flatnonzero(np.bincount(kinds))
    columns["kind"] = np.searchsorted(there, kinds).astype("<u4")
    all_kinds: tuple[Kind, ...] = ("parameter", "buffer", "derived")
    values["kind"] = [all_kinds[kind] for kind in there.tolist()]
    values["names"] = names
    return columns, values, unreadable


def _read(tensors: list[torch.Tensor]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """All columns in one pass: the tensors are not in the processor's caches, and each is fetched
    once. Storages are not kept as objects."""
    dtypes, shapes, strides, devices = _codes(), _codes(), _codes(), _codes()
    addresses = [array("Q") for _ in range(3)]
    codes = [array("I") for _ in range(4)]
    data_ptr, storage_ptr, storage_nbytes = (column.append for column in addresses)
    dtype, shape, stride, device = (column.append for column in codes)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        data_ptr(tensor.data_ptr())
        storage_ptr(storage.data_ptr())
        storage_nbytes(storage.nbytes())
        dtype(dtypes[tensor.dtype])
        shape(shapes[tensor.shape])
        stride(strides[tensor.stride()])
        device(devices[tensor.device])
    columns: dict[str, npt.NDArray[Any]] = {}
    for names, arrays, kind in (
        (("data_ptr", "storage_ptr", "storage_nbytes"), addresses, "<u8"),
        (("dtype", "shape", "stride", "device"), codes, "<u4"),
    ):
        for name, values in zip(names, arrays, strict=True):
            columns[name] = np.array(values, dtype=kind)
    elements = np.array([size.numel() for size in shapes], dtype="<u8")
    itemsize = np.array([each.itemsize for each in dtypes], dtype="<u8")
    columns["nbytes"] = elements[columns["shape"]] * itemsize[columns["dtype"]]
    for each, code in devices.items():
        if each.type == "meta":  # Has a size and no memory.
            columns["nbytes"][columns["device"] == code] = 0
            columns["storage_nbytes"][columns["device"] == code] = 0
    return columns, {"dtype": dtypes, "shape": shapes, "stride": strides, "device": devices}


def obstacle(tensor: torch.Tensor) -> str:
    """Why a tensor cannot be a row; empty if it can."""
    try:
        _read([tensor])
    except Exception as error:
        return f"{type(tensor).__name__} ({' '.join(str(error).split())[:200]})"
    return ""


def _regions(
    columns: dict[str, Any],
    stride_values: tuple[tuple[int, ...], ...],
    shape_values: tuple[tuple[int, ...], ...],
    segments: Segments,
) -> Regions:
    # The span of a tensor with holes is not its nbytes: its whole storage stands for it.
    pairs = columns["shape"].astype(np.uint64) * max(1, len(stride_values)) + columns["stride"]
    unique, inverse = np.unique(pairs, return_inverse=True)
    has_holes = []
    for pair in unique.tolist():
        shape, stride = divmod(pair, len(stride_values))
        has_holes.append(not is_dense(shape_values[shape], stride_values[stride]))
    whole = np.array(has_holes, dtype=bool)[inverse.reshape(-1)]
    return merge_spans(
        start=np.where(whole, columns["storage_ptr"], columns["data_ptr"]),
        nbytes=np.where(whole, columns["storage_nbytes"], columns["nbytes"]),
        allocation=segments.allocation_of(columns["storage_ptr"]),
        device=columns["device"],
    )


def _usage(
    columns: dict[str, Any],
    dtype_values: tuple[str, ...],
    device_values: tuple[str, ...],
    kind_values: tuple[Kind, ...],
    counted_elsewhere: frozenset[int],
    segments: Segments,
) -> tuple[tuple[WeightUsage, ...], StorageRanges, dict[str, int]]:
    """Bytes of unique storages, where they lie, and the bytes that stay when others go."""
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
    counted = size > 0
    outside_saver = segments.outside_saver(
        unique[counted], size[counted], columns["device"][first[counted]], device_values
    )
    derived = np.array([kind == "derived" for kind in kind_values], dtype=bool)
    is_derived = derived[columns["kind"][first[counted]]]
    return usage, (unique[counted], size[counted], is_derived), outside_saver
