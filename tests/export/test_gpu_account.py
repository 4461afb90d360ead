# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU's account: ranks' parts, NVML's processes, and what nobody is known to have."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from sglang_weight_exporter.export.gpu_account import (
    ENDING_SECONDS,
    WINDOW_SECONDS,
    GpuAccount,
    GpuAccounts,
)
from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.records.engine import Device, Engine
from sglang_weight_exporter.records.memory import MEMORY_PARTS, DeviceMemory, MemoryPart
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.namespaces import HOST_PIDS

UUID = "GPU-1"
CONTAINER = 4026532000


def rank(pid: int, *, namespace: int = HOST_PIDS, at: float = 1.0, **parts: int) -> Snapshot:
    """A rank on the GPU whose torch holds these parts."""
    everything: dict[MemoryPart, int] = {part: parts.get(part, 0) for part in MEMORY_PARTS}
    size = sum(everything.values())
    memory = DeviceMemory(
        device="cuda:0",
        at=at,
        allocated=size,
        reserved=size,
        allocated_peak=size,
        reserved_peak=size,
        parts=everything,
    )
    return Snapshot(
        rank_id=f"rank-{pid}",
        pid=pid,
        pid_namespace=namespace,
        started_at=0.0,
        engine=Engine(name="30000", instance="one"),
        devices=(Device(name="cuda:0", uuid=UUID),),
        memory=(memory,),
    )


def gpu(used: int, processes: dict[int, int] | None, **more: Any) -> GpuMemory:
    return GpuMemory(
        uuid=UUID,
        index=0,
        total_bytes=10_000,
        used_bytes=used,
        reserved_bytes=more.get("reserved", 400),
        processes=processes,
    )


def big(used: int, processes: dict[int, int]) -> GpuMemory:
    return dataclasses.replace(gpu(used, processes), total_bytes=100 * 2**30)


def read(accounts: GpuAccounts, ranks: list[Snapshot], seen: GpuMemory, now: float) -> GpuAccount:
    (account,) = accounts.read(ranks, [seen], now)
    return account


def named(account: GpuAccount) -> dict[str, int]:
    """Parts that hold something."""
    return {part: nbytes for part, nbytes in (account.parts or {}).items() if nbytes}


def test_parts_sum_to_the_gpu_and_name_everybody() -> None:
    ranks = [rank(7, weights=1000, kv_pool=500), rank(8, weights=700)]
    account = read(GpuAccounts(HOST_PIDS), ranks, gpu(4000, {7: 1800, 8: 900, 99: 1250}), now=0.0)
    assert named(account) == {
        "weights": 1700,
        "kv_pool": 500,
        "outside_torch": 300 + 200,
        "other_processes": 1250,
        "unattributed": 50,
        "driver": 400,
        "free": 10_000 - 4000 - 400,
    }
    assert sum(named(account).values()) == 10_000
    assert [(each.used, each.outside_torch) for each in account.ranks] == [(1800, 300), (900, 200)]


def test_what_torch_takes_between_two_captures_does_not_count_as_outside_of_it() -> None:
    accounts, ranks = GpuAccounts(HOST_PIDS), [rank(7, weights=1000)]
    assert named(read(accounts, ranks, gpu(1300, {7: 1300}), 0.0))["outside_torch"] == 300
    later = read(accounts, ranks, gpu(1900, {7: 1900}), 1.0)
    assert (named(later)["outside_torch"], named(later)["since_capture"]) == (300, 600)
    assert later.ranks[0].outside_torch == 300
    captured = [rank(7, weights=1000, cached=600, at=2.0)]
    assert "since_capture" not in named(read(accounts, captured, gpu(1900, {7: 1900}), 2.0))


def test_an_account_that_does_not_close_is_absent() -> None:
    """In the middle of a release the process has less than its rank said."""
    account = read(GpuAccounts(HOST_PIDS), [rank(7, weights=1000)], gpu(800, {7: 800}), 0.0)
    assert account.parts is None
    assert account.ranks[0].outside_torch is None
    assert account.ranks[0].used == 800


def test_an_account_is_absent_while_something_is_under_way_that_no_rank_has_said() -> None:
    """A resume takes gigabytes at once, and its rank reads its memory when it has ended."""
    gigabytes = 7 * 2**30
    accounts, ranks = GpuAccounts(HOST_PIDS), [rank(7, weights=1000)]
    assert read(accounts, ranks, big(1300, {7: 1300}), 0.0).parts is not None
    taken = big(1300 + gigabytes, {7: 1300 + gigabytes})
    assert read(accounts, ranks, taken, 1.0).parts is None
    said = [rank(7, weights=1000 + gigabytes, at=2.0)]
    found = read(accounts, said, taken, 2.0)
    assert named(found)["weights"] == 1000 + gigabytes
    assert "since_capture" not in named(found)
    more = big(1300 + 2 * gigabytes, {7: 1300 + 2 * gigabytes})
    assert read(accounts, said, more, 3.0).parts is None
    assert named(read(accounts, said, more, 4.0))["since_capture"] == gigabytes  # And stays.


def test_a_reading_from_before_a_capture_says_nothing_of_it() -> None:
    """A resume takes 600 bytes; NVML was asked last when they were gone, and is asked again."""
    accounts, resumed = GpuAccounts(HOST_PIDS), [rank(7, weights=1000, at=5.0)]
    before = dataclasses.replace(gpu(700 + 600, {7: 700 + 600}), read_at=4.5)
    found = read(accounts, resumed, before, 5.1)
    assert found.parts is None
    assert found.ranks[0].outside_torch is None
    after = dataclasses.replace(gpu(1700, {7: 1700}), read_at=5.5)
    found = read(accounts, resumed, after, 5.6)
    assert (named(found)["outside_torch"], found.ranks[0].outside_torch) == (700, 700)
    assert "since_capture" not in named(found)
    # A clock that was set back an hour says nothing of which came first.
    set_back = dataclasses.replace(after, read_at=5.5 - 3600)
    assert named(read(accounts, resumed, set_back, 6.0))["outside_torch"] == 700


