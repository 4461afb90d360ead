# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When a rank reads the segments of its memory again, and what it remembers of it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_exporter.capture.account import OwnedStorages
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.runners.memory import Memory


class Allocator:
    """What torch would say; one segment of this many bytes, all of it free."""

    def __init__(self, reserved: int = 1000) -> None:
        self.reserved, self.reads = reserved, 0
        self.peak = 0
        self.shows_segments = True

    def stats(self) -> dict[int, dict[str, Any]]:
        def counter(current: int) -> dict[str, dict[str, int]]:
            return {"all": {"current": current, "peak": current + 7}}

        names = ("allocated", "active", "requested", "inactive_split")
        counters = {f"{name}_bytes": counter(0) for name in names}
        reserved = counter(self.reserved)
        if self.peak:
            self.peak = reserved["all"]["peak"] = max(self.peak, self.reserved)
        return {0: counters | {"reserved_bytes": reserved}}

    def segments(self) -> Segments:
        self.reads += 1
        if not self.shows_segments:
            raise RuntimeError("not implemented")
        block = {"size": self.reserved, "state": "inactive"}
        return Segments.of_snapshot(
            [{"address": 64, "total_size": self.reserved, "device": 0, "blocks": [block]}]
        )


class BusyAllocator(Allocator):
    """Segments of 10,000 bytes in which blocks of whole hundreds come and go, as torch cuts them
    from free ones and merges them with free neighbours."""

    def __init__(self, segments: int, *, expandable: bool = False) -> None:
        super().__init__(10_000 * segments)
        self.expandable = expandable
        #: Bytes of each block, and what was asked for; ``None``: it is free.
        self.blocks: list[list[tuple[int, int | None]]] = [[(10_000, None)]] * segments

    def allocate(self, requested: int) -> None:
        size = -(-requested // 100) * 100
        for number, blocks in enumerate(self.blocks):
            for place, (nbytes, used) in enumerate(blocks):
                if used is None and nbytes >= size:
                    cut: list[tuple[int, int | None]] = [(size, requested), (nbytes - size, None)]
                    whole = blocks[:place] + cut + blocks[place + 1 :]
                    self.blocks[number] = [block for block in whole if block[0]]
                    return

    def free(self, choice: int) -> None:
        used = [
            (number, place)
            for number, blocks in enumerate(self.blocks)
            for place, block in enumerate(blocks)
            if block[1] is not None
        ]
        if used:
            number, place = used[choice % len(used)]
            merged: list[tuple[int, int | None]] = []
            for index, (size, requested) in enumerate(self.blocks[number]):
                free = requested is None or index == place
                if free and merged and merged[-1][1] is None:
                    merged[-1] = merged[-1][0] + size, None
                else:
                    merged.append((size, None if free else requested))
            self.blocks[number] = merged

    def stats(self) -> dict[int, dict[str, Any]]:
        blocks = [block for segment in self.blocks for block in segment]
        used = sum(size for size, requested in blocks if requested is not None)
        counted = {
            "reserved": self.reserved,
            "active": used,
            "allocated": used,
            "requested": sum(requested or 0 for _, requested in blocks),
            "inactive_split": sum(
                size
                for segment in self.blocks
                if len(segment) > 1
                for size, requested in segment
                if requested is None
            ),
        }
        counters = {
            f"{name}_bytes": {"all": {"current": value, "peak": value}}
            for name, value in counted.items()
        }
        return {0: counters}

    def segments(self) -> Segments:
        self.reads += 1
        return Segments.of_snapshot(
            {
                "address": 2**30 * (1 + number),
                "total_size": 10_000,
                "device": 0,
                "is_expandable": self.expandable,
                "blocks": [
                    {
                        "size": size,
                        "requested_size": requested or 0,
                        "state": "inactive" if requested is None else "active_allocated",
                    }
                    for size, requested in segment
                ],
            }
            for number, segment in enumerate(self.blocks)
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


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9_999)) | st.none(), min_size=1, max_size=60)
)
def test_what_comes_and_goes_in_segments_is_known_without_reading_them(
    steps: list[tuple[bool, int] | None],
) -> None:
    """As after the first flush, which makes lists of free slots anew in what is free. ``None``: a
    capture."""
    allocator = BusyAllocator(3)
    memory = Memory(stats=allocator.stats)
    read(memory, allocator)
    for step in (*steps, None):
        if step is None:
            found = read(memory, allocator)
            assert allocator.reads == 1
            again = BusyAllocator(3)
            again.blocks = allocator.blocks
            assert found.parts == read(Memory(stats=again.stats), again).parts
        elif step[0]:
            allocator.allocate(step[1])
        else:
            allocator.free(step[1])


def test_segments_that_grow_are_read_again_when_something_has_changed_in_them() -> None:
    """Of their free blocks torch counts more as split than those in segments that are in use."""
    allocator = BusyAllocator(1, expandable=True)
    memory = Memory(stats=allocator.stats)
    for reads in (1, 1):
        read(memory, allocator)
        assert allocator.reads == reads
    allocator.allocate(500)
    parts = read(memory, allocator).parts
    assert parts is not None
    assert (allocator.reads, parts["other_tensors"]) == (2, 500)


def test_what_the_counters_do_not_explain_is_read() -> None:
    """Blocks of somebody who is known were freed: his part is another's now."""
    allocator = BusyAllocator(1)
    allocator.allocate(500)
    start, nbytes = (np.array([value], dtype=np.uint64) for value in (2**30, 500))
    owned = [OwnedStorages("weights", start, nbytes)]
    memory = Memory(stats=allocator.stats)
    memory.read(allocator.segments, lambda: owned, [], thorough=True)
    allocator.free(0)
    memory.read(allocator.segments, lambda: owned, [], thorough=False)
    (device,) = memory.devices()
    assert device.parts is not None
    assert (allocator.reads, device.parts["weights"], device.parts["cached"]) == (2, 0, 10_000)


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


#: What torch has reserved in an update that begins with 1000 of a peak of 5000 → what it needed.
UPDATES: list[tuple[list[int | str], int]] = [
    ([1300], 300),  # Kept.
    ([1300, "flush", 1000], 300),  # Given back by the flush at its end.
    ([6100, 1000], 5100),  # Given back unseen, but torch has a new peak.
    ([900], 0),  # Less than before.
    ([1000, "flush", 800, 1100], 100),  # Flushed at its beginning.
]


@pytest.mark.parametrize(("steps", "needed"), UPDATES)
def test_what_an_update_has_needed_beyond_what_was_reserved(
    steps: list[int | str], needed: int
) -> None:
    allocator = Allocator()
    allocator.peak = 5000
    memory = Memory(stats=allocator.stats)
    assert read(memory, allocator).update_peak is None
    memory.begin_update()
    for step in steps:
        if isinstance(step, int):
            allocator.reserved = step
            allocator.peak = max(allocator.peak, step)
        else:
            memory.note_update()
    read(memory, allocator)
    memory.end_update()
    (found,) = memory.devices()
    assert found.update_peak == needed


def test_the_most_of_all_updates_is_kept_with_what_was_released_then() -> None:
    allocator = Allocator()
    allocator.peak = 10_000
    memory = Memory(stats=allocator.stats)
    for reserved in (1400, 1500):
        read(memory, allocator)
        memory.begin_update()
        allocator.reserved = reserved
        read(memory, allocator)
        memory.end_update()
    (found,) = memory.devices()
    assert (found.update_peak, found.update_peak_released) == (400, 0)
    allocator.reserved = 9000  # Not in an update.
    memory.note_update()
    assert read(memory, allocator).update_peak == 400
