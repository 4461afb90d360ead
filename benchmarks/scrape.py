# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A scrape of 64 ranks against a scrape of one, and the exporter's memory: scrape.py [RANKS]

The ranks hold their locks and have snapshots of a mixture-of-experts model; the exporter is the
real process, asked over HTTP as Prometheus asks (OpenMetrics, gzip).
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
from pathlib import Path

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


def rank(runtime_dir: RuntimeDir, number: int) -> RankStore:
    """One living rank of an engine of 8 GPUs a node; every eighth starts another engine."""
    store = RankStore(runtime_dir, f"{number:016x}")
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
            roles=(
                Role(
                    name="target",
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
                ),
            ),
            hooks=tuple(HookState(target=name, status="installed") for name in names),
        )
    )
    return store


def scrape(port: int) -> tuple[float, int, int]:
    """Seconds, compressed bytes and plain bytes of one scrape."""
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
    return time.perf_counter() - started, len(content), len(gzip.decompress(content))


def processor_seconds(pid: int) -> float:
    """What the exporter has used so far (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(ranks: int) -> tuple[float, float, int, int, int, int]:
    """Median seconds and mean processor seconds of a scrape, compressed and plain bytes, series,
    peak resident bytes of the exporter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        runtime_dir = RuntimeDir.open(Path(directory) / "runtime", os.environ)
        alive = [rank(runtime_dir, number) for number in range(ranks)]
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
            used = processor_seconds(exporter.pid)
            found = [scrape(port) for _ in range(ROUNDS)]
            used = (processor_seconds(exporter.pid) - used) / ROUNDS
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
                text = response.read().decode()
            status = Path(f"/proc/{exporter.pid}/status").read_text()
        finally:
            exporter.kill()
            exporter.wait()
        for store in alive:
            store.close()
    series = sum(1 for line in text.splitlines() if line and not line.startswith("#"))
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    seconds = statistics.median(taken for taken, _, _ in found)
    return seconds, used, found[-1][1], found[-1][2], series, peak


def main() -> None:
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    one, all_of_them = measure(1), measure(many)
    print(f"A scrape (OpenMetrics, gzip), median of {ROUNDS}")
    print(
        f"  {'ranks':>5} {'ms':>8} {'cpu ms':>8} {'series':>8} {'bytes':>10} {'gzip':>9}"
        f" {'peak memory':>12}"
    )
    for ranks, (seconds, used, compressed, plain, series, peak) in (
        (1, one),
        (many, all_of_them),
    ):
        print(
            f"  {ranks:>5} {seconds * 1e3:>8.1f} {used * 1e3:>8.1f} {series:>8,} {plain:>10,}"
            f" {compressed:>9,} {peak / 1e6:>9.1f} MB"
        )
    print(f"  ratio of times      {all_of_them[1] / one[1]:.1f} for {many} times the ranks")
    print(f"  series a rank       {(all_of_them[4] - one[4]) / (many - 1):.1f}")
    print(f"  bytes a rank        {(all_of_them[3] - one[3]) / (many - 1):.0f}")
    print(f"  of them gzipped     {(all_of_them[2] - one[2]) / (many - 1):.0f}")


if __name__ == "__main__":
    main()
