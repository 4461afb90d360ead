# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What `advise` makes of an engine's memory, and what it says where it does not know."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from http_servers import Handler, LocalServer
from published import Command, PublishedRank

from sglang_weight_exporter.cli import advise
from sglang_weight_exporter.cli.choice import CommandError
from sglang_weight_exporter.cli.worst_moment import (
    Worst,
    from_prometheus,
    seconds_of,
    since_the_start,
)
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts
from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.records.engine import Device, Engine
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryBudget
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.store.namespaces import HOST_PIDS

GIB = 2**30


def snapshot(number: int = 0, **changes: Any) -> Snapshot:
    """A rank with 50 of 80 GiB: 10 of weights, 30 of KV for 300,000 tokens."""
    return Snapshot(
        rank_id=f"rank{number}",
        pid=7 + number,
        pid_namespace=changes.pop("namespace", HOST_PIDS),
        started_at=changes.pop("started_at", 0.0),
        engine=Engine(name="30000", instance="one", model_name="m", sglang_version="0.5.17"),
        devices=(Device(name="cuda:0", uuid="GPU-1"),),
        budget=changes.pop(
            "budget", MemoryBudget(fraction=0.5, before_load=80 * GIB, token_limit=None)
        ),
        memory=(
            DeviceMemory(
                device="cuda:0",
                at=1.0,
                allocated=40 * GIB,
                reserved=44 * GIB,
                allocated_peak=46 * GIB,
                reserved_peak=48 * GIB,
                parts={"weights": 10 * GIB, "kv_pool": 30 * GIB, "cached": 4 * GIB},
            ),
        ),
        roles=(
            Role(
                name="target",
                device="cuda:0",
                kv_pools=changes.pop(
                    "kv_pools",
                    (KvPoolUsage(device="cuda:0", pool="full", nbytes=30 * GIB, tokens=300_000),),
                ),
                lora=(LoraUsage(device="cuda:0", nbytes=4 * GIB, adapters=1, slots=4),),
            ),
        ),
    )


def account(*snapshots: Snapshot, **changes: Any) -> GpuAccount:
    """An 81 GiB GPU with 46 in use, and its ranks; by default one."""
    ranks = snapshots or (snapshot(**changes),)
    gpu = GpuMemory(
        uuid="GPU-1",
        index=0,
        total_bytes=81 * GIB,
        used_bytes=46 * GIB,
        reserved_bytes=1 * GIB,
        processes={each.pid: 45 * GIB for each in ranks},
    )
    (found,) = GpuAccounts(HOST_PIDS).read(ranks, [gpu], 0.0)
    return found


def said(found: GpuAccount, *, most_used: int | None = None, keep: int = 0) -> str:
    worst = since_the_start(found) if most_used is None else Worst(most_used, 7200)
    return "\n".join(advise.lines("30000", advise.advice(found.ranks[0], found, worst), 1, keep))


def test_what_was_free_at_the_worst_moment_since_the_start() -> None:
    """46 GiB are in use, and torch once had 4 more than now: 81 - 1 - 50."""
    text = said(account())
    assert f"free at worst   {30 * GIB:,} bytes of {81 * GIB:,}" in text
    assert "300,000 tokens of 107,374 bytes; the pool has 300,000" in text


def test_the_fraction_is_sglangs_formula_turned_round() -> None:
    """KV = free after the load - (1 - fraction) x free before it: 20 of 80 GiB are 0.25."""
    found = account()
    advice = advise.advice(found.ranks[0], found, Worst(60 * GIB))
    assert advise.suggested(advice, 0) == (0.75, 500_000)
    assert advise.suggested(advice, 8 * GIB) == (0.65, 420_000)
    assert advise.suggested(advice, 30 * GIB) == (0.375, 200_000)  # Less than it has now.


