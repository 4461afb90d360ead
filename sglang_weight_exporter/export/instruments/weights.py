# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes, tensors and versions of weights, and facts that hold while a rank lives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from sglang_weight_exporter.export.instruments.base import (
    Instrument,
    Sample,
    by_device,
    once_a_rank,
    one,
)
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.fingerprint import as_number
from sglang_weight_exporter.records.snapshot import Snapshot


def _weight_bytes(view: RoleView) -> Iterator[Sample]:
    for part in view.role.weights or ():
        yield Sample((part.kind, part.dtype), part.nbytes, part.device)


def _weight_tensors(view: RoleView) -> Iterator[Sample]:
    for part in view.role.weights or ():
        yield Sample((part.kind, part.dtype), part.tensors, part.device)


def _shared(view: RoleView) -> Iterator[Sample]:
    totals: dict[str, int] = {}
    for part in view.role.weights or ():
        totals[part.device] = totals.get(part.device, 0) + part.shared
    return by_device({device: nbytes for device, nbytes in totals.items() if nbytes})


def _regions(view: RoleView) -> Iterator[Sample]:
    if view.role.table is not None:
        yield from by_device(view.role.table.regions)


#: SGLang's weight version where it is an integer. Anything that `float` takes besides (`nan`,
#: `12e4567`) is a name and no number.
_INTEGER = re.compile(r"-?[0-9]{1,16}")


#: Every integer up to here is exact in a float, which is what Prometheus keeps.
_EXACT = 2**53


def _version(view: RoleView) -> Iterator[Sample]:
    text = view.snapshot.weight_version
    if _INTEGER.fullmatch(text) and abs(int(text)) <= _EXACT:
        yield Sample((), int(text))


def _version_hash(snapshot: Snapshot) -> float | None:
    if not snapshot.weight_version:
        return None
    return as_number(hashlib.sha256(snapshot.weight_version.encode()).hexdigest())


def _size(number: int | None) -> str:
    return "" if number is None else str(number)


def _info(view: RoleView) -> Iterator[Sample]:
    engine, role = view.snapshot.engine, view.role
    device = next((each for each in view.snapshot.devices if each.name == role.device), None)
    yield Sample(
        (
            role.quantization,
            engine.sglang_version,
            "" if device is None else device.product,
            _size(engine.tp_size),
            _size(engine.pp_size),
            _size(engine.ep_size),
        ),
        1,
    )


def _engine_info(view: RoleView) -> Iterator[Sample]:
    engine, role = view.snapshot.engine, view.role
    device = next((each for each in view.snapshot.devices if each.name == role.device), None)
    yield Sample(
        (
            engine.model_path,
            role.architecture,
            engine.torch_version,
            "" if device is None else device.pci_bus_id,
            engine.group,
            _size(engine.nodes),
        ),
        1,
    )


def _nodes(view: RoleView) -> Iterator[Sample]:
    engine = view.snapshot.engine
    if view.is_first and engine.group and (engine.nodes or 1) > 1:
        yield Sample((engine.group, _size(engine.node_rank)), engine.nodes or 1)


def _expected_ranks(view: RoleView) -> Iterator[Sample]:
    engine = view.snapshot.engine
    if view.is_first and engine.expected_ranks is not None:
        yield Sample((engine.group,), engine.expected_ranks)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_bytes",
        "gauge",
        "By",
        "Bytes of unique storages that hold weights; sum over kind and dtype for all of them. kind "
        "is torch's parameter or buffer, or derived: tensors that modules keep as attributes.",
        ("kind", "dtype"),
        _weight_bytes,
    ),
    Instrument(
        "sglang_weight_tensors",
        "gauge",
        "{tensor}",
        "Named tensors; a tied tensor counts under each of its names.",
        ("kind", "dtype"),
        _weight_tensors,
    ),
    Instrument(
        "sglang_weight_resident_bytes",
        "gauge",
        "By",
        "Bytes of weights backed by physical memory now. While weights are released that is what "
        "lies outside of the memory saver's regions, and what is not on a GPU.",
        read_role=lambda view: by_device(view.role.resident),
    ),
    Instrument(
        "sglang_weight_shared_bytes",
        "gauge",
        "By",
        "Bytes of weights that this model uses and that count elsewhere: a draft's at its target, "
        "mapped ones at the weight-cache daemon. Absent where there are none.",
        read_role=_shared,
        preset="default",
    ),
    Instrument(
        "sglang_weight_regions",
        "gauge",
        "{region}",
        "Contiguous runs of weight memory, merged inside one allocation.",
        read_role=_regions,
    ),
    Instrument(
        "sglang_weight_loaded_timestamp_seconds",
        "gauge",
        "s",
        "When the first load ended, in Unix time.",
        read_role=lambda view: one(view.role.loaded_at),
    ),
    Instrument(
        "sglang_weight_first_load_seconds",
        "gauge",
        "s",
        "Time of the first load.",
        read_role=lambda view: one(view.role.load_seconds),
    ),
    Instrument(
        "sglang_weight_version",
        "gauge",
        "",
        "SGLang's weight version, where it is an integer of at most 2^53.",
        read_role=_version,
    ),
    Instrument(
        "sglang_weight_version_hash",
        "gauge",
        "",
        "53 bits of the SHA-256 of SGLang's weight version, whatever its form: equal where the "
        "strings are equal. Once a rank; the string is in the update's span and in status.",
        read_role=once_a_rank(_version_hash),
    ),
    Instrument(
        "sglang_weight_version_id",
        "gauge",
        "",
        "Deprecated: the former name of sglang_weight_version_hash, with its value.",
        read_role=once_a_rank(_version_hash),
        replaced_by="sglang_weight_version_hash",
        preset="default",
    ),
    Instrument(
        "sglang_weight_info",
        "gauge",
        "",
        "What decides how weights lie in memory, which holds while the process lives: join with it "
        "to compare like with like. Always 1.",
        ("quantization", "sglang_version", "gpu_name", "tp_size", "pp_size", "ep_size"),
        _info,
    ),
    Instrument(
        "sglang_weight_engine_info",
        "gauge",
        "",
        "More that holds while the process lives: what is loaded, by which torch, and which engine "
        "on how many hosts the rank is of. Always 1.",
        ("model_path", "architecture", "torch_version", "pci_bus_id", "engine_group", "nodes"),
        _engine_info,
    ),
    Instrument(
        "sglang_weight_expected_ranks",
        "gauge",
        "{rank}",
        "How many ranks the engine has on all of its hosts, by its settings. Once a rank.",
        ("engine_group",),
        _expected_ranks,
    ),
    Instrument(
        "sglang_weight_engine_nodes",
        "gauge",
        "{host}",
        "On how many hosts the engine runs, as it was started. Absent for engines on one.",
        ("engine_group", "node_rank"),
        _nodes,
    ),
)
