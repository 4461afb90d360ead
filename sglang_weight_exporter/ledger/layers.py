# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Classes of layers that updates have stopped to change.

Updates come in rounds. Where an update is whole, it is a round. Where a trainer's buckets count as
an update each (SGLang before 0.5.21), a round is all that comes until a tensor changes again.
"""

from __future__ import annotations

from collections import Counter

from sglang_weight_exporter.records.contents import LAYERS, ChangedRows, Layer

#: In so many rounds has a class changed whose next change is expected. An engine's first update may
#: bring another checkpoint, in which what is frozen later is different too.
_EXPECTED_AFTER = 3
#: A class that has stayed the same for some rounds before may do so this much longer.
_LONGER = 3


class LayerRounds:
    """The rounds of one role."""

    def __init__(self) -> None:
        #: Of the round that goes on.
        self._rows, self._table = 0, 0
        self._changed: set[Layer] = set()
        #: By class: in how many rounds it has changed, how many have gone by since, and the most
        #: that had gone by before.
        self._rounds: Counter[Layer] = Counter()
        self._since: Counter[Layer] = Counter()
        self._longest: Counter[Layer] = Counter()

    def count(self, changed: ChangedRows) -> None:
        """An update has changed this; one that changed nothing says nothing of its layers."""
        if not changed.rows:
            return
        if changed.table != self._table:  # Other tensors: a round cannot be told from the next.
            self._rows, self._table, self._changed = 0, changed.table, set()
        if self._rows & changed.rows:
            self._end()
        self._rows |= changed.rows
        self._changed.update(layer for layer, count in changed.changes.tensors.items() if count)

    def _end(self) -> None:
        for layer in LAYERS:
            if layer in self._changed:
                self._longest[layer] = max(self._longest[layer], self._since[layer])
                self._rounds[layer] += 1
                self._since[layer] = 0
            elif self._rounds[layer]:
                self._since[layer] += 1
        self._rows, self._changed = 0, set()

    @property
    def missed(self) -> dict[Layer, int]:
        """By class that is expected to change, the rounds that have gone by without; 0 where that
        is usual."""
        return {
            layer: since if since > _LONGER * self._longest[layer] else 0
            for layer in LAYERS
            if self._rounds[layer] >= _EXPECTED_AFTER
            for since in (self._since[layer],)
        }
