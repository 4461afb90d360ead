# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update changed in the table."""

from __future__ import annotations

from sglang_weight_exporter.weight_table import Row, compare_rows

ROW = Row("w", 4096, 64, "bfloat16", (8, 4), (4, 1), "cuda:0", "parameter", 4096, 64)


def test_the_same_table_has_no_changes() -> None:
    assert not compare_rows([ROW], [ROW])


def test_each_change_is_counted_and_named() -> None:
    before = [ROW._replace(name=name) for name in ("moved", "gone", "grown", "away", "same")]
    after = [
        ROW._replace(name="moved", data_ptr=8192),
        ROW._replace(name="grown", nbytes=128),
        ROW._replace(name="away", device="cpu", data_ptr=512),
        ROW._replace(name="same"),
        ROW._replace(name="new"),
    ]
    changes = compare_rows(before, after)
    counts = (changes.moved, changes.added, changes.removed, changes.resized, changes.device)
    assert counts == (1, 1, 1, 1, 1)
    assert changes.names == {
        "moved": ("moved",),
        "added": ("new",),
        "removed": ("gone",),
        "resized": ("grown",),
        "device": ("away",),
    }


def test_names_are_cut_and_counts_are_not() -> None:
    before = [ROW._replace(name=f"w{index}") for index in range(250)]
    after = [row._replace(data_ptr=row.data_ptr + 1) for row in before]
    changes = compare_rows(before, after)
    assert changes.moved == 250
    assert len(changes.names["moved"]) == 100
