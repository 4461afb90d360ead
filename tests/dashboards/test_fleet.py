# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Both boards on a fleet of 64 ranks that has a story, measured in the browser."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_recording import Recording, of_a_story, replay_fleet
from monitoring import Monitoring
from panel_page import PanelPage, is_drawn
from waiting import eventually

pytestmark = pytest.mark.release("boards")

SCREEN = ("1440", "900")
SCREENS = (("1280", "720"), SCREEN, ("1920", "1080"))
#: What the rest of the screen is scrolled for: all that is said by name is above it.
BELOW = {"Updates", "Update duration", "State of weights and KV pool"}
PICTURES = os.environ.get("PANELS_PICTURES")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Monitoring]:
    directory = Path(tempfile.mkdtemp(prefix="fleet-"))
    # It goes on while the tests look: an end that has passed would look like a fleet that is gone.
    # No alert can be written before that, so for pictures it ends: once it is written, which takes
    # minutes beside other work.
    end = time.time() + (200 if PICTURES else 300)
    replay_fleet(directory, end, Recording(changed=of_a_story()))
    raised = {"SGLangWeightReplicasDiffer", "SGLangGPUMemoryTakenByOthers"}
    stack = Monitoring(directory, {}, hastened=raised, evaluation_interval="5s").start()
    try:
        assert stack.query('count(sglang_weight_info{role="target"})')[0]["value"][1] == "64"
        if PICTURES:
            firing = f'ALERTS{{alertname=~"{"|".join(raised)}",alertstate="firing"}}'
            eventually(lambda: len(stack.query(firing)) == len(raised), what="alerts fire")
        yield stack
    finally:
        stack.stop()


def cut(found: dict[str, Any]) -> list[str]:
    """Texts that are cut. Grafana cuts the last time of an axis where it is at the axis's end, as
    it is at some moments."""
    return [text for text in found["cut"] if not re.search(r": \d\d:\d\d(:\d\d)?$", text)]


@pytest.mark.parametrize("size", SCREENS, ids="x".join)
def test_the_first_screen(
    dashboard: dict[str, Any],
    size: tuple[str, str],
    fleet: Monitoring,
    panel_page: PanelPage,
    tmp_path: Path,
) -> None:
    directory = Path(PICTURES) if PICTURES else tmp_path
    query = f"board={dashboard['uid']}&scrape=5&from=now-5m"
    panel_page.look(fleet.url, tmp_path / "warm.png", query=query, size=size)
    picture = directory / f"{dashboard['uid']}-{size[0]}.png"
    found = panel_page.look(fleet.url, picture, query=query, size=size)
    assert found["problems"] == []
    for panel in found["panels"]:
        is_drawn(panel)
    assert cut(found) == []
    answers = [panel for panel in found["panels"] if panel["title"] not in BELOW]
    assert max(panel["bottom"] for panel in answers) <= int(size[1])
    (requests,) = found["requests"]
    assert requests < 32
    print(f"{dashboard['uid']}: {requests} requests, {found['seconds']:.2f} s")


def test_the_first_screen_names_them(
    boards: dict[str, Any], fleet: Monitoring, panel_page: PanelPage, tmp_path: Path
) -> None:
    """The replica that is behind, and the GPU that fills up."""
    query = f"board={boards['sglang-fleet']['uid']}&scrape=5&from=now-5m"
    found = panel_page.look(fleet.url, tmp_path / "fleet.png", query=query, size=SCREEN)
    said = {panel["title"]: panel["text"] for panel in found["panels"]}
    assert "east sglang-2 30002" in said["Who is behind"]
    assert "east sglang-3 GPU 2" in said["Least room"]
    served = said["What each engine serves, latest change first"]
    assert "east sglang-5 30005 #" in served  # a version that is no number
    for raw in ("namespace", "instance", "Value", "Time"):
        assert raw not in served


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
    assert max(found["requests"]) < 32
    print(f"both: {found['requests']} requests, {found['seconds']:.2f} s")


@pytest.mark.parametrize("width", [size[0] for size in SCREENS])
def test_nothing_is_cut_where_all_rows_are_open(
    dashboard: dict[str, Any],
    width: str,
    fleet: Monitoring,
    panel_page: PanelPage,
    tmp_path: Path,
) -> None:
    directory = Path(PICTURES) if PICTURES else tmp_path
    query = f"board={dashboard['uid']}&open=1&scrape=5&from=now-5m"
    picture = directory / f"{dashboard['uid']}-open-{width}.png"
    found = panel_page.look(fleet.url, picture, query=query, size=(width,))
    assert found["problems"] == []
    assert cut(found) == []
