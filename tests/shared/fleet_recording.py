# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet of 64 ranks, or many of them, in Prometheus's storage.

It is what `serve --simulate` would have served. The simulation looks at no clock, so minutes
of it are there in seconds.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Recording:
    """How long it is, and how many fleets of HOSTS there are, each with addresses and GPUs of its
    own. ``names``: of the series that are kept, all where it is empty."""

    seconds: int = 420
    scrape_seconds: int = 5
    fleets: int = 1
    names: frozenset[str] = frozenset()
    preset: str = "full"
    """Of the metrics that are served."""
    changed: Callable[[int, str, float, float], float | None] = lambda host, name, at, value: value
    """A sample of a host as it is to be kept, by its seconds since the start."""


#: When the fleet of the story comes to rest.
QUIET = 360
#: What is then as it was when all had loaded; what stays as it is; what is not there at rest.
AT_REST = (
    "sglang_weight_resident_bytes",
    "sglang_weight_update_in_progress",
    "sglang_kv_pool_resident_bytes",
    "sglang_kv_cache_paused",
    "sglang_gpu_memory",
    "sglang_rank_memory",
)
KEPT = (
    "sglang_weight_last_update",
    "sglang_weight_updates_total",
    "sglang_weight_update_duration",
    "sglang_weight_update_bytes",
    "sglang_weight_version_hash",
)
NOT_THERE = ("sglang_weight_version", "sglang_weight_update_phase_in_progress")
#: Nothing fails in it.
NEVER = ("sglang_weight_update_failures_total", "sglang_weight_tensors_moved_total")


def of_a_story() -> Callable[[int, str, float, float], float | None]:
    """Versions are no numbers. One replica is behind from the second minute on, one GPU fills up,
    and the others have the same in the end."""
    loaded: dict[tuple[int, str], float] = {}
    held: dict[tuple[int, str], float] = {}

    def rests(host: int, at: float) -> bool:
        """The replica that is behind does so sooner."""
        return at >= (120 if host == 2 else QUIET)

    def followed(host: int, name: str, at: float, value: float) -> float:
        metric = name.partition("{")[0]
        if rests(host, at):
            if metric == "sglang_weight_version_hash" and host != 2:
                return next(of for key, of in held.items() if key[0] == 0 and metric in key[1])
            return held.get((host, name), value)
        held[host, name] = value
        return value

    def changed(host: int, name: str, at: float, value: float) -> float | None:
        metric = name.partition("{")[0]
        if metric == NOT_THERE[0] or (metric == NOT_THERE[1] and rests(host, at)):
            return None
        if metric in NEVER:
            return 0.0
        if metric.startswith(KEPT):
            return followed(host, name, at, value)
        if metric.startswith(AT_REST):
            value = loaded.setdefault((host, name), value) if at < 5 or rests(host, at) else value
        if host == 3 and 'gpu="2"' in name:
            taken = min(1.0, at / 300) * 22.5e9
            if metric.startswith("sglang_gpu_memory_used") or 'part="other_proc' in name:
                return value + taken
            return value - taken if 'part="free"' in name else value
        return value

    return changed


class Nothing(Collector):
    """No `process_*`: there is no exporter process."""

    def collect(self) -> Iterable[Metric]:
        return ()


async def scrapes(
    directory: Path, end: float, recording: Recording
) -> AsyncIterator[tuple[float, int, str]]:
    """Time, host and text of each scrape until `end`."""
    runtime_dir = RuntimeDir.open(directory / "runtime", {})
    start = end - recording.seconds
    simulation = Simulation(runtime_dir, HOSTS, RANKS, start=start)
    reader = SnapshotReader(runtime_dir)
    views: dict[int, HostView] = {}
    accounts = [GpuAccounts() for _ in range(HOSTS)]
    expositions = [
        Exposition(
            partial(views.__getitem__, host),
            Nothing(),
            exemplars=lambda: False,
            guard=Guard(),
            metrics=(recording.preset,),
        )
        for host in range(HOSTS)
    ]
    try:
        for step in range(recording.seconds // recording.scrape_seconds + 1):
            at = start + step * recording.scrape_seconds
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


async def series(
    directory: Path, end: float, recording: Recording
) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Samples by host and series, with labels as a scrape adds them.

    dcgm-exporter's and SGLang's own are made up in the shape that those programs give them.
    """
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    labelled: dict[tuple[int, str], str] = {}
    begin = end - recording.seconds
    async for at, host, text in scrapes(directory, end, recording):
        address = f"10.0.0.{host + 1}"
        place = {"cluster": "east", "namespace": "serving", "pod": f"sglang-{host}"}
        scraped = {"instance": f"{address}:9400", "job": "pods", **place}
        for line in ("up 1", *text.splitlines()):
            if line.startswith("#"):
                continue
            name, _, number = line.rpartition(" ")
            if recording.names and name.partition("{")[0] not in recording.names:
                continue
            value = recording.changed(host, name, at - begin, float(number))
            if value is None:
                continue
            ours = labelled.get((host, name)) or with_labels(name, **scraped)
            labelled[host, name] = ours
            found.setdefault((host, ours), []).append((at, value))
            for shaped, its_value in shaped_like_others(name, value):
                theirs = with_labels(shaped.replace("gpu-host", address), **place)
                found.setdefault((host, theirs), []).append((at, its_value))
    return found


def replay_fleet(directory: Path, end: float, recording: Recording | None = None) -> None:
    """Write it into Prometheus's storage as if it ended then."""
    recording = recording or Recording()
    with tempfile.TemporaryDirectory(prefix="fleet-") as simulated:
        found = asyncio.run(series(Path(simulated), end, recording))
    text = directory / "fleet.om"
    with text.open("w") as file:
        for fleet in range(recording.fleets):
            for (host, name), samples in found.items():
                number = fleet * HOSTS + host
                moved = name
                if fleet:
                    moved = name.replace(f"10.0.0.{host + 1}:", f"10.0.{fleet}.{host + 1}:")
                    moved = moved.replace(f'"sglang-{host}"', f'"sglang-{number}"')
                    moved = moved.replace('"GPU-', f'"GPU-{fleet:03}')
                file.writelines(f"{moved} {value:.17g} {at:.3f}\n" for at, value in samples)
        file.write("# EOF\n")
    run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, directory / "data")
    text.unlink()
