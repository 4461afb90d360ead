# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which classes of layers are missed by updates, and which never were expected."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sglang_weight_exporter.ledger.layers import LayerRounds
from sglang_weight_exporter.records.contents import (
    LAYERS,
    ChangedRows,
    ContentChanges,
    Layer,
)

ALL: tuple[Layer, ...] = ("attention", "mlp", "experts", "embedding")
DENSE: tuple[Layer, ...] = ("attention", "mlp")


def changed(*layers: Layer, bit: int = 0, table: int = 1) -> ChangedRows:
    """A tensor of each class; ``bit``: which of those of its class."""
    tensors = {layer: int(layer in layers) for layer in LAYERS}
    rows = sum(1 << (LAYERS.index(layer) + len(LAYERS) * bit) for layer in layers)
    return ChangedRows(ContentChanges(tensors=tensors), rows, not rows, table)


def after(updates: Iterable[ChangedRows]) -> dict[Layer, int]:
    rounds = LayerRounds()
    for each in updates:
        rounds.count(each)
    return rounds.missed


def test_a_class_that_stops_to_change_is_missed_from_then_on() -> None:
    assert after([changed(*ALL)] * 9) == dict.fromkeys(ALL, 0)
    stopped = [changed(*ALL)] * 4 + [changed(*DENSE)] * 6
    assert after(stopped) == {**dict.fromkeys(ALL, 0), "experts": 5, "embedding": 5}
    assert after([*stopped, changed(*ALL), changed(*ALL)]) == dict.fromkeys(ALL, 0)


@pytest.mark.parametrize("first", range(3))
def test_a_frozen_class_is_never_missed_whatever_the_first_updates_brought(first: int) -> None:
    """An engine starts from one checkpoint, and the trainer from another."""
    missed = after([changed(*ALL)] * first + [changed(*DENSE)] * 50)
    assert missed == dict.fromkeys(DENSE, 0)


def test_updates_that_change_nothing_say_nothing() -> None:
    assert after([changed(*ALL)] * 4 + [changed()] * 50) == dict.fromkeys(ALL, 0)


def test_what_changes_every_few_updates_may_stay_the_same_for_longer() -> None:
    """Norms in bfloat16 at a small learning rate; experts that are trained in turn."""
    seldom = ([changed(*ALL)] + [changed(*DENSE)] * 4) * 5
    assert after(seldom + [changed(*DENSE)] * 8) == dict.fromkeys(ALL, 0)
    # Four at most before, and the four of the last turn.
    missed = after(seldom + [changed(*DENSE)] * 10)
    assert missed == {**dict.fromkeys(ALL, 0), "experts": 13, "embedding": 13}


def test_buckets_that_count_as_an_update_each_are_a_round() -> None:
    """Before 0.5.21, with ``flush_cache`` left on: each bucket brings other tensors."""
    buckets = [
        *(changed("embedding"), changed("attention", bit=0), changed("attention", bit=1)),
        *(changed("mlp", bit=number) for number in range(10)),
        *(changed("experts", bit=number) for number in range(20)),
    ]
    assert after(buckets * 12) == dict.fromkeys(ALL, 0)
    missed = after(buckets * 12 + buckets[:13] * 6)
    assert missed == {**dict.fromkeys(ALL, 0), "experts": 5}


def test_a_table_of_other_tensors_begins_anew() -> None:
    """Whose rows are not those of the one before."""
    updates = [changed(*ALL)] * 4 + [changed(*DENSE, table=number) for number in range(2, 40)]
    assert after(updates)["experts"] == 0
