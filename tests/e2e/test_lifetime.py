# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is left when the exporter, a rank or the engine is killed, in that order."""

from __future__ import annotations

import contextlib

import psutil
import pytest
from engines import Engine, Scrape, kill
from waiting import eventually

pytestmark = pytest.mark.ends_engine


def counters(scrape: Scrape) -> dict[str, float]:
    """Every weight counter's series and its value."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for sample in scrape.samples
        if sample.name.startswith("sglang_weight_") and sample.name.endswith("_total")
        if not sample.name.startswith("sglang_weight_exporter_")
    }


def test_a_killed_exporter_is_back_with_its_counters(engine: Engine) -> None:
    before = counters(engine.scrape())
    for _ in range(3):
        (exporter,) = engine.exporters()
        kill([exporter])
        after = eventually(engine.scrape)
        assert counters(after) == before


def test_a_killed_rank_is_gone_at_the_next_scrape_and_the_other_stays(engine: Engine) -> None:
    before = engine.scrape()
    schedulers = engine.schedulers()
    assert len(schedulers) == 2
    # SGLang ends the whole engine when a scheduler dies. Its main process and its data-parallel
    # controller are stopped, so that this is about one rank.
    watching = [process for process in engine.processes() if process not in schedulers]
    exporters = engine.exporters()
    stopped = [process for process in watching if process not in exporters]
    try:
        for process in stopped:
            process.suspend()
        kill(schedulers[1:])
        after = engine.scrape()
        ranks = {sample.labels["dp_rank"] for sample in after.series("sglang_weight_bytes")}
        assert ranks == {"0"}
        left = [sample for sample in after.samples if sample.labels.get("dp_rank") == "1"]
        assert left == []
        for sample in before.series("sglang_weight_bytes", dp_rank="0"):
            assert after.one(sample.name, **sample.labels) == sample.value
        status = engine.exporter_cli("status")
        assert "Traceback" not in status.stderr
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()


def test_the_exporter_ends_after_the_engine_was_stopped(engine: Engine) -> None:
    engine.terminate()
    assert engine.main.poll() is not None
    eventually(lambda: engine.processes() == [], what="every process ended")
    with pytest.raises(OSError, match="refused"):
        engine.scrape()


@pytest.mark.parametrize(
    "orphan",
    [
        "tensor_parallel_engine",
        pytest.param("old_engine", marks=pytest.mark.release("oldest")),
    ],
)
def test_an_orphaned_exporter_ends_by_itself(orphan: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(orphan)
    exporters = engine.exporters()
    assert len(exporters) == 1
    kill([process for process in engine.processes() if process not in exporters])
    # No rank is alive, so no series of one may be served, whether the exporter lives or not.
    with contextlib.suppress(OSError):
        assert engine.scrape().series("sglang_weight_bytes") == []
    eventually(lambda: engine.exporters() == [], what="the exporter ended")
