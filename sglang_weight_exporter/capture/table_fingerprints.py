# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A table of weights with what its tensors hold."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
import numpy as np
import torch

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.capture.fingerprint import (
    Fingerprinter,
    FingerprintError,
    has_memory,
    in_memory_order,
)
from sglang_weight_exporter.capture.tensors import AttributePath, named_tensors
from sglang_weight_exporter.capture.weights import joined, obstacle
from sglang_weight_exporter.weight_table import WeightTable


def with_fingerprints(
    table: WeightTable,
    model: torch.nn.Module,
    slots: Iterable[AttributePath],
    fingerprinter: Fingerprinter,
    limit_seconds: float,
    after: torch.cuda.Stream | None = None,
) -> WeightTable:
    """The table with its tensors' fingerprints, in the order in which they lie in memory.

    ``slots``: where the derived weights of the table hang; ``after``: the stream of forward passes.
    Raises FingerprintError.
    """
    started = time.perf_counter()
    found = named_tensors(model, slots)
    names, tensors = found.names, found.tensors
    if len(names) != table.rows:  # Some have no row, because they have no storage.
        there = [row for row, tensor in enumerate(tensors) if not obstacle(tensor)]
        names, tensors = [names[row] for row in there], [tensors[row] for row in there]
    if joined(names) != table.names:
        raise FingerprintError("The model's tensors are not those of its table.")
    names = table.names.decode().split("\n")
    rows = [row for row, tensor in enumerate(tensors) if has_memory(tensor)]
    values = np.zeros((len(tensors), 2), dtype=np.uint64)
    values[rows] = fingerprinter(
        [in_memory_order(tensors[row]) for row in rows],
        limit_seconds=limit_seconds,
        owner=table.role,
        after=after,
    )
    content = values.astype(">u8").tobytes()
    return msgspec.structs.replace(
        table,
        fingerprints=content,
        fingerprint=fingerprint.of_rank(
            {names[row]: content[16 * row : 16 * row + 16].hex() for row in rows}
        ),
        fingerprint_seconds=time.perf_counter() - started,
    )
