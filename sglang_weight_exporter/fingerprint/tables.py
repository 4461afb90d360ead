# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A table of weights with what its tensors hold."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter, has_memory, in_memory_order
from sglang_weight_exporter.weight_table import WeightTable


def with_fingerprints(
    table: WeightTable,
    tensors: Sequence[torch.Tensor],
    fingerprinter: Fingerprinter,
    limit_seconds: float,
    after: torch.cuda.Stream | None = None,
) -> WeightTable:
    """The table with its tensors' fingerprints, in the order in which they lie in memory.

    ``tensors``: those of its rows; ``after``: the stream of forward passes. Raises
    FingerprintError.
    """
    started = time.perf_counter()
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