def test_a_rank_that_ends_is_not_taken_for_somebody_else() -> None:
    accounts, stays = GpuAccounts(HOST_PIDS), rank(8, weights=500)
    both = gpu(1900, {7: 1300, 8: 600})
    assert read(accounts, [rank(7, weights=1000), stays], both, 0.0).parts is not None
    assert read(accounts, [stays], both, 1.0).parts is None
    left = {"weights": 500, "outside_torch": 100, "driver": 400, "free": 9000}
    assert named(read(accounts, [stays], gpu(600, {8: 600}), 2.0)) == left
    found = read(accounts, [stays], both, ENDING_SECONDS + 1.0)
    assert named(found)["other_processes"] == 1300  # The number is another process's by now.


def test_a_gpu_without_a_rank_has_no_account_here() -> None:
    accounts = GpuAccounts(HOST_PIDS)
    unused = dataclasses.replace(gpu(1300, {7: 1300}), uuid="GPU-2")
    found = accounts.read([rank(7, weights=1000)], [unused, gpu(1300, {7: 1300})], 0.0)
    assert [each.gpu.uuid for each in found] == [UUID]
    assert accounts.read([], [unused], 1.0) == ()


def test_an_account_is_absent_where_nvmls_figures_are_of_two_times() -> None:
    seen = dataclasses.replace(gpu(1300, {7: 1300}), changing=True)
    assert read(GpuAccounts(HOST_PIDS), [rank(7, weights=1000)], seen, 0.0).parts is None


@pytest.mark.parametrize(
    ("mine", "its"), [(CONTAINER, CONTAINER), (CONTAINER, HOST_PIDS), (HOST_PIDS, CONTAINER)]
)
def test_ids_of_a_container_are_matched_with_nobodys(mine: int, its: int) -> None:
    """A process of the host may have the same number."""
    ranks = [rank(7, namespace=its, weights=1000)]
    account = read(GpuAccounts(mine), ranks, gpu(4000, {7: 1800, 99: 1250}), 0.0)
    assert account.ranks[0].used is None
    assert named(account)["weights"] == 1000
    assert named(account)["unattributed"] == 3000
    assert sum(named(account).values()) == 10_000


def test_in_a_container_as_many_processes_as_ranks_are_theirs() -> None:
    alone = read(
        GpuAccounts(CONTAINER), [rank(1, namespace=5, weights=1000)], gpu(1900, {99: 1800}), 0.0
    )
    assert alone.ranks[0].outside_torch == 800
    both = [rank(1, namespace=5, weights=1000), rank(2, namespace=6, weights=500)]
    account = read(GpuAccounts(CONTAINER), both, gpu(2500, {98: 1500, 99: 900}), 0.0)
    assert [each.used for each in account.ranks] == [None, None]
    assert named(account)["outside_torch"] == 900
    assert named(account)["unattributed"] == 100


def test_what_ranks_take_when_they_resume_and_what_is_free() -> None:
    """Of two engines on a GPU; not known where one of them cannot tell what it has released."""
    (memory,) = rank(7).memory
    gone = msgspec.structs.replace(memory, reserved=3000, released=3000)
    ranks = [
        msgspec.structs.replace(rank(7), memory=(gone,)),
        msgspec.structs.replace(
            rank(8, weights=500),
            memory=(msgspec.structs.replace(gone, reserved=2500, released=2000),),
        ),
    ]
    account = read(GpuAccounts(HOST_PIDS), ranks, gpu(7000, {7: 100, 8: 600, 99: 6300}), 0.0)
    assert (account.resume, account.free) == (5000, 10_000 - 400 - 7000)
    assert read(GpuAccounts(HOST_PIDS), [rank(7, weights=9)], gpu(100, {7: 100}), 0.0).resume == 0
    unknown = msgspec.structs.replace(gone, parts=None, reason="no pools")
    ranks[0] = msgspec.structs.replace(ranks[0], memory=(unknown,))
    assert read(GpuAccounts(HOST_PIDS), ranks, gpu(7000, {7: 100, 8: 600}), 0.0).resume is None
    shared = dataclasses.replace(gpu(0, None), total_bytes=None, used_bytes=None)
    assert read(GpuAccounts(HOST_PIDS), [rank(7, weights=9)], shared, 0.0).free is None


def test_without_a_list_of_processes_the_rest_is_nobodys() -> None:
    account = read(GpuAccounts(HOST_PIDS), [rank(7, weights=1000)], gpu(4000, None), 0.0)
    assert named(account) == {
        "weights": 1000,
        "unattributed": 3000,
        "driver": 400,
        "free": 5600,
    }


def test_the_most_in_use_is_that_of_the_last_minute_for_everybody_who_asks() -> None:
    accounts, ranks = GpuAccounts(HOST_PIDS), [rank(7, weights=1000)]
    for now, used in ((0.0, 1500), (1.0, 1900), (2.0, 1400)):
        account = read(accounts, ranks, gpu(used, {7: used}), now)
    assert (account.most_used, account.ranks[0].most_used) == (1900, 1900)
    account = read(accounts, ranks, gpu(1400, {7: 1400}), 1.0 + WINDOW_SECONDS)
    assert account.most_used == 1900
    account = read(accounts, ranks, gpu(1400, {7: 1400}), 1.5 + WINDOW_SECONDS)
    assert account.most_used == 1400
