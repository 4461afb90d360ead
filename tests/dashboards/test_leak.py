# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Reserved memory that was recorded on a GPU, in a real Prometheus with the rules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitoring import Monitoring, run, with_labels
from waiting import eventually

#: After 50 updates in place, and after each of 50 more that kept 24 MiB; docs/gpu-measurements.md.
IN_PLACE = [4_160_749_568] * 50
LEAKING = [4_185_915_392 + 25_165_824 * number for number in range(50)]


@pytest.fixture
def monitoring(tmp_path: Path) -> Iterator[Monitoring]:
    """An update a minute until now: of an engine in place, and of one that leaks."""
    end = time.time()
    lines = []
    for engine, reserved, growth in (("in-place", IN_PLACE, 0), ("leaks", LEAKING, 25_165_824)):
        identity = {
            "instance": "host:9400",
            "job": "sglang-weights",
            "model_name": "m",
            "engine": engine,
            "role": "target",
            "tp_rank": "0",
            "pp_rank": "0",
            "moe_ep_rank": "0",
            "device": "cuda:0",
            "gpu_uuid": f"GPU-{engine}",
        }
        for name, values in (
            ("sglang_rank_memory_reserved_bytes", reserved),
            ("sglang_rank_memory_update_growth_bytes", [growth] * 50),
            ("sglang_weight_updates_total", list(range(50))),
        ):
            more = {"source": "disk"} if name.endswith("_total") else {}
            series = with_labels(name, **identity, **more)
            lines += [
                f"{series} {value} {end - 60 * (49 - minute):.3f}"
                for minute, value in enumerate(values)
            ]
    text = tmp_path / "recording.om"
    text.write_text("\n".join([*lines, "# EOF", ""]))
    run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, tmp_path / "data")
    started = Monitoring(tmp_path, {}).start()
    yield started
    started.stop()


def test_fifty_updates_that_leak_raise_the_alert_and_fifty_in_place_do_not(
    monitoring: Monitoring,
) -> None:
    name = "SGLangGPUMemoryFillsUp"
    eventually(lambda: monitoring.active_alerts(name), what="the alert fires")
    (alert,) = monitoring.active_alerts(name)
    assert (alert["labels"]["engine"], alert["state"]) == ("leaks", "firing")
