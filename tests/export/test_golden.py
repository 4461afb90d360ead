# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The whole text of a scrape of recorded ranks, byte for byte: who changes the contract sees it in
the review. A folder more in ``golden/`` is a test more."""

from __future__ import annotations

import re
from pathlib import Path

import golden
import pytest
from prometheus_client.parser import text_string_to_metric_families

RECORDINGS = sorted(golden.DIRECTORY.iterdir())


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name)
def test_what_is_served_is_what_was_served(recording: Path) -> None:
    """`python tests/shared/golden.py` writes what is served now."""
    for name, text in golden.texts(recording).items():
        assert text == (recording / name).read_text(encoding="utf-8"), name


def test_there_is_a_rank_of_each_kind() -> None:
    """None was released on a CPU: SGLang has nothing there that gives memory back."""
    assert {*golden.ENGINES, "released"} <= {path.name for path in RECORDINGS}


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name)
def test_no_series_is_served_twice_and_none_has_an_address(recording: Path) -> None:
    text = (recording / "default.txt").read_text(encoding="utf-8")
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(samples) == len(set(samples)) > 10
    assert not re.search(r"0x[0-9a-f]{6,}", text)
