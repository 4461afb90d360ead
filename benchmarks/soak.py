# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether anything grows: soak.py [SECONDS [UPDATES]], by default 600 and 10,000

64 ranks that change all the time are scraped by 20 clients, while one more rank, a process of its
own with the ledger and the publisher of an engine, makes its updates with a table and an event
each. Ends with status 1 when a scrape was not complete, or when the least memory, descriptors or
files of the last tenth of the time are more than a tenth above those of the second.
"""

from __future__ import annotations

import gzip
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scrape import CLIENTS, scrape

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import UpdateCounts
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

RANKS = 64

#: A rank of the 64 changes so often a second; a client asks once a second.
CHANGES_A_SECOND = 16

#: What may be more at the end than after the warm-up.
GROWTH = 1.1

UPDATING = """
import os, sys, time
from pathlib import Path
from sglang_weight_exporter.ledger import Ledger, Verdict
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import TableRef
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.rank import table_file
from sglang_weight_exporter.weight_table import Row, table_of_rows

directory, updates, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
failures = []
settings = Settings(runtime_dir=directory, serve=False)
publisher = Publisher(settings, os.environ, report=lambda *what: failures.append(what))
ledger = Ledger()
engine, ranks, device = Engine(name="40000", instance="soak"), Ranks(), Device(name="cuda:0")
tables = [
    table_of_rows(
        [
            Row(f"layers.{n}.w", base + 4096 * n, 4096, "bfloat16", (32, 64), (64, 1), "cuda:0",
                "parameter", base + 4096 * n, 4096)
            for n in range(500)
        ],
        role="target", captured_at=1.0,
    )
    for base in (1 << 40, 1 << 41)
]

def publish(number):
    table = tables[number % 2]
    ref = TableRef(file=table_file(table), sha256=table.sha256, rows=table.rows, regions={},
                   captured_at=1.0)
    role = ledger.describe("target", Role(name="target", device="cuda:0", table=ref))
    snapshot = Snapshot(rank_id="", pid=os.getpid(), started_at=1.0, engine=engine, roles=(role,),
                        weight_version=ledger.weight_version)
    events = {}
    for ended in ledger.take_finished():
        if ended.update is not None:
            event = Event(number=ended.update.sequence, rank_id="", pid=os.getpid(), engine=engine,
                          ranks=ranks, role="target", device=device, update=ended.update, table=ref)
            events[event.number] = (event, table)
    publisher.publish(snapshot, {"target": table}, events)

ledger.begin_start()
ledger.add_role("target")
ledger.loads.end("target", ledger.loads.begin(), model_path="/models/soak", weight_version="0")
ledger.loads.end_start()
publish(0)
print("ready", flush=True)
began = time.monotonic()
for number in range(1, updates + 1):
    ledger.updates.begin_request(flush_cache=True, weight_version=str(number))
    token = ledger.updates.begin("target", "tensor", ends_with="request")
    ledger.updates.finish(token, Verdict(True, "changed"))
    ledger.updates.end_request(succeeded=True, message="", raised=False)
    publish(number)
    time.sleep(max(0.0, began + seconds * number / updates - time.monotonic()))
