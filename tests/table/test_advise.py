# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What `advise` makes of an engine's memory, and what it says where it does not know."""

from __future__ import annotations

import http.server
import threading
from typing import Any

import pytest
from published import Command

from sglang_weight_exporter.cli import advise
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts
from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.records.engine import Device, Engine
from sglang_weight_exporter.records.memory import DeviceMemory, MemoryBudget
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.store.namespaces import HOST_PIDS

GIB = 2**30


def account(**changes: Any) -> GpuAccount:
    """An 80 GiB GPU whose only rank has 50 GiB: 10 of weights, 30 of KV for 300,000 tokens."""
    snapshot = Snapshot(
        rank_id="rank",
        pid=7,
        pid_namespace=changes.pop("namespace", HOST_PIDS),
        started_at=0.0,
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
    gpu = GpuMemory(
        uuid="GPU-1",
        index=0,
        product="",
        pci_bus_id="",
        total_bytes=81 * GIB,
        used_bytes=46 * GIB,
        reserved_bytes=1 * GIB,
        processes={7: 45 * GIB},
    )
    (found,) = GpuAccounts(HOST_PIDS).read([snapshot], [gpu], 0.0)
    return found


def said(found: GpuAccount, *, most_used: int | None = None, keep: int = 0) -> str:
    used = advise._peaks(found) if most_used is None else most_used
    return "\n".join(advise.lines("30000", advise.advice(found.ranks[0], found, used), 1, keep))


def test_what_was_free_at_the_worst_moment_since_the_start() -> None:
    """46 GiB are in use, and torch once had 4 more than now: 81 - 1 - 50."""
    text = said(account())
    assert f"free at worst   {30 * GIB:,} bytes of {81 * GIB:,}" in text
    assert "300,000 tokens of 107,374 bytes; the pool has 300,000" in text


def test_the_fraction_is_sglangs_formula_turned_round() -> None:
    """KV = free after the load - (1 - fraction) x free before it: 20 of 80 GiB are 0.25."""
    found = account()
    advice = advise.advice(found.ranks[0], found, 60 * GIB)
    assert advise.suggested(advice, 0) == (0.75, 500_000)
    assert advise.suggested(advice, 8 * GIB) == (0.65, 420_000)
    assert advise.suggested(advice, 30 * GIB) == (0.375, 200_000)  # Less than it has now.


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

    class Handler(http.server.BaseHTTPRequestHandler):
        answer = b'{"data": {"result": [{"value": [0, "6.4e+10"]}]}}'
        asked = ""

        def do_GET(self) -> None:
            Handler.asked = self.path
            self.send_response(200)
            self.end_headers()
            self.wfile.write(Handler.answer)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


def test_prometheus_is_asked_for_the_worst_moment(prometheus: Any) -> None:
    url, handler = prometheus
    assert advise._from_prometheus(url, "30d", "GPU-1") == 64_000_000_000
    assert "sglang_gpu_memory_used_max_bytes" in handler.asked
    assert "30d" in handler.asked
    handler.answer = b'{"data": {"result": []}}'
    with pytest.raises(advise.UnanswerableError, match="does it scrape this exporter"):
        advise._from_prometheus(url, "30d", "GPU-1")
    for address in ("http://127.0.0.1:9", "file:///etc/passwd"):
        with pytest.raises(advise.UnanswerableError):
            advise._from_prometheus(address, "7d", "GPU-1")


@pytest.mark.usefixtures("rank")
def test_without_a_gpu_there_is_nothing_to_advise(command: Command) -> None:
    done = command("advise")
    assert done.returncode == 1
    assert b"nothing to advise" in done.stderr
