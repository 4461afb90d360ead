# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When a rank reads the segments of its memory again, and what it remembers of it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.runners.memory import Memory


class Allocator:
    """What torch would say; one segment of this many bytes, all of it free."""

    def __init__(self, reserved: int = 1000, blocks: int = 1) -> None:
        self.reserved, self.blocks, self.reads = reserved, blocks, 0
        self.shows_segments = True

    def stats(self) -> dict[int, dict[str, Any]]:
        def counter(current: int) -> dict[str, dict[str, int]]:
            return {"all": {"current": current, "peak": current + 7}}

        return {
            0: {
                "allocated_bytes": counter(0),
                "reserved_bytes": counter(self.reserved),
                "active": counter(self.blocks),
                "segment": counter(1),
            }
        }

    def segments(self) -> Segments:
        self.reads += 1
        if not self.shows_segments:
            raise RuntimeError("not implemented")
        block = {"size": self.reserved, "state": "inactive"}
        return Segments.of_snapshot(
            [{"address": 64, "total_size": self.reserved, "device": 0, "blocks": [block]}]
        )


def read(memory: Memory, allocator: Allocator, *, thorough: bool = False) -> DeviceMemory:
    memory.read(allocator.segments, list, [], thorough=thorough)
    (found,) = memory.devices()
    return found


def test_segments_are_read_again_only_when_something_has_come_or_gone() -> None:
    allocator = Allocator()
    memory = Memory(stats=allocator.stats)
    first = read(memory, allocator)
    assert first.parts is not None
    assert (first.parts["cached"], first.physical) == (1000, 1000)
    read(memory, allocator)
    assert allocator.reads == 1
    allocator.reserved = 1200
    grown = read(memory, allocator)
    assert grown.parts is not None
    assert (allocator.reads, grown.parts["cached"]) == (2, 1200)
    read(memory, allocator, thorough=True)
    assert allocator.reads == 3


def test_an_allocator_that_shows_no_segments_has_totals_and_a_reason() -> None:
    allocator = Allocator()
    allocator.shows_segments = False
    found = read(Memory(stats=allocator.stats), allocator)
    assert (found.parts, found.reserved, found.reserved_peak) == (None, 1000, 1007)
    assert "does not show its segments (not implemented)" in found.reason


def test_the_last_update_and_the_last_release_are_remembered() -> None:
    allocator = Allocator()
    memory = Memory(stats=allocator.stats)
    read(memory, allocator)
    memory.begin_update()
    allocator.reserved = 1300
    read(memory, allocator)
    memory.end_update()
    allocator.reserved = 1250
    read(memory, allocator)
    memory.end_release()
    allocator.reserved = 1400
    found = read(memory, allocator)
    assert (found.before_update, found.after_update, found.after_release) == (1000, 1300, 1250)
