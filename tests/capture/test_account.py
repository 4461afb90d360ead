# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The account of torch's memory against a count of every single byte, for any segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs numpy, which comes with SGLang")
pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sglang_weight_exporter.capture.account import Account, OwnedStorages, account  # noqa: E402
from sglang_weight_exporter.capture.allocations import Segments  # noqa: E402
from sglang_weight_exporter.records.memory import MEMORY_PARTS, MemoryPart  # noqa: E402

DEFAULT, SAVED_WEIGHTS, SAVED_POOL, GRAPHS = (0, 0), (0, 1), (0, 2), (0, 3)
Owner = tuple[MemoryPart, int, int]  # part, start, bytes


def segment(
    address: int, pool: tuple[int, int], *blocks: tuple[int, int, bool], device: int = 0
) -> dict[str, Any]:
    """As ``torch.cuda.memory_snapshot`` has it; blocks as size, requested, live."""
    return {
        "address": address,
        "device": device,
        "total_size": sum(size for size, _, _ in blocks),
        "segment_pool_id": pool,
        "is_expandable": False,
        "blocks": [
            {
                "size": size,
                "requested_size": requested,
                "state": "active_allocated" if live else "inactive",
            }
            for size, requested, live in blocks
        ],
    }


def taken(segments: list[dict[str, Any]], owners: list[Owner], **how: Any) -> Account:
    known = [
        OwnedStorages(part, np.array([start], dtype=np.uint64), np.array([nbytes], dtype=np.uint64))
        for part, start, nbytes in owners
    ]
    return account(Segments.of_snapshot(segments), known, device=0, **how)


def held(found: Account) -> dict[str, int]:
    return {part: nbytes for part, nbytes in (found.parts or {}).items() if nbytes}


@st.composite
def memories(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Owner]]:
    """Segments of two devices, and storages of parts in live blocks, overlapping ones too."""
    segments, owners, address = [], list[Owner](), 1000
    for _ in range(draw(st.integers(0, 5))):
        pool = draw(st.sampled_from([DEFAULT, DEFAULT, SAVED_WEIGHTS, SAVED_POOL, GRAPHS, (9, 0)]))
        blocks, start = [], address
        for _ in range(draw(st.integers(1, 4))):
            size = draw(st.integers(1, 12))
            live = draw(st.booleans())
            blocks.append((size, draw(st.integers(0, size)), live))
            for _ in range(draw(st.integers(0, 2))):
                part = draw(st.sampled_from(MEMORY_PARTS[:5]))
                first = start + draw(st.integers(0, size - 1))
                owners.append((part, first, draw(st.integers(1, start + size - first))))
            start += size
        segments.append(segment(address, pool, *blocks, device=draw(st.integers(0, 1))))
        address = start + draw(st.sampled_from([0, 5]))
    return segments, owners


@given(memories())
@example(
    (
        [segment(1000, (0, 1), (2, 0, True), (1, 0, False))],
        [("weights", 1001, 1), ("derived_weights", 1000, 2)],
    )
)
def test_every_byte_counts_once(drawn: tuple[list[dict[str, Any]], list[Owner]]) -> None:
    segments, owners = drawn
    found = taken(segments, owners)
    assert found.parts is not None
    mine = [each for each in segments if each["device"] == 0]
    assert sum(found.parts.values()) == sum(each["total_size"] for each in mine)
    owned, cached, fragments = set(), 0, 0
    holding = set()
    for each in segments:
        address = each["address"]
        for block in each["blocks"]:
            if block["state"] != "inactive":
                for part, start, nbytes in owners:
                    here = range(max(start, address), min(start + nbytes, address + block["size"]))
                    if each["device"] == 0:
                        owned |= set(here)
                    if here and part != "derived_weights":
                        holding.add(each["segment_pool_id"])
            address += block["size"]
    for each in mine:
        pool = each["segment_pool_id"]
        if pool[0] or (pool != DEFAULT and pool not in holding):
            continue  # A graph's.
        free = sum(block["size"] for block in each["blocks"] if block["state"] == "inactive")
        if free == each["total_size"]:
            cached += free
        else:
            fragments += free
    assert sum(found.parts[part] for part in MEMORY_PARTS[:5]) == len(owned)
    assert (found.parts["cached"], found.parts["fragments"]) == (cached, fragments)


def test_each_part_is_what_lies_there() -> None:
    found = taken(
        [
            segment(0, DEFAULT, (512, 500, True), (512, 300, True), (1024, 0, False)),
            segment(10_000, DEFAULT, (2048, 0, False)),
            segment(20_000, GRAPHS, (512, 400, True), (512, 0, False)),
        ],
        [("weights", 0, 500)],
    )
    assert held(found) == {
        "weights": 500,
        "other_tensors": 300,
        "rounding": 12 + 212,
        "fragments": 1024,
        "cached": 2048,
        "cuda_graphs": 1024,
    }


SAVED = [
    segment(0, SAVED_WEIGHTS, (512, 512, True), (512, 0, False)),
    segment(2000, SAVED_POOL, (1024, 1024, True)),
    segment(4000, GRAPHS, (256, 0, False)),
    segment(6000, DEFAULT, (128, 128, True)),
]
OWNERS: list[Owner] = [("weights", 0, 512), ("kv_pool", 2000, 1024), ("weights", 6000, 128)]


