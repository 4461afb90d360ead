# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Engines over all GPUs of a machine, or of two ranks on a CPU, that share one exporter.

All engines of a user on a host are served by one exporter process, so these have one runtime
directory, and each is told apart by its port, which is the label ``engine``.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fleet_checkpoints
import psutil
from engines import PREFIX, Engine, Installation, Scrape
from fleet_checkpoints import Model
from gpu_engines import Gpu, Rank, install_probe
from ports import free_port
from prometheus_client.samples import Sample
from waiting import eventually

from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Pipeline and tensor-parallel rank.
Place = tuple[int, int]

TOKENS = 20_000
#: Over gloo. torch for CUDA brings an NCCL, which wants a GPU.
ON_CPU = {
    "SGLANG_NCCL_SO_PATH": "none",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
}


class Figures(dict[str, Any]):
    """What a case has measured, by name."""

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Call it, and keep how many seconds it took."""
        began = time.perf_counter()
        result = call()
        self[name + ", s"] = round(time.perf_counter() - began, 2)
        return result


@dataclass
class Fleet:
    """The machine, the checkpoints, and what its engines share."""

    directory: Path
    gpus: list[Gpu]
    python: Path
    models: dict[str, Model] = field(default_factory=dict)
    exporter_port: int = field(default_factory=free_port)
    out: Path | None = None
    #: All engines by name, also those that have ended.
    every: dict[str, FleetEngine] = field(default_factory=dict)
    #: Those that this part of the fleet has started and not ended.
    own: list[FleetEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime_dir.mkdir(mode=0o700)
        install_probe(self.directory / "site")
        # A start keeps a core a process busy for half a minute.
        cores = os.cpu_count() or 1
        self._starts = threading.BoundedSemaphore(max(1, cores // (self.size + 3)))

    @property
    def on_gpus(self) -> bool:
        return bool(self.gpus)

    @property
    def size(self) -> int:
        """How many ranks the widest engine has."""
        return len(self.gpus) or 2

    @property
    def runtime_dir(self) -> Path:
        return self.directory / "runtime"

    @property
    def references(self) -> Path:
        return self.directory / "references"

    def checkpoint(self, name: str) -> Path:
        return self.directory / "checkpoints" / name

    def write_checkpoints(self, models: Mapping[str, tuple[Model, int]]) -> None:
        """Checkpoint → its model, and the seed of its values."""
        self.models.update({name: model for name, (model, _) in models.items()})
        jobs = [(model, self.checkpoint(name), seed) for name, (model, seed) in models.items()]
        if not self.on_gpus:
            for job in jobs:
                fleet_checkpoints.write(*job, "cpu")
            return
        # In processes that end: whoever has used a GPU keeps some of its memory.
        with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
            for written in [pool.submit(fleet_checkpoints.write, *job, "cuda") for job in jobs]:
                written.result()

    def scrape(self, metrics: str = "full") -> Scrape:
        return Scrape.of(f"http://127.0.0.1:{self.exporter_port}/metrics?metrics={metrics}")

    def exporter(self) -> psutil.Process:
        """The one that serves all engines."""
        found = []
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
                environment = process.environ()
            except (psutil.Error, OSError):
                continue
            mine = environment.get(PREFIX + "RUNTIME_DIR") == str(self.runtime_dir)
            if mine and "sglang_weight_exporter" in command and " serve" in command:
                found.append(process)
        assert len(found) == 1, f"{len(found)} exporter processes: {found}"
        return found[0]

    def engine(
        self,
        name: str,
        model: str,
        flags: str,
        *,
        gpus: Sequence[int] = (),
        isolated: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> FleetEngine:
        """An engine on these neighbouring GPUs, all without a word, which is not started yet.
        `isolated`: it sees no others, as in a container."""
        chosen = [self.gpus[index] for index in gpus] or self.gpus
        probes = self.directory / "probes" / name
        probes.mkdir(parents=True)
        installation = Installation(self.python, gpu=self.on_gpus)
        more = ["--served-model-name", name, "--max-total-tokens", str(TOKENS)]
        more += ["--skip-server-warmup"]
        placed: dict[str, str] = {} if self.on_gpus else dict(ON_CPU)
        if self.on_gpus:
            # Of what is free for it; others share the GPU, and the number of tokens is what counts.
            more += ["--mem-fraction-static", "0.85"]
            placed["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # As nvidia-smi counts.
            if isolated:
                placed["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in chosen)
            else:
                more += ["--base-gpu-id", str(chosen[0].index)]
        else:
            more += ["--disable-custom-all-reduce", "--max-total-tokens", "4096"]
        engine = Engine(
            installation,
            self.checkpoint(model),
            flags=[*more, *flags.split()],
            exporter_port=self.exporter_port,
            variables={
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
                "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
                "GPU_PROBE_DIRECTORY": str(probes),
                "PYTHONPATH": str(self.directory / "site"),
                PREFIX + "RUNTIME_DIR": str(self.runtime_dir),
                PREFIX + "PORT": str(self.exporter_port),
                PREFIX + "METRICS": "default",
                PREFIX + "FINGERPRINT": "on",
                **placed,
                **(variables or {}),
            },
        )
        # A reference is made in the same environment, maybe before the engine starts.
        engine.environment = installation.environment(**engine.variables)
        made = FleetEngine(self, name, model, engine, chosen, probes)
        self.own.append(made)
        self.every[name] = made
        return made

    def start(self, engines: Sequence[FleetEngine], figures: Figures) -> None:
        """Start them, as many at once as the machine has cores for, and wait for all."""

        def ready(each: FleetEngine) -> None:
            with self._starts:
                began = time.monotonic()
                each.engine.start()
                each.engine.wait_until_ready()
                eventually(each.complete, what=f"all ranks of {each.name}")
                figures[f"start of {each.name}, s"] = round(time.monotonic() - began, 1)

        with ThreadPoolExecutor(len(engines)) as pool:
            for done in [pool.submit(ready, each) for each in engines]:
                done.result()

    def make_reference(self, engine: FleetEngine, figures: Figures) -> None:
        """What SGLang's own loader makes of the engine's checkpoint, in another engine."""
        log = self.directory / f"{engine.name}-reference.log"
        flags = [*engine.engine.installation.server_flags(), *engine.engine.flags]
        made = ["--model-path", str(engine.engine.model), "-o", str(self.references)]
        with self._starts:
            done = figures.time(
                "reference",
                lambda: engine.engine.exporter_cli("reference", *made, "--log", str(log), *flags),
            )
        said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        assert done.returncode == 0, done.stdout + done.stderr + said

    def part(self) -> Fleet:
        """The same fleet for one case, which ends the engines that it has started."""
        made = copy.copy(self)
        made.own = []
        return made

    def keep_logs(self) -> None:
        """What engines and makers of references of this part have printed."""
        for engine in self.own:
            if self.out is not None:
                (self.out / f"engine-{engine.name}.log").write_text(engine.engine.log())
                for log in self.directory.glob(f"{engine.name}-*.log"):
                    shutil.copy(log, self.out)

    def stop(self) -> None:
        """End the engines of this part."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda engine: engine.engine.stop(), self.own))
        self.own.clear()