print("failures", len(failures), *failures[:1], flush=True)
sys.stdin.read()
"""


def write(store: RankStore, number: int, updates: int) -> None:
    """What a rank with a draft says after so many updates."""
    usage = WeightUsage(
        device="cuda:0", kind="parameter", dtype="bfloat16", nbytes=10**9 + updates, tensors=300
    )
    store.write_snapshot(
        Snapshot(
            rank_id=store.rank_id,
            pid=os.getpid(),
            started_at=1.0,
            engine=Engine(name=str(30000 + number // 8), instance="soak", model_name="soak"),
            ranks=Ranks(tp=number % 8),
            weight_version=str(updates),
            roles=tuple(
                Role(
                    name=name,
                    device="cuda:0",
                    weights=(usage,),
                    loaded_at=1.0,
                    updates={"tensor": UpdateCounts(updates=updates, calls=updates)},
                )
                for name in ("target", "draft")
            ),
        )
    )


class Sample(NamedTuple):
    """What may grow, at one moment; bytes and counts."""

    exporter_memory: int
    exporter_descriptors: int
    exporter_threads: int
    rank_memory: int
    rank_descriptors: int
    rank_threads: int
    files: int


def _of_process(pid: int) -> tuple[int, int, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (
        int(re.findall(rf"^{field}:\s+(\d+)", status, re.MULTILINE)[0])
        for field in ("VmRSS", "Threads")
    )
    return memory * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), threads


class Clients:
    """Ask once a second each, and look whether what comes is all of it."""

    def __init__(self, port: int, complete: Callable[[bytes], str]) -> None:
        self.seconds: list[float] = []
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(port, complete, number / CLIENTS))
            for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int, complete: Callable[[bytes], str], after: float) -> None:
        pause = after
        while not self._stop.wait(pause):
            try:
                seconds, content = scrape(port)
                fault = complete(gzip.decompress(content))
            except OSError as error:
                seconds, fault = 0.0, str(error)
            self.seconds.append(seconds)
            if fault:
                self.faults.append(fault)
            pause = max(0.0, 1.0 - seconds)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def complete(text: bytes) -> str:
    """What is missing of a scrape; empty if nothing is."""
    if not text.endswith(b"# EOF\n"):
        return f"it ends with {text[-40:]!r}"
    roles = text.count(b"\nsglang_weight_info{")
    return "" if roles == 2 * RANKS + 1 else f"{roles} of {2 * RANKS + 1} models"


def soak(seconds: float, updates: int) -> bool:
    """Whether all was well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        runtime_dir = RuntimeDir.open(Path(directory) / "runtime", os.environ)
        alive = [RankStore(runtime_dir, f"{number:016x}") for number in range(RANKS)]
        for number, store in enumerate(alive):
            write(store, number, 0)
        rank = subprocess.Popen(
            [sys.executable, "-c", UPDATING, str(runtime_dir.path), str(updates), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert rank.stdout is not None
        rank.stdout.readline()
        exporter = subprocess.Popen(
            [
                *(sys.executable, "-m", "sglang_weight_exporter", "serve"),
                *("--port", str(port), "--address", "127.0.0.1"),
                *("--runtime-dir", str(runtime_dir.path)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert exporter.stdout is not None
            next(line for line in exporter.stdout if "metrics are at" in line)
            clients = Clients(port, complete)
            samples, began, changes = list[Sample](), time.monotonic(), 0
            while (now := time.monotonic() - began) < seconds:
                while changes < now * CHANGES_A_SECOND:
                    write(alive[changes % RANKS], changes % RANKS, changes // RANKS + 1)
                    changes += 1
                samples.append(
                    Sample(
                        *_of_process(exporter.pid),
                        *_of_process(rank.pid),
                        sum(len(files) for _, _, files in os.walk(runtime_dir.path)),
                    )
                )
                time.sleep(0.5)
            clients.stop()
            outcome = rank.stdout.readline().strip()
        finally:
            for process in (exporter, rank):
                process.kill()
                process.wait()
        for store in alive:
            store.close()
    return _report(samples, clients, changes, updates, outcome)


def _report(
    samples: list[Sample], clients: Clients, changes: int, updates: int, outcome: str
) -> bool:
    tenth = max(len(samples) // 10, 1)
    first, last = samples[tenth : 2 * tenth], samples[-tenth:]
    times = sorted(clients.seconds)
    print(
        f"{RANKS} ranks with {changes:,} changes, one rank with {updates:,} updates ({outcome}), "
        f"{len(times):,} scrapes by {CLIENTS} clients, {len(clients.faults)} not complete"
    )
    for fault in clients.faults[:5]:
        print(f"  {fault}")
    print(
        f"  a scrape: median {statistics.median(times) * 1e3:.0f} ms, "
        f"p99 {times[int(len(times) * 0.99)] * 1e3:.0f} ms, longest {times[-1] * 1e3:.0f} ms"
    )
    print(f"  {'least of a tenth of the time':30} {'second':>12} {'last':>12} {'ratio':>7}")
    well = not clients.faults and outcome == "failures 0"
    for name in Sample._fields:
        before, after = (min(getattr(sample, name) for sample in part) for part in (first, last))
        ratio = after / before
        well &= ratio <= GROWTH
        print(f"  {name.replace('_', ' '):30} {before:>12,.0f} {after:>12,.0f} {ratio:>7.3f}")
    return well


if __name__ == "__main__":
    given = sys.argv[1:]
    well = soak(
        seconds=float(given[0]) if given else 600.0,
        updates=int(given[1]) if len(given) > 1 else 10_000,
    )
    sys.exit(not well)
