# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How a table differs from the one before it.

CUDA graphs keep addresses, so an update in place should leave the table as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sglang_weight_exporter.records import NAMED_CHANGES, Row, TableChanges, table_rows

if TYPE_CHECKING:  # Tables are also compared where there is no torch.
    from sglang_weight_exporter.capture.weights import WeightCapture


def compare(before: WeightCapture | None, after: WeightCapture | None) -> TableChanges:
    """What changed. A tensor on another device is not also moved; a resized one may be both.

    Empty where one of the two could not be read: nothing is known then.
    """
    if before is None or after is None or before.table.sha256 == after.table.sha256:
        return TableChanges()
    return compare_rows(table_rows(before.table), table_rows(after.table))


def compare_rows(
    before: Iterable[Row], after: Iterable[Row], *, named: int = NAMED_CHANGES
) -> TableChanges:
    """What changed between two tables; of each kind of change ``named`` names are kept."""
    old = {row.name: row for row in before}
    new = {row.name: row for row in after}
    names: dict[str, list[str]] = {
        "moved": [],
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "resized": [],
        "device": [],
    }
    for name, now in new.items():
        then = old.get(name)
        if then is None:
            continue
        if now.device != then.device:
            names["device"].append(name)
        elif now.data_ptr != then.data_ptr:
            names["moved"].append(name)
        if now.nbytes != then.nbytes:
            names["resized"].append(name)
    return TableChanges(
        names={change: tuple(found[:named]) for change, found in names.items() if found},
        **{change: len(found) for change, found in names.items()},
    )
