# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How a table differs from the one before it.

CUDA graphs keep addresses, so an update in place should leave the table as it was.
"""

from __future__ import annotations

from array import array

from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.records import NAMED_CHANGES, TableChanges, WeightTable


def _rows(table: WeightTable) -> dict[str, tuple[int, int, str]]:
    """Name → address, bytes, device."""
    codes = array("I", table.device)
    return dict(
        zip(
            table.names.decode().split("\n") if table.rows else (),
            zip(
                array("Q", table.data_ptr),
                array("Q", table.nbytes),
                [table.device_values[code] for code in codes],
                strict=True,
            ),
            strict=True,
        )
    )


def compare(before: WeightCapture | None, after: WeightCapture | None) -> TableChanges:
    """What changed. A tensor on another device is not also moved; a resized one may be both.

    Empty where one of the two could not be read: nothing is known then.
    """
    if before is None or after is None or before.table.sha256 == after.table.sha256:
        return TableChanges()
    return compare_tables(before.table, after.table)


def compare_tables(before: WeightTable, after: WeightTable) -> TableChanges:
    """What changed between two tables, names included up to :data:`NAMED_CHANGES` of a kind."""
    old, new = _rows(before), _rows(after)
    names: dict[str, list[str]] = {
        "moved": [],
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "resized": [],
        "device": [],
    }
    for name, (address, nbytes, device) in new.items():
        if name not in old:
            continue
        old_address, old_nbytes, old_device = old[name]
        if device != old_device:
            names["device"].append(name)
        elif address != old_address:
            names["moved"].append(name)
        if nbytes != old_nbytes:
            names["resized"].append(name)
    return TableChanges(
        names={change: tuple(found[:NAMED_CHANGES]) for change, found in names.items() if found},
        **{change: len(found) for change, found in names.items()},
    )
