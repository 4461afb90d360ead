# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`status` on the command line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from published import Command, PublishedRank

from sglang_weight_exporter.records.contents import ContentChanges, Layer
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.records.pools import KvPoolUsage
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import WeightUsage


def test_an_update_that_nobody_ended_is_over_once_it_is_idle(
    rank: PublishedRank, command: Command
) -> None:
    rank.begin_update()
    assert b"update  in progress" in command("status").stdout
    an_hour_ago = time.time() - 3600
    rank.begin_update(started_at=an_hour_ago, last_call_at=an_hour_ago, calls=3, idle_seconds=10.0)
    assert b"in progress" not in command("status").stdout


def test_ranks_are_named_as_people_do_and_in_their_order(
    runtime_dir: Path, command: Command
) -> None:
    places = Ranks(tp=1, dp=1), Ranks(tp=1, dp=0, moe_ep=1), Ranks(tp=0, dp=0)
    alive = [PublishedRank(runtime_dir, ranks=ranks) for ranks in places]
    for each in alive:
        each.publish()
    shown = command("status").stdout.decode().splitlines()
    assert [line.partition("  ")[0] for line in shown if line.startswith("engine ")] == [
        "engine 30000, tp 0 pp 0 dp 0",
        "engine 30000, tp 1 pp 0 dp 0 ep 1",
        "engine 30000, tp 1 pp 0 dp 1",
    ]


def test_weights_whose_memory_was_given_back_are_said_to_be_released(
    rank: PublishedRank, command: Command
) -> None:
    assert b"released" not in command("status").stdout
    rank.release_memory()
    assert b"in 4 tensors, released" in command("status").stdout


def test_the_version_is_shown_as_it_was_given(rank: PublishedRank, command: Command) -> None:
    rank.publish(weight_version="step-42")
    assert b"\n  version   step-42\n" in command("status").stdout


def test_what_a_rank_waits_in_is_named_with_its_time(rank: PublishedRank, command: Command) -> None:
    rank.begin_update(phase="receive", phase_since=time.time() - 90)
    found = re.search(rb"\(receive for (\d+\.\d) s\)", command("status").stdout)
    assert found is not None
    assert float(found[1]) >= 90
    rank.publish(running={"init_weights_update_group": time.time() - 30})
    shown = command("status").stdout
    found = re.search(rb"\n  runs      init_weights_update_group for (\d+\.\d) s\n", shown)
    assert found is not None
    assert float(found[1]) >= 30


def test_what_the_last_update_changed_is_summed_by_class_of_layer(
    rank: PublishedRank, command: Command
) -> None:
    assert rank.role.last_update is not None
    changed: dict[Layer, int] = {"attention": 3, "experts": 0, "norm": 1}
    contents = ContentChanges(tensors=changed, nbytes={**changed, "attention": 4096, "norm": 8})
    update = msgspec.structs.replace(rank.role.last_update, contents=contents)
    rank.role = msgspec.structs.replace(rank.role, last_update=update)
    rank.write_again()
    line = "    changed 4 tensors, 4,104 bytes: attention 3, norm 1; nothing in experts"
    assert line in command("status").stdout.decode().splitlines()


#: A driver with a GPU of 80 GiB of which it keeps one itself; processes are not shown.
NVML = """
class NVMLError(Exception): value = 3
def _no(*_, **__): raise NVMLError("Not Supported")
class Memory: total, reserved, used, free = 80 << 30, 1 << 30, {used} << 30, (79 - {used}) << 30
nvmlMemory_v2 = 0
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda gpu: "GPU-1"
nvmlDeviceGetMemoryInfo = lambda *_, **__: Memory
nvmlDeviceGetMigMode = nvmlDeviceGetComputeRunningProcesses = _no
"""
GIB = 2**30