@dataclass
class FleetEngine:
    """One engine of the fleet."""

    fleet: Fleet
    name: str
    model: str
    engine: Engine
    gpus: list[Gpu]
    probes: Path

    @property
    def label(self) -> str:
        return str(self.engine.port)

    def ranks(self) -> list[Rank]:
        """In the order of pipeline stages and tensor-parallel ranks."""
        reader = SnapshotReader(RuntimeDir(self.fleet.runtime_dir))
        found = [
            Rank(directory, snapshot, self.probes)
            for directory, snapshot in reader.read()
            if snapshot.engine.name == self.label
        ]
        return sorted(found, key=lambda rank: rank.snapshot.ranks.order)

    def complete(self) -> bool:
        """Whether every rank has published its weights and its KV pool."""
        scrape = self.fleet.scrape()
        expected = scrape.series("sglang_weight_expected_ranks", engine=self.label)
        pools = self.by_rank(scrape, "sglang_kv_pool_resident_bytes", role="target")
        return bool(expected) and len(pools) == expected[0].value

    def series(self, scrape: Scrape, name: str, **labels: str) -> list[Sample]:
        return scrape.series(name, engine=self.label, **labels)

    def by_rank(self, scrape: Scrape, name: str, **labels: str) -> dict[Place, int]:
        """Sums of the matching series, by rank."""
        sums: dict[Place, int] = {}
        for sample in self.series(scrape, name, **labels):
            place = int(sample.labels["pp_rank"]), int(sample.labels["tp_rank"])
            sums[place] = sums.get(place, 0) + int(sample.value)
        return sums

    def gpu_of(self, place: Place, tp: int) -> Gpu:
        """Where SGLang puts that rank: stage by stage."""
        return self.gpus[place[0] * tp + place[1]]

    def generate(self, tokens: int = 16, requests: int = 4, **more: Any) -> None:
        """So many requests at once."""
        parameters = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}

        def ask(number: int) -> int:
            prompt = [3 + (7 * number + each) % 90 for each in range(40)]
            body = {"input_ids": prompt, "sampling_params": parameters, **more}
            status, answer = self.engine.post("/generate", body)
            assert status == 200, answer
            return int(answer["meta_info"]["completion_tokens"])

        with ThreadPoolExecutor(requests) as pool:
            assert list(pool.map(ask, range(requests))) == [tokens] * requests
