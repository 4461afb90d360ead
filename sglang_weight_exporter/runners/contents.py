# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update has changed, from the fingerprints that were taken before and after it.

A tensor has changed where it holds other bytes than just before the update, and other bytes than
the load or update before had left. The two differ after memory was released and has come back
without what it held: an update that brings the same again changes garbage, and nothing; one that
leaves a tensor out leaves garbage there, and has not changed it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.records.contents import LAYERS, ChangedRows, ContentChanges
from sglang_weight_exporter.records.weights import NAMED_CHANGES
from sglang_weight_exporter.runners.layers import Layers
from sglang_weight_exporter.weight_table import WeightTable

#: Of a row that a table does not have: no fingerprint is made of these alone.
_ABSENT = (np.iinfo(np.uint64).max,) * 2


class RoleContents:
    """What loads and updates have left in a role's tensors."""

    def __init__(self) -> None:
        self._left: WeightTable | None = None
        self._names = b""
        #: Of each row, an index of :data:`LAYERS`.
        self._layers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._tables = 0

    def begin(self, table: WeightTable, model: torch.nn.Module) -> None:
        """A load has left this."""
        self._left = table if table.fingerprint else None
        self._classify(table, model)

    def changes(
        self, before: WeightTable, after: WeightTable, model: torch.nn.Module
    ) -> ChangedRows | None:
        """What an update has changed; ``None``: fingerprints are missing."""
        left, self._left = self._left, after if after.fingerprint else None
        if not (before.fingerprint and after.fingerprint):
            return None
        self._classify(after, model)
        now = _fingerprints(after, after.names)
        taken = _any(now)
        changed = taken.copy()
        for table in (before, left or before):
            then = _fingerprints(table, after.names)
            changed &= _any(then) & _any(then != now)
        return ChangedRows(
            self._summary(after, taken, changed),
            int.from_bytes(np.packbits(changed).tobytes(), "big"),
            before.fingerprint == after.fingerprint,
            self._tables,
        )

    def _classify(self, table: WeightTable, model: torch.nn.Module) -> None:
        if table.names == self._names:
            return
        layers = Layers(model)
        names = table.names.decode().split("\n")
        self._layers = np.array([LAYERS.index(layers.of(name)) for name in names], dtype=np.int64)
        self._names, self._tables = table.names, self._tables + 1

    def _summary(
        self, table: WeightTable, taken: NDArray[np.bool_], changed: NDArray[np.bool_]
    ) -> ContentChanges:
        rows = np.flatnonzero(changed)
        nbytes = np.frombuffer(table.nbytes, dtype="<u8")
        # Tied tensors have one memory, and one of them stands for it.
        data_ptr = np.frombuffer(table.data_ptr, dtype="<u8")
        _, first = np.unique(data_ptr[rows], return_index=True)
        once = rows[first]
        there = np.bincount(self._layers[taken], minlength=len(LAYERS))
        tensors = np.bincount(self._layers[rows], minlength=len(LAYERS))
        sizes = np.zeros(len(LAYERS), dtype=np.uint64)
        np.add.at(sizes, self._layers[once], nbytes[once])
        names = table.names.decode().split("\n") if len(rows) else []
        has = [number for number in range(len(LAYERS)) if there[number]]
        return ContentChanges(
            tensors={LAYERS[number]: int(tensors[number]) for number in has},
            nbytes={LAYERS[number]: int(sizes[number]) for number in has},
            names=tuple(names[row] for row in rows[:NAMED_CHANGES].tolist()),
        )


def _any(halves: NDArray[Any]) -> NDArray[np.bool_]:
    """Of each row, whether either half is."""
    found: NDArray[np.bool_] = np.any(halves, axis=1)
    return found


def _fingerprints(table: WeightTable, names: bytes) -> NDArray[Any]:
    """uint64 ``[names, 2]``: zeros where none was taken."""
    values = np.frombuffer(table.fingerprints, dtype="<u8").reshape(-1, 2)
    if table.names == names:
        return values
    rows = {name: row for row, name in enumerate(table.names.split(b"\n"))}
    found = [rows.get(name, len(values)) for name in names.split(b"\n")]
    return np.vstack([values, np.array([_ABSENT], dtype=np.uint64)])[found]
