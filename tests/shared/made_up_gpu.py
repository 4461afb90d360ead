# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU of which torch's allocator has what a test says."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.records.engine import Device

GRAPHS = (0, 3)


class Gpu:
    """A segment that is free, and one of a graph's pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached = 1000
        self.fails = False
        monkeypatch.setattr("sglang_weight_exporter.runners.memory._cuda_stats", self.stats)
        monkeypatch.setattr(Segments, "of_cuda", self.segments)
        monkeypatch.setattr(
            "sglang_weight_exporter.capture.devices.describe", lambda name: Device(name=name)
        )
        monkeypatch.setattr(
            "sglang_weight_exporter.runners.memory.graph_pools", lambda: frozenset({GRAPHS})
        )

    @property
    def reserved(self) -> int:
        return self.cached + 500

    def segments(self) -> Segments:
        return Segments.of_snapshot(
            {
                "address": address,
                "device": 0,
                "total_size": size,
                "segment_pool_id": pool,
                "blocks": [{"size": size, "state": "inactive"}],
            }
            for address, size, pool in ((2**40, self.cached, (0, 0)), (2**41, 500, GRAPHS))
        )

    def stats(self) -> dict[int, dict[str, Any]]:
        if self.fails:
            raise RuntimeError("the driver is gone")
        counters = dict.fromkeys(("allocated", "active", "requested", "inactive_split"), 0)
        counters["reserved"] = self.reserved
        return {
            0: {
                f"{name}_bytes": {"all": {"current": value, "peak": value}}
                for name, value in counters.items()
            }
        }
