# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A scrape of 64 ranks against a scrape of one, and the exporter's memory: scrape.py [RANKS]

The ranks are those of `serve --simulate`, eight an engine, and live in this process. The exporter
is the real one, asked over HTTP as Prometheus asks (OpenMetrics, gzip), while nothing changes,
while every rank has changed, and by many clients at once.
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

from sglang_weight_exporter.simulation import ROUND_SECONDS, Simulation
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

ROUNDS = 30
CLIENTS = 20


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
        moment = time.time()
        simulation = Simulation(runtime_dir, max(ranks // 8, 1), min(ranks, 8), start=moment)
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
            scrape(port)

            before = processor_seconds(exporter.pid)
            found = [scrape(port) for _ in range(ROUNDS)]
            unchanged = (processor_seconds(exporter.pid) - before) / ROUNDS

            before = processor_seconds(exporter.pid)
            for _ in range(ROUNDS):
                moment += ROUND_SECONDS  # Each engine gets a version of the weights.
                simulation.advance(moment)
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
        simulation.close()
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
    print(f"A scrape (OpenMetrics, gzip) of simulated ranks, {ROUNDS} times")
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