def test_what_is_free_is_shared_by_the_engines_of_a_gpu() -> None:
    """20 GiB are free, 10 for each. The second engine to start, with 10 of weights and 20 of pool,
    had 60 free before its load and finds 50: its pool is 30 = (50 - 10) - (1 - 0.8) * 50."""
    pool = KvPoolUsage(device="cuda:0", pool="full", nbytes=20 * GIB, tokens=200_000)
    budget = MemoryBudget(fraction=0.5, before_load=60 * GIB, token_limit=None)
    second = snapshot(1, started_at=2.0, budget=budget, kv_pools=(pool,))
    found = account(second, snapshot(0, started_at=1.0))
    advices = {
        rank.snapshot.rank_id: advise.advice(rank, found, Worst(60 * GIB)) for rank in found.ranks
    }
    assert advise.suggested(advices["rank0"], 0) == (0.625, 400_000)
    fraction, tokens = advise.suggested(advices["rank1"], 0) or (0, 0)
    assert fraction == pytest.approx(0.8, abs=0.001)
    assert tokens == pytest.approx(300_000, rel=0.002)
    assert f"shared by 2 ranks (of 30000), {10 * GIB:,} bytes" in said(found, most_used=60 * GIB)


def test_costs_are_those_of_this_engine() -> None:
    text = said(account(), most_used=60 * GIB)
    assert f"one replica     {45 * GIB:,} bytes as this rank has them now: does not fit" in text
    assert f"one adapter     {GIB:,} bytes more in --max-loras-per-batch" in text
    assert "20 fit" in text
    assert "1 GiB of draft  10,000 tokens less" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": MemoryBudget(fraction=0.5)}, "fraction        not known"),
        ({"kv_pools": ()}, "fraction        not known"),
        ({"namespace": 5}, "does not show which process it is"),
        (
            {"budget": MemoryBudget(fraction=0.5, before_load=GIB, token_limit=4096)},
            "--max-total-tokens 4,096 limits the pool",
        ),
    ],
)
def test_it_says_what_it_does_not_know(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in said(account(**changes))


@pytest.fixture
def prometheus() -> Any:
    """Answers every question with what `answer` holds, and keeps the last one."""

    class Prometheus(Handler):
        answer = b'{"data": {"result": [{"value": [0, "6.4e+10"]}]}}'
        asked = ""

        def do_GET(self) -> None:
            Prometheus.asked = self.path
            self.reply(Prometheus.answer)

    with LocalServer(Prometheus) as server:
        yield server.url, Prometheus


def ask(url: str, span: int = 7 * 86400, started_at: float = 0.0, now: float = 1e9) -> Worst:
    return from_prometheus(url, span, account(started_at=started_at), now)


def test_prometheus_is_asked_for_the_worst_moment(prometheus: Any) -> None:
    url, handler = prometheus
    assert ask(url, 86400) == Worst(64_000_000_000, 86400)
    assert "sglang_gpu_memory_used_max_bytes" in handler.asked
    assert urllib.parse.quote("[86400s:") in handler.asked
    handler.answer = b'{"data": {"result": []}}'
    with pytest.raises(CommandError, match="does it scrape this exporter"):
        ask(url)
    for address in ("http://127.0.0.1:9", "file:///etc/passwd", "localhost:9090"):
        with pytest.raises(CommandError):
            ask(address)


def test_no_further_back_than_the_start_of_the_youngest_engine(prometheus: Any) -> None:
    """Before, another configuration had the GPU, and for a minute its peak is still seen."""
    url, handler = prometheus
    assert ask(url, started_at=1e9 - 3660).seconds == 3600
    assert urllib.parse.quote("[3600s:") in handler.asked
    handler.asked = ""
    found = account(started_at=1e9 - 100)
    assert from_prometheus(url, 7 * 86400, found, 1e9) == since_the_start(found)
    assert handler.asked == ""


@pytest.mark.parametrize(
    "answer",
    [
        b'{"data": {"result": [{"value": [1, "NaN"]}]}}',
        b'{"data": {"result": [{"value": [1, "+Inf"]}]}}',
        b'{"data": {"result": [{"value": [1, "x"]}]}}',
        b'{"data": {"result": [{"value": [1]}]}}',
        b'{"data": {"result": [{"histogram": []}]}}',
        b'{"data": {"result": null}}',
        b'{"data": []}',
        b"[]",
        b"null",
        b"<html>",
        b'{"status": "error", "error": "x"}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_none_is_said(prometheus: Any, answer: bytes) -> None:
    url, handler = prometheus
    handler.answer = answer
    with pytest.raises(CommandError, match="gave no answer that could be read"):
        ask(url)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--keep", "-5"),
        ("--keep", "1GB"),
        ("--range", "1h]) or vector(1) #"),
        ("--range", "0s"),
        ("--range", ""),
        ("--range", "9" * 30 + "y"),
    ],
)
def test_arguments_that_are_none_are_refused(command: Command, arguments: tuple[str, str]) -> None:
    done = command("advise", *arguments)
    assert done.returncode == 2
    assert arguments[0].encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_durations() -> None:
    for text, seconds in (("90s", 90), ("1h30m", 5400), ("7d", 604800), ("1y", 31536000)):
        assert seconds_of(text) == seconds


#: NVML knows the GPU, and not its memory.
GB10 = """
class NVMLError(Exception): value = 3
def _no(*_, **__): raise NVMLError('Not Supported')
nvmlMemory_v2 = 0
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda gpu: 'GPU-1'
nvmlDeviceGetMemoryInfo = nvmlDeviceGetMigMode = _no
nvmlDeviceGetComputeRunningProcesses = _no
"""


@pytest.mark.parametrize("arguments", [(), ("--prometheus", "http://127.0.0.1:9")])
def test_a_gpu_whose_memory_is_the_host_s(
    rank: PublishedRank, command: Command, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """What is free is what the kernel says, less what torch once had more: 4 GiB."""
    (tmp_path / "pynvml.py").write_text(GB10)
    found = snapshot()
    devices = (msgspec.structs.replace(found.devices[0], integrated=True),)
    found = msgspec.structs.replace(found, rank_id=rank.store.rank_id, devices=devices)
    rank.store.write_snapshot(found)
    done = command("advise", *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    free = re.search(r"free at worst   (-?[\d,]+) bytes of ([\d,]+)", text)
    assert free is not None, text
    memory = psutil.virtual_memory()
    assert int(free[2].replace(",", "")) == memory.total
    assert int(free[1].replace(",", "")) == pytest.approx(memory.available - 4 * GIB, abs=GIB)
    assert "of the host's memory, which is this GPU's" in text
    assert "--mem-fraction-static" in text or "something else has to go first" in text


def test_a_gpu_whose_memory_no_driver_says(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "pynvml.py").write_text(GB10)
    rank.store.write_snapshot(msgspec.structs.replace(snapshot(), rank_id=rank.store.rank_id))
    done = command("advise", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "NVML cannot be read" not in text
    assert f"in torch        {44 * GIB:,} bytes, {48 * GIB:,} at its peak" in text
    assert "300,000 tokens of 107,374 bytes" in text
    assert re.search(r"host's memory   [\d,]+ bytes available now", text)
    assert "No fraction is advised" in text


def test_nvml_that_fails_is_said(rank: PublishedRank, command: Command, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): raise OSError('Unknown Error')\n")
    rank.store.write_snapshot(msgspec.structs.replace(snapshot(), rank_id=rank.store.rank_id))
    done = command("advise", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert b"NVML cannot be read (OSError: Unknown Error)" in done.stdout
    assert b"host's memory" not in done.stdout


@pytest.mark.usefixtures("rank")
def test_without_a_gpu_there_is_nothing_to_advise(command: Command) -> None:
    done = command("advise")
    assert done.returncode == 1
    assert b"nothing to advise" in done.stderr
