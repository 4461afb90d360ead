# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the boards' first screens cost a Prometheus that has 2,048 GPUs on 256 hosts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from board_cost import Fleet

pytestmark = pytest.mark.release("boards")

#: Seconds of the processor, for one board.
MOST = 2.0


def test_a_first_screen_takes_less_than_two_seconds_of_the_processor(
    boards: dict[str, Any],
) -> None:
    fleet = Fleet(Path(tempfile.mkdtemp(prefix="cost-")), list(boards.values()))
    try:
        count = fleet.stack.query('count(sglang_weight_info{role="target"})', fleet.end)
        assert count[0]["value"][1] == "2048"
        for board in boards.values():
            spent = fleet.first_screen(board)
            print(board["title"], f"{sum(spent.values()):.2f} s")
            assert sum(spent.values()) < MOST, spent
    finally:
        fleet.stop()