@pytest.mark.parametrize(
    ("released", "nbytes", "gone"),
    [
        ({"weights"}, 1024, {"weights": 128, "kv_pool": 1024, "cuda_graphs": 256}),
        ({"kv_cache"}, 1024, {"weights": 640, "fragments": 512, "cuda_graphs": 256}),
        ({"cuda_graph"}, 256, {"weights": 640, "fragments": 512, "kv_pool": 1024}),
        ({"weights", "kv_cache", "cuda_graph"}, 2304, {"weights": 128}),
    ],
)
def test_released_pools_are_subtracted_whole_and_told_apart_by_what_lies_in_them(
    released: set[str], nbytes: int, gone: dict[str, int]
) -> None:
    found = taken(SAVED, OWNERS, released=released)
    assert found.released == nbytes
    assert held(found) == gone


def test_where_sglang_names_the_graphs_pool_another_private_pool_is_none() -> None:
    segments = [
        segment(0, GRAPHS, (512, 0, False)),
        segment(2000, (0, 8), (512, 400, True), (512, 0, False)),
        segment(4000, (3, 0), (64, 0, False)),  # A graph with a pool of its own.
    ]
    found = taken(segments, [], graph_pools={GRAPHS})
    assert held(found) == {
        "cuda_graphs": 512 + 64,
        "other_tensors": 400,
        "rounding": 112,
        "fragments": 512,
    }


@pytest.mark.parametrize(
    ("segments", "owners", "reason"),
    [
        ([segment(0, DEFAULT, (64, 64, True))], [("weights", 0, 64)], "in pools of their own"),
        (
            [segment(0, SAVED_POOL, (64, 64, True), (64, 64, True))],
            [("weights", 0, 64), ("kv_pool", 64, 64)],
            "what is released and what is not",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_absent_with_the_reason(
    segments: list[dict[str, Any]], owners: list[Owner], reason: str
) -> None:
    found = taken(segments, owners, released={"weights"})
    assert found.parts is None
    assert reason in found.reason


def test_adapter_slots_that_a_module_refers_to_are_no_weights() -> None:
    owners: list[Owner] = [("weights", 0, 64), ("derived_weights", 64, 64), ("lora", 64, 64)]
    found = taken([segment(0, DEFAULT, (64, 64, True), (64, 64, True))], owners)
    assert held(found) == {"weights": 64, "lora": 64}


@pytest.mark.parametrize("graph_pools", [{GRAPHS}, None])
def test_scratch_in_the_graphs_pool_is_released_with_no_weights(graph_pools: Any) -> None:
    """A module's attribute that was bound while a graph was captured lies in that pool."""
    segments = [
        segment(0, SAVED_WEIGHTS, (100, 100, True)),
        segment(1000, GRAPHS, (8, 8, True), (40, 0, False)),
    ]
    owners: list[Owner] = [("weights", 0, 100), ("derived_weights", 1000, 8)]
    found = taken(segments, owners, released={"weights"}, graph_pools=graph_pools)
    assert found.released == 100
    assert held(found) == {"derived_weights": 8, "cuda_graphs": 40}


# Recorded from SGLang 0.5.17 on an H200, see docs/gpu-measurements.md.

RECORDED = Path(__file__).parent / "recorded"

#: 200,000 tokens and one page, 8 layers, keys and values, 4 heads of 128, bfloat16.
POOL = 200_001 * 8 * 2 * 4 * 128 * 2


@pytest.mark.parametrize("name", ["graphs", "memory_saver", "pool_released", "all_released"])
def test_a_recorded_engine_is_accounted_for_to_the_byte(name: str) -> None:
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    segments = [
        segment(address, tuple(pool), *((size, asked, bool(live)) for size, asked, live in blocks))
        for address, _, pool, blocks in recorded["segments"]
    ]
    parts: tuple[MemoryPart, ...] = ("weights", "kv_pool", "kv_tables")
    owners = [(part, start, nbytes) for part in parts for start, nbytes in recorded[part]]
    graphs = tuple(recorded["graph_pool"])
    for graph_pools in ({graphs}, None):  # With and without SGLang naming it.
        found = taken(segments, owners, released=set(recorded["released"]), graph_pools=graph_pools)
        assert found.parts is not None
        assert sum(found.parts.values()) == recorded["reserved"] - found.released
        in_graphs = sum(
            each["total_size"] for each in segments if each["segment_pool_id"] == graphs
        )
        released = set(recorded["released"])
        assert found.parts["kv_pool"] == (0 if "kv_cache" in released else POOL)
        assert found.parts["cuda_graphs"] == (0 if "cuda_graph" in released else in_graphs)
        # Rotary embeddings stay, of which SGLang makes a copy besides.
        assert found.parts["weights"] == (393_216 if "weights" in released else 383_158_272)
        if not released:
            live: tuple[MemoryPart, ...] = (*parts, "other_tensors", "rounding")
            of_graphs = sum(
                block["size"]
                for each in segments
                for block in each["blocks"]
                if each["segment_pool_id"] == graphs and block["state"] != "inactive"
            )
            assert sum(found.parts[part] for part in live) + of_graphs == recorded["allocated"]
