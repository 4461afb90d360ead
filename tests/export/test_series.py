# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How many series there are: few by default, and as many as docs/cost.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import series

from sglang_weight_exporter.settings import METRIC_PRESETS

COST = Path(__file__).parents[2] / "docs" / "cost.md"
#: What a GPU may have, of a host with eight; dcgm-exporter has 25 and nvidia_gpu_exporter 133.
MOST_SERIES_A_GPU = 70
OF_EIGHT = "a GPU of eight, "

Rows = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def counted() -> Rows:
    return {preset: series.rows(found) for preset, found in series.texts().items()}


@pytest.mark.parametrize("preset", ["lean", "default"])
def test_a_gpu_has_few_series(counted: Rows, preset: str) -> None:
    """One more than counted: a version that is a number."""
    of_eight = {name: n for name, n in counted[preset].items() if name.startswith(OF_EIGHT)}
    assert len(of_eight) == 2
    assert all(count + 1 <= MOST_SERIES_A_GPU for count in of_eight.values()), of_eight


def test_presets_are_worth_choosing(counted: Rows) -> None:
    for name, full in counted["full"].items():
        assert counted["lean"][name] <= counted["default"][name] <= full
        if name.startswith(OF_EIGHT):
            assert full > 1.3 * counted["default"][name]


def test_the_document_says_as_many(counted: Rows) -> None:
    """`python tests/shared/series.py` prints the rows."""
    table = COST.read_text(encoding="utf-8").split("### Series a GPU")[1].split('\n\n"Of')[0]
    said = {
        name.strip(): tuple(float(cell) for cell in cells.split("|"))
        for name, cells in re.findall(r"^\| (.+?) \| [\d.]+ \|(.+)\|$", table, re.MULTILINE)
    }
    assert said == {
        name: tuple(counted[preset][name] for preset in METRIC_PRESETS) for name in counted["lean"]
    }
