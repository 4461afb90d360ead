# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Time in the engine process for an update, with OTLP on and off: otlp.py [TENSORS]

Two ranks in this process do what an engine does when an update ends: read every tensor, write the
table, queue the event, write the snapshot. The exporter process of one sends spans with the whole
table to a collector, that of the other sends nothing. The ranks take turns, and every update moves
all tensors, so that each has a table to send. What the exporter processes cost is printed as well.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import psutil
import torch
from collectors import Backend
from ranks import ExporterProcess, Rank
from waiting import eventually

from sglang_weight_exporter.capture.weights import capture_weights
from sglang_weight_exporter.weight_table import table_rows

UPDATES = 30


def model(tensors: int) -> torch.nn.Module:
    """Layers of seven small parameters, named like those of a language model."""
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "norm", "post_norm", "router"]
    layers = torch.nn.ModuleList(
        torch.nn.ParameterDict({name: torch.empty(16, 16) for name in names})
        for _ in range(tensors // len(names))
    )
    return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})


def update(rank: Rank, weights: torch.nn.Module) -> float:
    """Seconds of CPU that the engine spends: other programs do not count."""
    started = time.thread_time()
    capture = capture_weights(weights, role="target", captured_at=time.time())
    rank.update_to(capture.table)
    return time.thread_time() - started


def has_sent(rank: Rank) -> bool:
    return not rank.waiting()


def main() -> None:
    tensors = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    directory = Path(tempfile.mkdtemp())
    backend = Backend().start()
    endpoint = f"http://127.0.0.1:{backend.grpc_port}"
    ranks = {name: Rank(directory / name / "runtime") for name in ("off", "on")}
    exporters = {
        "off": ExporterProcess(directory / "off" / "runtime").start(),
        "on": ExporterProcess(
            directory / "on" / "runtime", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
        ).start(),
    }
    models = [model(tensors), model(tensors)]
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    try:
        for exporter in exporters.values():
            eventually(exporter.scrape, what="the exporter process")
        for number in range(UPDATES + 2):
            order = ("off", "on") if number % 2 else ("on", "off")
            for name in order:
                taken = update(ranks[name], models[number % 2])
                if number >= 2:
                    seconds[name].append(taken)
            for rank in ranks.values():
                eventually(partial(has_sent, rank), what="an empty queue")
        ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        rows = sum(1 for _ in table_rows(ranks["on"].table)) if ranks["on"].table else 0
        print(f"{rows} tensors, {UPDATES} updates each, in turn")
        for name in ("off", "on"):
            process = exporters[name].process
            assert process is not None
            used = psutil.Process(process.pid)
            cpu = sum(used.cpu_times()[:2]) / (UPDATES + 2)
            print(
                f"  OTLP {name:<4} engine {statistics.median(seconds[name]) * 1e3:7.1f} ms/update"
                f"   exporter process {cpu:6.3f} s of CPU/update, "
                f"{used.memory_info().rss / 2**20:.0f} MiB"
            )
        print(
            f"  ratio on/off {statistics.median(ratios):8.3f}"
            f"   (from {min(ratios):.3f} to {max(ratios):.3f})"
        )
        print(f"  {len(backend.spans())} spans arrived")
    finally:
        for exporter in exporters.values():
            if exporter.process is not None:
                exporter.process.kill()
                exporter.process.wait()
        backend.stop()


if __name__ == "__main__":
    main()
