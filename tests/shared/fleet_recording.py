# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet of 64 ranks in Prometheus's storage: what `serve --simulate` would have served.

The simulation looks at no clock, so minutes of it are there in seconds.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from monitoring import run, shaped_like_others, with_labels
from prometheus_client import Metric
from prometheus_client.registry import Collector

from sglang_weight_exporter.export.gpu_account import GpuAccounts
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.simulation import Simulation
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: One engine a host.
HOSTS, RANKS = 8, 8
SECONDS, SCRAPE_SECONDS = 420, 5


class Nothing(Collector):
    """No `process_*`: there is no exporter process."""

    def collect(self) -> Iterable[Metric]:
        return ()


async def scrapes(directory: Path, end: float) -> AsyncIterator[tuple[float, int, str]]:
    """Time, host and text of each scrape until `end`."""
    runtime_dir = RuntimeDir.open(directory / "runtime", {})
    start = end - SECONDS
    simulation = Simulation(runtime_dir, HOSTS, RANKS, start=start)
    reader = SnapshotReader(runtime_dir)
    views: dict[int, HostView] = {}
    accounts = [GpuAccounts() for _ in range(HOSTS)]
    expositions = [
        Exposition(
            partial(views.__getitem__, host), Nothing(), exemplars=lambda: False, guard=Guard()
        )
        for host in range(HOSTS)
    ]
    try:
        for step in range(SECONDS // SCRAPE_SECONDS + 1):
            at = start + step * SCRAPE_SECONDS
            simulation.advance(at)
            snapshots = [snapshot for _, snapshot in reader.read()]
            gpus = simulation.gpus()
            for host, exposition in enumerate(expositions):
                here = tuple(each for each in snapshots if each.engine.name == str(30000 + host))
                mine = gpus[host * RANKS : (host + 1) * RANKS]
                views[host] = HostView(
                    snapshots=here,
                    gpus=accounts[host].read(
                        here, [replace(gpu, index=gpu.index % RANKS) for gpu in mine], at
                    ),
                    started_at=start,
                    now=at,
                    simulated=True,
                )
                yield at, host, (await exposition.scrape(openmetrics=False, gzip=False)).decode()
    finally:
        simulation.close()


async def series(directory: Path, end: float) -> dict[str, list[str]]:
    """Lines of OpenMetrics by series, with labels as a scrape adds them.

    dcgm-exporter's and SGLang's own are made up in the shape that those programs give them.
    """
    found: dict[str, list[str]] = {}
    labelled: dict[tuple[int, str], str] = {}
    async for at, host, text in scrapes(directory, end):
        address = f"10.0.0.{host + 1}"
        place = {"cluster": "east", "namespace": "serving", "pod": f"sglang-{host}"}
        scraped = {"instance": f"{address}:9400", "job": "pods", **place}
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            name, value = line.rsplit(" ", 1)
            ours = labelled.get((host, name)) or with_labels(name, **scraped)
            labelled[host, name] = ours
            found.setdefault(ours, []).append(f"{ours} {value} {at:.3f}\n")
            for shaped, its_value in shaped_like_others(name, float(value)):
                theirs = with_labels(shaped.replace("gpu-host", address), **place)
                found.setdefault(theirs, []).append(f"{theirs} {its_value:.17g} {at:.3f}\n")
    return found


def replay_fleet(directory: Path, end: float) -> None:
    """Write it into Prometheus's storage as if it ended then."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as simulated:
        found = asyncio.run(series(Path(simulated), end))
    text = directory / "fleet.om"
    with text.open("w") as file:
        for lines in found.values():
            file.writelines(lines)
        file.write("# EOF\n")
    run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, directory / "data")
    text.unlink()
