# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Prometheus with a live CPU engine and a recorded GPU host in it, and the page of panels."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from monitoring import DASHBOARDS, LastScrape, Monitoring, replay
from panel_page import PanelPage, build
from waiting import eventually

BOARDS = ("sglang-fleet", "sglang-engine")


@pytest.fixture(scope="session")
def boards() -> dict[str, dict[str, Any]]:
    """The dashboards as they are shipped, by name."""
    return {name: json.loads((DASHBOARDS / f"{name}.json").read_text()) for name in BOARDS}


@pytest.fixture(params=BOARDS)
def dashboard(request: pytest.FixtureRequest, boards: dict[str, Any]) -> dict[str, Any]:
    """Each of them."""
    found: dict[str, Any] = boards[request.param]
    return found


def has_both(stack: Monitoring, selected: str) -> bool:
    return len(stack.query(selected)) == 2


@pytest.fixture(scope="session")
def monitoring(engine: Engine) -> Iterator[Monitoring]:
    """Scrapes the engine's exporter and its own metrics; before that lies the
    recording of a GPU host, which a CPU engine cannot stand for: NVML, a draft, LoRA, release."""
    directory = Path(tempfile.mkdtemp(prefix="monitoring-"))
    host = LastScrape(replay(directory, time.time()))
    targets = {
        "recording": host.place,
        "sglang-weights": f"127.0.0.1:{engine.exporter_port}",
        "sglang": f"127.0.0.1:{engine.port}",
    }
    raised = {"SGLangWeightsReloaded", "SGLangWeightReloadFailed"}
    honoured = {"recording": {"honor_labels": True}}
    stack = Monitoring(directory, targets, scrape=honoured, hastened=raised).start()
    try:
        for series in ("sglang_weight_info", "sglang[:_]token_usage"):
            selected = f'{{__name__=~"{series}",instance=~"127.*"}}'
            eventually(
                partial(has_both, stack, selected),
                what=f"Prometheus has {selected} of both ranks",
            )
        yield stack
    finally:
        stack.stop()
        host.stop()


@pytest.fixture(scope="session")
def panel_page(boards: dict[str, dict[str, Any]]) -> PanelPage:
    """The page of panels with the shipped dashboards in it."""
    return build(boards)
