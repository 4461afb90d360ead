# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Simulated ranks: what they live through, and that nobody takes them for real ones."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from collectors import Backend, attributes_of
from disks import disk, fill
from engines import Scrape
from ports import free_port, taken
from waiting import LIMIT, eventually

from sglang_weight_exporter.export.gpu_account import GpuAccounts
from sglang_weight_exporter.hooks.targets import TARGETS
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.settings import DEFAULT_PORT
from sglang_weight_exporter.simulation import Simulation
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

START = 1_700_000_000.0

#: A Llama 3 of 70 billion parameters has 70,553,706,496 of them (Meta's own count). The 161 norms
#: of 8,192 are on every rank of eight, the rest is shared out; two bytes each.
NORMS = 161 * 8192
ONE_OF_EIGHT = 2 * ((70_553_706_496 - NORMS) // 8 + NORMS)

#: Sines and cosines of 64 frequencies at 131,072 positions, in float32.
ROTARY = 131072 * 128 * 4


def snapshots(directory: RuntimeDir) -> list[Snapshot]:
    found = [snapshot for _, snapshot in SnapshotReader(directory).read()]
    return sorted(found, key=lambda snapshot: (snapshot.engine.name, snapshot.ranks.tp))


def simulated(path: Path, *, until: float = 0.0) -> list[Snapshot]:
    directory = RuntimeDir.open(path, {})
    simulation = Simulation(directory, 2, 3, start=START)
    simulation.advance(START + until)
    found = snapshots(directory)
    simulation.close()
    return found


def test_engines_are_loaded_from_the_start(tmp_path: Path) -> None:
    found = simulated(tmp_path / "runtime")
    assert [(each.engine.name, each.ranks.tp) for each in found] == [
        (engine, rank) for engine in ("30000", "30001") for rank in range(3)
    ]
    for each in found:
        (role,) = each.roles
        assert role.weights is not None
        assert role.weights[0].nbytes == ONE_OF_EIGHT
        assert role.loaded_at is not None
        assert START - 60 < role.loaded_at < START
    assert len({each.devices[0].uuid for each in found}) == 6


@pytest.mark.slow
def test_an_hour_has_all_that_the_dashboards_show(tmp_path: Path) -> None:
    found = simulated(tmp_path / "runtime", until=3600)
    for each in found:
        (role,) = each.roles
        (counts,) = (counts for counts in role.updates.values() if counts.calls)
        # One version in 30 s; every fifth fails, every seventh moves all tensors.
        assert counts.updates + counts.failures == 120
        assert counts.failures == 24
        assert role.moved == 17 * 484
    # Ranks of one engine name the same update by the same trace, engines each their own.
    traces = [each.roles[0].last_update.trace_id for each in found if each.roles[0].last_update]
    assert len(set(traces[:3])) == len(set(traces[3:])) == 1
    assert traces[0] != traces[3]


def test_memory_is_released_and_comes_back(tmp_path: Path) -> None:
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(directory, 2, 1, start=START)
    resident = {"30000": set[int](), "30001": set[int]()}
    used = set[int]()
    for second in range(60):
        simulation.advance(START + second)
        for each in snapshots(directory):
            resident[each.engine.name] |= set((each.roles[0].resident or {}).values())
        used.add(simulation.gpus()[1].used_bytes or 0)
    whole = ONE_OF_EIGHT + ROTARY
    assert resident == {"30000": {whole}, "30001": {ROTARY, whole}}
    assert max(used) - min(used) > ONE_OF_EIGHT  # The KV pool goes too.
    simulation.close()


def test_the_account_of_every_gpu_closes_at_every_moment(tmp_path: Path) -> None:
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(directory, 4, 1, start=START)
    accounts = GpuAccounts()
    weights = set[int]()
    for second in range(60):
        simulation.advance(START + second)
        gpus = accounts.read(snapshots(directory), simulation.gpus(), START + second)
        for each in gpus:
            assert each.parts is not None
            assert sum(each.parts.values()) == each.gpu.total_bytes
        weights.add((gpus[1].parts or {})["weights"])
    assert weights == {ROTARY, ONE_OF_EIGHT + ROTARY}
    simulation.close()


def test_of_four_engines_one_has_a_draft_and_one_slots_for_adapters(tmp_path: Path) -> None:
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(directory, 4, 1, start=START)
    simulation.advance(START + 40)  # All have been updated once.
    found = snapshots(directory)
    roles = [[role.name for role in each.roles] for each in found]
    assert roles == [["target"], ["target"], ["target", "draft"], ["target"]]
    assert [bool(each.roles[0].lora) for each in found] == [False, False, False, True]
    target, draft = found[2].roles
    assert target.updates["tensor"].updates == draft.updates["tensor"].updates == 1
    assert target.updated_at is not None
    assert draft.updated_at is not None
    assert 0.4 <= draft.updated_at - target.updated_at <= 1.6  # One after the other.
    # What its GPU has in use is what its roles hold, and what is no weight and no pool.
    for each, gpu in zip(found, simulation.gpus(), strict=True):
        held = sum(
            sum((role.resident or {}).values()) + sum((role.kv_resident or {}).values())
            for role in each.roles
        )
        held += sum(slots.nbytes for slots in each.roles[0].lora)
        assert (gpu.used_bytes or 0) - held == (simulation.gpus()[0].used_bytes or 0) - sum(
            sum((role.resident or {}).values()) + sum((role.kv_resident or {}).values())
            for role in found[0].roles
        )
    simulation.close()


def test_the_third_engine_pauses_for_its_updates(tmp_path: Path) -> None:
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(directory, 4, 1, start=START)
    seen = [set[tuple[bool, bool]]() for _ in range(4)]
    now = START
    while now < START + 30:
        now = simulation.advance(now)
        for states, each in zip(seen, snapshots(directory), strict=True):
            assert each.cache is not None
            states.add((each.cache.paused, each.roles[0].in_progress is not None))
    assert seen[2] == {(False, False), (True, False), (True, True)}
    assert not any(paused for number in (0, 1, 3) for paused, _ in seen[number])
    simulation.close()


def test_replicas_have_one_fingerprint_a_version(tmp_path: Path) -> None:
    found = simulated(tmp_path / "runtime", until=25)
    fingerprints = [each.roles[0].table.fingerprint for each in found if each.roles[0].table]
    assert len(set(fingerprints[:3])) == 3  # Each rank holds another part.
    assert fingerprints[:3] == fingerprints[3:]


def test_hooks_are_those_that_a_rank_has(tmp_path: Path) -> None:
    for each in simulated(tmp_path / "runtime"):
        names = {hook.target for hook in each.hooks}
        assert names <= {target.name for target in TARGETS}
        assert {hook.status for hook in each.hooks} == {"installed", "absent"}


def test_an_update_is_seen_while_it_goes_on(tmp_path: Path) -> None:
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    simulation = Simulation(directory, 1, 1, start=START)
    seen = []
    now = START
    while now < START + 10:
        now = simulation.advance(now)
        seen.append(snapshots(directory)[0].roles[0].in_progress is not None)
    assert seen[0] is False
    assert True in seen
    assert seen[-1] is False
    simulation.close()


def test_the_same_seed_plays_the_same(tmp_path: Path) -> None:
    once, again = (
        [
            (each.engine, each.roles[0].updates, each.roles[0].updated_at)
            for each in simulated(tmp_path / name, until=100)
        ]
        for name in ("once", "again")
    )
    assert once == again


def test_the_command_says_that_nothing_of_it_is_real(tmp_path: Path) -> None:
    """On its endpoint, in its log, in its spans; and it leaves nothing behind."""
    port, backend = free_port(), Backend().start()
    environment = {
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(tmp_path),
        "SGLANG_WEIGHT_EXPORTER_METRICS": "full",
        "SGLANG_WEIGHT_EXPORTER_METADATA_DIR": str(tmp_path / "of-real-ranks"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{backend.grpc_port}",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
    }
    command = (sys.executable, "-m", "sglang_weight_exporter", "serve", "--simulate", "2x4")
    process = subprocess.Popen(
        [*command, "--address", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        scrape = eventually(lambda: Scrape.of(f"http://127.0.0.1:{port}/metrics"))
        assert scrape.one("sglang_weight_exporter_build_info", simulated="true") == 1
        assert scrape.one("sglang_weight_exporter_ranks") == 8
        of = {"model_name": "simulated/llama-70b", "kind": "parameter"}
        assert scrape.sum("sglang_weight_bytes", **of) == 8 * ONE_OF_EIGHT
        assert scrape.sum("sglang_weight_bytes") == 8 * (ONE_OF_EIGHT + ROTARY)
        # The account of each GPU closes: its parts are all that it has.
        assert scrape.sum("sglang_gpu_memory_bytes") == (
            scrape.sum("sglang_gpu_memory_total_bytes")
        )
        assert scrape.sum("sglang_gpu_memory_bytes", part="unattributed") == 0
        assert scrape.sum("sglang_gpu_memory_used_bytes") > scrape.sum("sglang_weight_bytes")
        eventually(lambda: len(backend.spans("sglang.weights.load")) == 8, what="the loads")
        span = backend.spans("sglang.weights.load")[0]
        assert "simulated/llama-70b" in map(str, attributes_of(span).values())
        name = "sglang.weight_exporter_build_info"
        metric = eventually(lambda: backend.metrics().get(name), what="the metrics")
        assert metric is not None
        (point,) = metric.gauge.data_points
        assert attributes_of(point)["simulated"] == "true"
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT)
        backend.stop()
    assert len(re.findall("2 engines of 4 ranks that do not exist", output)) == 1
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_they_live_on_and_no_update_is_lost(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4m") as path:
        directory = RuntimeDir.open(path / "runtime", {})
        simulation = Simulation(directory, 2, 1, start=START)
        filler = fill(path)
        simulation.advance(START + 100)
        assert len(snapshots(directory)) < 2  # What is old is removed, and leaves room for another.
        filler.unlink()
        simulation.advance(START + 300)
        for each in snapshots(directory):
            counts = each.roles[0].updates.values()
            assert sum(each.updates + each.failures for each in counts) == 10
        assert len(snapshots(directory)) == 2
        simulation.close()


@pytest.mark.slow
def test_a_disk_that_is_full_meanwhile_does_not_freeze_the_command(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4m") as path, started(path, "4x1") as (process, port):
        address = f"http://127.0.0.1:{port}/metrics"
        eventually(lambda: Scrape.of(address))
        filler = fill(path)
        ranks = "sglang_weight_exporter_ranks"
        eventually(lambda: Scrape.of(address).one(ranks) < 4, what="a rank that could not write")
        filler.unlink()
        eventually(lambda: Scrape.of(address).one(ranks) == 4, what="all ranks")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT)
    assert "simulated: a rank could not be written ([Errno 28]" in output
    assert "Traceback" not in output


@contextlib.contextmanager
def started(directory: Path, fleet: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, with its files in this directory, and its port."""
    port = free_port()
    command = (sys.executable, "-m", "sglang_weight_exporter", "serve", "--simulate", fleet)
    process = subprocess.Popen(
        [*command, "--address", "127.0.0.1", "--port", str(port)],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("fleet", ["4", "4x", "x8", "0x8", "4x8x2", "-1x2"])
def test_a_fleet_that_makes_no_sense_is_refused(fleet: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "serve", f"--simulate={fleet}"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 2
    assert "write 4x8 for 4 engines of 8 ranks" in done.stderr


def test_real_ranks_get_no_simulated_neighbours(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sglang_weight_exporter", "serve", "--simulate", "1x1"),
            *("--runtime-dir", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 2
    assert "leave --runtime-dir away" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shows_one_of_their_updates_where_its_usual_port_is_taken() -> None:
    """By somebody who never answers. With a port of its own nobody follows it there."""
    demo = Path(__file__).parents[2] / "demo" / "demo.py"
    with taken(DEFAULT_PORT):
        done = subprocess.run(
            [sys.executable, str(demo), "--simulated", "--exit"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"^ *sglang_weight_updates_total.*$", done.stdout, re.MULTILINE)
    assert line.split()[1:3] == ["0", "1"]
    # The exporter has ended, and its port is free again.
    (url,) = re.findall(r"Metrics +(\S+)", done.stdout)
    assert f":{DEFAULT_PORT}/" not in url
    with pytest.raises(OSError, match="refused"):
        Scrape.of(url)
