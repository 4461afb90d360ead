# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Each fault that the document speaks of is one that a test makes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| fault ")
]


def test_there_are_forty_faults_and_no_test_stands_for_two() -> None:
    assert len(ROWS) >= 40
    assert len({row[-1] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_fault_has_its_test_and_says_all(row: list[str]) -> None:
    assert len(row) == 5
    assert all(row)
    found = re.fullmatch(
        r"\[`(tests/[\w/]+\.py)::(test_\w+)(?:\[(\w+)\])?`\]\(\.\./(tests/[\w/]+\.py)\)", row[-1]
    )
    assert found, row[-1]
    file, name, fault, target = found.groups()
    assert file == target
    tree = ast.walk(ast.parse((PROJECT / file).read_text(encoding="utf-8")))
    defined = {node.name for node in tree if isinstance(node, ast.FunctionDef)}
    assert {name, fault or name} <= defined
