# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the pointer table costs, as ratios to a bare loop: pointer_table.py [TENSORS ...]

The baseline, measured in the same run, is what anybody would write:

    [(name, p.data_ptr(), p.nbytes) for name, p in model.named_parameters()]

Processor time, the least of interleaved rounds, so that other work on the machine counts as little
as possible. What runs in the engine is marked with a star. The models have one parameter a module,
as most of SGLang's; then come 2,000 modules of ten. Needs torch; parquet needs pyarrow.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.references import Registrations
from sglang_weight_exporter.capture.regions import merge_spans
from sglang_weight_exporter.capture.weights import WeightCapture, capture_weights
from sglang_weight_exporter.cli import formats
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role
from sglang_weight_exporter.store.encoding import encode
from sglang_weight_exporter.store.files import write_atomically
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.store.weights_metadata import write_files
from sglang_weight_exporter.weight_table import WeightTable, compare_tables, table_rows

ROUNDS = 20
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")


def model_of(tensors: int) -> torch.nn.Module:
    """A model with that many parameters, nested and named as a mixture of experts is."""
    root = torch.nn.Module()
    layers = root.layers = torch.nn.ModuleList()
    left = tensors
    while left:
        layer = torch.nn.Module()
        experts = layer.experts = torch.nn.ModuleList()
        layers.append(layer)
        for _ in range(min(left, 512) // len(PARTS) + 1):
            expert = torch.nn.Module()
            experts.append(expert)
            for name in PARTS[:left]:
                part = torch.nn.Module()
                part.weight = torch.nn.Parameter(torch.empty(4, 8, dtype=torch.bfloat16))
                expert.add_module(name, part)
                left -= 1
    return root


def model_of_tens(modules: int = 2_000) -> torch.nn.Module:
    """A model in which the walk over modules counts for little."""
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList()
    for _ in range(modules):
        layer = torch.nn.Module()
        for index in range(10):
            weight = torch.nn.Parameter(torch.empty(4, 8, dtype=torch.bfloat16))
            layer.register_parameter(f"weight_{index}", weight)
        root.layers.append(layer)
    return root


def bare_loop(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    return [(name, p.data_ptr(), p.nbytes) for name, p in model.named_parameters()]


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of each step at its fastest; every round runs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: min(taken) for name, taken in seconds.items()}


def steps_for(model: torch.nn.Module, directory: Path) -> dict[str, Callable[[], object]]:
    """What is measured on one model; the first is the baseline."""

    def capture() -> WeightTable:
        return capture_weights(model, role="target", captured_at=0.0).table

    def again(previous: WeightCapture) -> WeightCapture:
        """As after an update: derived weights hang where they hung."""
        return capture_weights(
            model,
            role="target",
            captured_at=1.0,
            previous=previous,
            registrations=registrations,
        )

    registrations = Registrations()
    before = capture_weights(model, role="target", captured_at=0.0, registrations=registrations)
    table = before.table
    moved = msgspec.structs.replace(
        before.table,
        data_ptr=(np.frombuffer(table.data_ptr, dtype="<u8") + 64).tobytes(),
        sha256="other",
    )
    assert before.remembered is not None
    elsewhere = [address + 64 for address in before.remembered.data_ptr]
    after = dataclasses.replace(
        before,
        table=moved,
        remembered=dataclasses.replace(before.remembered, data_ptr=elsewhere),
    )
    rows = list(table_rows(table))
    read = Table(
        rank_id="0" * 16,
        pid=1,
        started_at=0.0,
        engine=Engine(name="30000", instance="0"),
        ranks=Ranks(),
        role=Role(name="target", device="cuda:0"),
        weight_version="",
        columns=table,
    )
    columns = {
        "start": np.frombuffer(table.data_ptr, dtype="<u8"),
        "nbytes": np.frombuffer(table.nbytes, dtype="<u8"),
        "device": np.frombuffer(table.device, dtype="<u4"),
    }
    first, last = int(columns["start"].min()), int(columns["start"].max()) + 64
    one_pool = Segments.of_snapshot([{"address": first, "total_size": last - first, "blocks": []}])
    path = directory / "table"

    steps: dict[str, Callable[[], object]] = {
        "bare loop over named_parameters()": lambda: bare_loop(model),
        "* capture, nothing moved": lambda: again(before),
        "* capture, every tensor moved": lambda: again(after),
        "* first capture": capture,
        "* first capture, and write the table": lambda: write_atomically(path, encode(capture())),
        "* compare, every tensor moved": lambda: compare_tables(before.table, after.table),
        "* regions, one allocation each": lambda: merge_spans(
            allocation=Segments.none().allocation_of(columns["start"]), **columns
        ),
        "* regions, one allocation": lambda: merge_spans(
            allocation=one_pool.allocation_of(columns["start"]), **columns
        ),
        "weights_metadata files": lambda: write_files(directory, read, "0"),
        "read rows": lambda: list(table_rows(table)),
        "format json": lambda: path.write_bytes(formats.as_json([(read, rows)])),
        "format jsonl": lambda: path.write_bytes(formats.as_jsonl(rows)),
        "format csv": lambda: path.write_bytes(formats.as_csv(rows)),
        "format mooncake": lambda: path.write_bytes(formats.as_mooncake(read.regions())),
        "format nixl": lambda: path.write_bytes(formats.as_nixl(read.regions())),
        "format sglang-remote": lambda: path.write_bytes(formats.as_sglang_remote(rows)),
    }
    if importlib.util.find_spec("pyarrow"):
        steps["format parquet"] = lambda: path.write_bytes(formats.as_parquet(rows))
    return steps


def main() -> None:
    sizes = list(map(int, sys.argv[1:] or (1_000, 20_000, 100_000)))
    models: list[tuple[str, int, Callable[[], torch.nn.Module]]] = [
        *((f"{tensors:,} tensors", tensors, partial(model_of, tensors)) for tensors in sizes),
        ("2,000 modules of ten tensors", 20_000, model_of_tens),
    ]
    for what, tensors, make in models:
        with tempfile.TemporaryDirectory() as directory:
            steps = steps_for(make(), Path(directory))
            fastest = measure(steps, max(3, ROUNDS * 20_000 // max(tensors, 20_000)))
        baseline = next(iter(fastest.values()))
        print(f"\n{what}; the bare loop takes {baseline * 1e3:.1f} ms")
        for name, seconds in fastest.items():
            print(f"  {name:<36}{seconds / baseline:6.2f}")


if __name__ == "__main__":
    main()
