# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Regions against a count of every single byte, for random allocations, storages and views."""

from __future__ import annotations

from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs numpy, which comes with SGLang")
pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sglang_weight_exporter.capture.allocations import Segments  # noqa: E402
from sglang_weight_exporter.capture.regions import merge_spans  # noqa: E402

Span = tuple[int, int, int, int]  # device, allocation, start, nbytes


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[Span], list[tuple[int, int]]]:
    """Allocations side by side or apart, and spans of bytes inside them that may touch, overlap,
    repeat or be empty. Allocations of two devices may have the same addresses."""
    allocations: list[tuple[int, int, int]] = []
    for device in range(draw(st.integers(1, 2))):
        address = draw(st.sampled_from([64, 1 << 47]))
        for _ in range(draw(st.integers(1, 4))):
            # Mostly no gap: neighbours must not merge.
            address += draw(st.sampled_from([0, 0, 1, 7]))
            size = draw(st.integers(1, 24))
            allocations.append((device, address, size))
            address += size
    found: list[Span] = []
    for _ in range(draw(st.integers(0, 12))):
        device, address, size = draw(st.sampled_from(allocations))
        start = draw(st.integers(0, size))
        found.append((device, address, address + start, draw(st.integers(0, size - start))))
    return found, [(address, address + size) for _, address, size in allocations]


def merged(found: list[Span]) -> list[tuple[int, int, int]]:
    columns: list[Any] = list(zip(*found, strict=True)) if found else [[], [], [], []]
    regions = merge_spans(
        device=np.array(columns[0], dtype=np.uint32),
        allocation=np.array(columns[1], dtype=np.uint64),
        start=np.array(columns[2], dtype=np.uint64),
        nbytes=np.array(columns[3], dtype=np.uint64),
    )
    return list(
        zip(regions.device.tolist(), regions.ptr.tolist(), regions.nbytes.tolist(), strict=True)
    )


def counted(found: list[Span]) -> list[tuple[int, int, int]]:
    """The same by brute force: mark each byte with its allocation, then read off the runs."""
    owner = {
        (device, address): allocation
        for device, allocation, start, nbytes in found
        for address in range(start, start + nbytes)
    }
    runs: list[list[int]] = []
    for device, address in sorted(owner):
        last = runs[-1] if runs else None
        if (
            last is not None
            and last[0] == device
            and last[1] + last[2] == address
            and owner[device, address - 1] == owner[device, address]
        ):
            last[2] += 1
        else:
            runs.append([device, address, 1])
    return [(device, start, size) for device, start, size in runs]


@given(spans())
def test_regions_are_the_runs_of_bytes_inside_each_allocation(
    drawn: tuple[list[Span], list[tuple[int, int]]],
) -> None:
    found, _ = drawn
    assert sorted(merged(found)) == counted(found)


@given(spans())
def test_the_sum_of_regions_is_the_union_of_spans(
    drawn: tuple[list[Span], list[tuple[int, int]]],
) -> None:
    found, _ = drawn
    union = {
        (device, address)
        for device, _, start, nbytes in found
        for address in range(start, start + nbytes)
    }
    assert sum(size for _, _, size in merged(found)) == len(union)


@given(spans())
def test_the_order_of_tensors_does_not_matter(
    drawn: tuple[list[Span], list[tuple[int, int]]],
) -> None:
    found, _ = drawn
    assert merged(found) == merged(found[::-1]) == merged(found + found)


def of_spans(found: list[tuple[int, int, bool]]) -> Segments:
    """As torch's snapshot has allocations from start to end, some of them in a private pool."""
    return Segments.of_snapshot(
        {
            "address": start,
            "total_size": end - start,
            "segment_pool_id": (0, int(private)),
            "blocks": [],
        }
        for start, end, private in found
    )


@given(spans(), st.lists(st.integers(0, 1 << 48), max_size=20))
def test_a_storage_belongs_to_the_allocation_around_it_or_stands_alone(
    drawn: tuple[list[Span], list[tuple[int, int]]], addresses: list[int]
) -> None:
    allocations = sorted(set(drawn[1]))
    kept: list[tuple[int, int]] = []
    for start, end in allocations:  # One device's: they do not overlap.
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    addresses += [start for start, _ in kept] + [end - 1 for _, end in kept]
    addresses += [end for _, end in kept]
    segments = of_spans([(start, end, False) for start, end in kept])
    expected = [
        next((start for start, end in kept if start <= address < end), address)
        for address in addresses
    ]
    assert segments.allocation_of(np.array(addresses, dtype=np.uint64)).tolist() == expected


def test_neighbouring_allocations_are_not_merged() -> None:
    assert merged([(0, 4096, 4096, 1024), (0, 5120, 5120, 1024)]) == [
        (0, 4096, 1024),
        (0, 5120, 1024),
    ]


def test_neighbours_in_one_allocation_are_merged() -> None:
    assert merged([(0, 4096, 4096, 1024), (0, 4096, 5120, 1024)]) == [(0, 4096, 2048)]


GPU_REGION, GPU_OTHER = (4096, 8192, True), (16384, 32768, False)


def outside_saver(spans: list[tuple[int, int, bool]], storages: dict[int, int]) -> dict[str, int]:
    """What stays of storages on a GPU, by address and bytes, and of 64 bytes on the CPU."""
    return of_spans(spans).outside_saver(
        np.array([*storages, 1 << 40], dtype=np.uint64),
        np.array([*storages.values(), 64], dtype=np.uint64),
        np.array([*[0] * len(storages), 1], dtype=np.uint32),
        ("cuda:0", "cpu"),
    )


def test_what_lies_outside_of_the_savers_regions_keeps_its_memory() -> None:
    inside, outside, of_no_segment = {4096: 1024, 5120: 512}, {16384: 256}, {1 << 30: 128}
    found = outside_saver([GPU_REGION, GPU_OTHER], inside | outside | of_no_segment)
    assert found == {"cuda:0": 256 + 128, "cpu": 64}


def test_a_saver_whose_regions_cannot_be_told_apart_releases_the_whole_gpu() -> None:
    assert outside_saver([GPU_OTHER], {16384: 256}) == {"cuda:0": 0, "cpu": 64}