def on_gpu(number: int = 0, **memory: Any) -> Snapshot:
    """A rank that torch gave 40 GiB, 4 of them cached, of which some may be released."""
    kept = 36 * GIB - memory.get("released", 0)
    return Snapshot(
        rank_id="",
        pid=7 + number,
        started_at=0.0,
        engine=Engine(name=str(30000 + number), instance=str(number), model_name="m"),
        devices=(Device(name="cuda:0", uuid="GPU-1"),),
        memory=(
            DeviceMemory(
                device="cuda:0",
                at=1.0,
                allocated=36 * GIB,
                reserved=40 * GIB,
                allocated_peak=38 * GIB,
                reserved_peak=41 * GIB,
                parts={"kv_pool": kept, "cached": 4 * GIB},
                **memory,
            ),
        ),
        roles=(
            Role(
                name="target",
                device="cuda:0",
                kv_pools=(KvPoolUsage(device="cuda:0", pool="full", nbytes=30 * GIB, tokens=1),),
            ),
        ),
    )


@pytest.fixture
def gpu_status(runtime_dir: Path, command: Command, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """What `status` says after its ranks, of a GPU with so many GiB in use."""
    stores: list[PublishedRank] = []

    def shown(*snapshots: Snapshot, used: int = 50) -> str:
        (tmp_path / "pynvml.py").write_text(NVML.format(used=used))
        for snapshot in snapshots:
            stores.append(PublishedRank(runtime_dir))
            rank_id = stores[-1].store.rank_id
            stores[-1].store.write_snapshot(msgspec.structs.replace(snapshot, rank_id=rank_id))
        done = command("status", PYTHONPATH=str(tmp_path)).stdout.decode()
        return done[done.index("\nGPU ") :] if "\nGPU " in done else ""

    yield shown
    for each in stores:
        each.store.close()


def test_what_is_released_and_what_is_free(gpu_status: Callable[..., str]) -> None:
    """Two engines have released 20 and 15 GiB; a trainer took some: 80 - 1 - 60 are free."""
    ranks = on_gpu(0, released=20 * GIB), on_gpu(1, released=15 * GIB)
    shown = gpu_status(*ranks, used=60)
    assert f"GPU 0, GPU-1: {19 * GIB:,} bytes free" in shown
    assert f"resume    takes {35 * GIB:,} bytes, {16 * GIB:,} more than there are" in shown


def test_what_is_released_and_fits(gpu_status: Callable[..., str]) -> None:
    shown = gpu_status(on_gpu(released=20 * GIB), used=30)
    assert f"resume    takes {20 * GIB:,} bytes, and they fit" in shown


def test_what_is_released_and_not_known(gpu_status: Callable[..., str]) -> None:
    (memory,) = on_gpu().memory
    old = msgspec.structs.replace(memory, parts=None, reason="the saver has no pools")
    (role,) = on_gpu().roles
    weights = WeightUsage(device="cuda:0", kind="parameter", dtype="u8", nbytes=9, tensors=1)
    gone = msgspec.structs.replace(role, weights=(weights,), resident={"cuda:0": 0})
    shown = gpu_status(msgspec.structs.replace(on_gpu(), memory=(old,), roles=(gone,)))
    assert "resume    takes what is not known: the saver has no pools" in shown


def test_the_next_update_and_the_room(gpu_status: Callable[..., str]) -> None:
    """79 - 77 are free, and torch has 4 cached."""
    shown = gpu_status(on_gpu(update_peak=7 * GIB), used=77)
    assert (
        f"engine 30000, tp 0 pp 0: one has needed {7 * GIB:,} bytes more than torch had, "
        f"{GIB:,} more than there are: {2 * GIB:,} free, {4 * GIB:,} in torch's cache"
    ) in shown


def test_an_update_into_released_memory_has_that_room_again(
    gpu_status: Callable[..., str],
) -> None:
    shown = gpu_status(on_gpu(update_peak=7 * GIB, update_peak_released=30 * GIB), used=77)
    assert f"and they fit: {2 * GIB:,} free" in shown
    assert f"{30 * GIB:,} that were released then" in shown


def test_a_gpu_of_which_there_is_nothing_to_say(gpu_status: Callable[..., str]) -> None:
    assert gpu_status(on_gpu(update_peak=0)) == ""
