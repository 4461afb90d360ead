# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Both boards on a fleet of 64 ranks, measured in the browser on the screen of a laptop."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_recording import replay_fleet
from monitoring import Monitoring
from panel_page import PanelPage, is_drawn

pytestmark = pytest.mark.release("boards")

SCREEN = ("1440", "900")
PICTURES = os.environ.get("PANELS_PICTURES")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Monitoring]:
    directory = Path(tempfile.mkdtemp(prefix="fleet-"))
    # It goes on while the tests look: an end that has passed would look like a fleet that is gone.
    replay_fleet(directory, time.time() + 120)
    stack = Monitoring(directory, {}).start()
    try:
        assert stack.query('count(sglang_weight_info{role="target"})')[0]["value"][1] == "64"
        yield stack
    finally:
        stack.stop()


def test_the_first_screen(
    dashboard: dict[str, Any], fleet: Monitoring, panel_page: PanelPage, tmp_path: Path
) -> None:
    directory = Path(PICTURES) if PICTURES else tmp_path
    query = f"board={dashboard['uid']}&scrape=5&from=now-5m"
    panel_page.look(fleet.url, tmp_path / "warm.png", query=query, size=SCREEN)
    picture = directory / f"{dashboard['uid']}.png"
    found = panel_page.look(fleet.url, picture, query=query, size=SCREEN)
    assert found["problems"] == []
    for panel in found["panels"]:
        is_drawn(panel)
    assert found["cut"] == []
    assert found["bottom"] <= int(SCREEN[1])
    (requests,) = found["requests"]
    assert requests < 30
    print(f"{dashboard['uid']}: {requests} requests, {found['seconds']:.2f} s")


def test_both_first_screens_at_once(
    boards: dict[str, Any], fleet: Monitoring, panel_page: PanelPage, tmp_path: Path
) -> None:
    queries = [f"board={each['uid']}&scrape=5&from=now-5m" for each in boards.values()]
    picture = tmp_path / "both.png"
    found = panel_page.look(
        fleet.url, picture, query=queries[0], size=SCREEN, beside=tuple(queries[1:])
    )
    assert found["problems"] == []
    assert len(found["requests"]) == len(boards)
    assert max(found["requests"]) < 30
    print(f"both: {found['requests']} requests, {found['seconds']:.2f} s")


def test_nothing_is_cut_where_all_rows_are_open(
    boards: dict[str, Any], fleet: Monitoring, panel_page: PanelPage, tmp_path: Path
) -> None:
    directory = Path(PICTURES) if PICTURES else tmp_path
    query = f"board={boards['sglang-engine']['uid']}&open=1&scrape=5&from=now-5m"
    picture = directory / "sglang-engine-open.png"
    found = panel_page.look(fleet.url, picture, query=query, size=SCREEN[:1])
    assert found["problems"] == []
    assert found["cut"] == []
