# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A scrape of 64 ranks against a scrape of one, and the exporter's memory: scrape.py [RANKS]

The ranks hold their locks and have snapshots of a mixture-of-experts model with a draft; the
exporter is the real process, asked over HTTP as Prometheus asks (OpenMetrics, gzip), while nothing
changes, while every rank has changed, and by many clients at once.
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
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sglang_weight_exporter.hooks.targets import TARGETS
from sglang_weight_exporter.records import (
    Device,
    Engine,
    HookState,
    Kind,
    KvPoolUsage,
    Ranks,
    Role,
    Snapshot,
    TableRef,
    WeightUsage,
)
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

ROUNDS = 30
CLIENTS = 20


def write(store: RankStore, number: int) -> None:
    """One rank of an engine of 8 GPUs a node; every eighth starts another engine."""
    device = Device(name="cuda:0", uuid=f"GPU-{number:032x}", product="NVIDIA H100 80GB HBM3")
    names = dict.fromkeys(target.name for target in TARGETS)
    kinds: tuple[tuple[Kind, str], ...] = (
        ("parameter", "bfloat16"),
        ("parameter", "float8_e4m3fn"),
        ("parameter", "float32"),
        ("buffer", "float32"),
    )
    usage = tuple(
        WeightUsage(device="cuda:0", kind=kind, dtype=dtype, nbytes=10**9, tensors=300)
        for kind, dtype in kinds
    )
    store.write_snapshot(
        Snapshot(
            rank_id=store.rank_id,
            pid=os.getpid(),
            started_at=time.time(),
            engine=Engine(
                name=str(30000 + number // 8), instance="i", model_name="deepseek-ai/DeepSeek-V3"
            ),
            ranks=Ranks(tp=number % 8, moe_ep=number % 8),
            devices=(device,),
            roles=tuple(
                Role(
                    name=name,
                    device="cuda:0",
                    weights=usage,
                    resident={"cuda:0": 4 * 10**9},
                    table=TableRef(
                        file="t", sha256="0" * 64, rows=1200, regions={"cuda:0": 70}, captured_at=1
                    ),
                    kv_pools=(
                        KvPoolUsage(device="cuda:0", pool="full", nbytes=10**10, tokens=10**6),
                    ),
                    kv_resident={"cuda:0": 10**10},
                    loaded_at=1.0,
                    load_seconds=1.0,
                    updated_at=1.0,
                )
                for name in ("target", "draft")
            ),
            hooks=tuple(HookState(target=name, status="installed") for name in names),
        )
    )


def scrape(port: int) -> tuple[float, bytes]:
    """Seconds of one scrape, and what came, compressed."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics",
        headers={
            "Accept": "application/openmetrics-text; version=1.0.0",
            "Accept-Encoding": "gzip",
        },
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=30) as response:
        content = response.read()
    return time.perf_counter() - started, content


def processor_seconds(pid: int) -> float:
    """What the exporter has used so far (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Figures(NamedTuple):
    """What scrapes of so many ranks cost; seconds, and bytes."""

    #: Median of the client's time, mean of the exporter's processor.
    unchanged: float
    unchanged_processor: float
    #: Each rank has written a new snapshot before each scrape.
    changed_processor: float
    #: What :data:`CLIENTS` wait that ask without a pause.
    p99: float
    compressed: int
    plain: int
    series: int
    peak_memory: int


def measure(ranks: int) -> Figures:
    """A new exporter process beside so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        runtime_dir = RuntimeDir.open(Path(directory) / "runtime", os.environ)
        alive = [RankStore(runtime_dir, f"{number:016x}") for number in range(ranks)]

        def write_all() -> None:
            for number, store in enumerate(alive):
                write(store, number)

        write_all()
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
            exporter.stdout.readline()  # "metrics are at …"
            scrape(port)

            before = processor_seconds(exporter.pid)
            found = [scrape(port) for _ in range(ROUNDS)]
            unchanged = (processor_seconds(exporter.pid) - before) / ROUNDS

            before = processor_seconds(exporter.pid)
            for _ in range(ROUNDS):
                write_all()
                scrape(port)
            changed = (processor_seconds(exporter.pid) - before) / ROUNDS

            with ThreadPoolExecutor(CLIENTS) as clients:
                times = [each for each, _ in clients.map(scrape, [port] * CLIENTS * ROUNDS)]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
                text = response.read().decode()
            status = Path(f"/proc/{exporter.pid}/status").read_text()
        finally:
            exporter.kill()
            exporter.wait()
        for store in alive:
            store.close()
    return Figures(
        unchanged=statistics.median(taken for taken, _ in found),
        unchanged_processor=unchanged,
        changed_processor=changed,
        p99=statistics.quantiles(times, n=100)[-1],
        compressed=len(found[-1][1]),
        plain=len(gzip.decompress(found[-1][1])),
        series=sum(1 for line in text.splitlines() if line and not line.startswith("#")),
        peak_memory=int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024,
    )


def main() -> None:
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    one, all_of_them = measure(1), measure(many)
    print(f"A scrape (OpenMetrics, gzip) of ranks with two roles, {ROUNDS} times")
    print(
        f"  {'ranks':>5} {'ms':>6} {'cpu ms':>7} {'changed':>8} {'p99 of ' + str(CLIENTS):>10}"
        f" {'series':>7} {'bytes':>10} {'gzip':>8} {'peak memory':>12}"
    )
    for ranks, figures in ((1, one), (many, all_of_them)):
        print(
            f"  {ranks:>5} {figures.unchanged * 1e3:>6.1f}"
            f" {figures.unchanged_processor * 1e3:>7.1f}"
            f" {figures.changed_processor * 1e3:>8.1f} {figures.p99 * 1e3:>7.0f} ms"
            f" {figures.series:>7,} {figures.plain:>10,} {figures.compressed:>8,}"
            f" {figures.peak_memory / 1e6:>9.1f} MB"
        )
    further = many - 1
    print(
        f"  ratio of times      {all_of_them.unchanged / one.unchanged:.1f} for {many} times them"
    )
    print(f"  series a rank       {(all_of_them.series - one.series) / further:.1f}")
    print(f"  bytes a rank        {(all_of_them.plain - one.plain) / further:.0f}")
    print(f"  of them gzipped     {(all_of_them.compressed - one.compressed) / further:.0f}")


if __name__ == "__main__":
    main()
