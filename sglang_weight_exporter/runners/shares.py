# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Shares of logical tensors in a role's table, with sums over what they hold.

The engine waits for these, so what follows from a table is worked out once and kept while the table
is the same and no expert has moved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint import tensor_sums
from sglang_weight_exporter.fingerprint.address_sums import AddressSums
from sglang_weight_exporter.fingerprint.sums import WORD_BYTES
from sglang_weight_exporter.fingerprint.tensor_sums import Run
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter, integers
from sglang_weight_exporter.records.shares import Share, ShareTable, shares_of
from sglang_weight_exporter.runners.layer_shares import capture_shares, expert_maps
from sglang_weight_exporter.weight_table import WeightTable


@dataclass(frozen=True)
class _Addressed:
    """Shares of one device that are read by their addresses."""

    numbers: list[int]
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sums: AddressSums


@dataclass(frozen=True)
class _SharePlan:
    """Which shares a table has, and how they are read."""

    sha256: str
    skip: frozenset[str]
    placed: bytes
    table: ShareTable
    shares: list[Share]
    by_address: list[_Addressed]
    by_tensor: list[int]

    def is_for(self, table: WeightTable, skip: frozenset[str], placed: bytes) -> bool:
        return (self.sha256, self.skip, self.placed) == (table.sha256, skip, placed)


class RoleShares:
    """Puts shares and their sums into tables."""

    def __init__(self, fingerprinter: Fingerprinter) -> None:
        self._has_kernels = fingerprinter.has_kernels
        self._plans: dict[str, _SharePlan] = {}

    def take(
        self,
        model: torch.nn.Module,
        table: WeightTable,
        tensors: Callable[[], Sequence[torch.Tensor]],
        *,
        skip: frozenset[str],
        limit_seconds: float,
    ) -> WeightTable:
        """With nothing left to do on the device, in the stream that the tensors were written in.

        ``skip``: names of rows that are no weights. Raises FingerprintError, and what ``tensors``
        raises.
        """
        started = time.perf_counter()
        plan, placed = self._plans.get(table.role), expert_maps()
        if plan is None or not plan.is_for(table, skip, placed):
            self._plans.pop(table.role, None)  # Its memory on the device first.
            plan = self._plan(model, table, skip, placed, tensors())
            self._plans[table.role] = plan
        taken = np.zeros((len(plan.shares), 2), dtype=np.uint64)
        data_ptr = np.frombuffer(table.data_ptr, dtype="<u8").astype(np.int64)
        for some in plan.by_address:
            with torch.cuda.device(some.sums.device):
                taken[some.numbers] = some.sums.take(data_ptr[some.rows] + some.offsets)
        if plan.by_tensor:
            held = tensors()
            some_shares = [plan.shares[number] for number in plan.by_tensor]
            taken[plan.by_tensor] = tensor_sums.of_runs(
                [_run(share, held[share.row]) for share in some_shares],
                limit_seconds=limit_seconds - (time.perf_counter() - started),
            )
        shares = msgspec.structs.replace(plan.table, sums=taken.astype(">u8").tobytes())
        return msgspec.structs.replace(table, shares=shares)

    def _plan(
        self,
        model: torch.nn.Module,
        table: WeightTable,
        skip: frozenset[str],
        placed: bytes,
        tensors: Sequence[torch.Tensor],
    ) -> _SharePlan:
        found = capture_shares(model, table, skip)
        shares = list(shares_of(found))
        by_tensor: list[int] = []
        by_device: dict[torch.device, list[int]] = {}
        for number, share in enumerate(shares):
            tensor = tensors[share.row]
            if self._has_kernels(tensor.device) and _lies_in_words(share, tensor):
                by_device.setdefault(tensor.device, []).append(number)
            else:
                by_tensor.append(number)
        by_address = [_addressed(device, each, shares) for device, each in by_device.items()]
        return _SharePlan(table.sha256, skip, placed, found, shares, by_address, by_tensor)


def _addressed(device: torch.device, numbers: list[int], shares: Sequence[Share]) -> _Addressed:
    column = {
        name: np.array([getattr(shares[number], name) for number in numbers], dtype=np.int64)
        for name in ("row", "offset", "rows", "columns", "first_row", "first_column")
    }
    with torch.cuda.device(device):
        taken = AddressSums(
            device,
            rows=column["rows"],
            columns=column["columns"],
            first_row=column["first_row"],
            first_column=column["first_column"],
        )
    return _Addressed(numbers, column["row"], column["offset"], taken)


def _width(tensor: torch.Tensor) -> int:
    """Bytes of one of its rows."""
    width: int = math.prod(tensor.shape[-1:]) * tensor.element_size()
    return width


def _lies_in_words(share: Share, tensor: torch.Tensor) -> bool:
    """Whether its words follow one another in memory, each at a multiple of eight."""
    whole = tensor.dim() < 2 or not _width(tensor) % WORD_BYTES
    fits = share.offset + share.rows * share.columns * WORD_BYTES <= tensor.nbytes
    return whole and fits and not (tensor.data_ptr() + share.offset) % WORD_BYTES


def _run(share: Share, tensor: torch.Tensor) -> Run:
    """The words of a share in the memory of its row."""
    flat = integers(tensor).reshape(-1).view(torch.uint8)
    nbytes = min(share.columns * WORD_BYTES, _width(tensor))
    content = flat[share.offset : share.offset + share.rows * nbytes]
    words = tensor_sums.words_of(content.view(share.rows, nbytes))
    return Run(words, share.first_row, share.first_column)
