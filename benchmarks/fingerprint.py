# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a fingerprint costs on a GPU: fingerprint.py [GIGABYTES]

The baseline, in the same run: the same kernel over the same table with the arithmetic left out, so
that it only reads every byte. Sets of tensors as models have them, at least 40 GB (or what is
asked for): about 1,000 (a dense model, bfloat16 and fp8) and about 20,000 (a mixture of experts).
Prints one JSON object a line. Needs an NVIDIA GPU and Triton.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Before Triton reads it: the first launch is measured with nothing compiled.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import numpy as np
import torch

from sglang_weight_exporter.fingerprint import kernel
from sglang_weight_exporter.fingerprint.address_table import AddressTable
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter

Shapes = list[tuple[tuple[int, ...], torch.dtype]]
BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
#: A layer of a dense model (Llama's shapes, the last linear layer in fp8 with its scales).
DENSE: Shapes = [
    ((6144, 4096), BF16),
    ((4096, 4096), BF16),
    ((28672, 4096), BF16),
    ((4096, 14336), FP8),
    ((32, 112), FP32),
    ((4096,), BF16),
    ((4096,), BF16),
    ((6144,), BF16),
    ((128,), BF16),
    ((128,), BF16),
]
#: An expert with its scales.
EXPERT: Shapes = [((1536, 1024), BF16), ((1024, 1536), BF16), ((64, 32), FP32)]
ROUNDS = 15


def report(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def tensors_of(layer: Shapes, nbytes: int) -> list[torch.Tensor]:
    """Layers of noise until there are ``nbytes``."""
    tensors: list[torch.Tensor] = []
    have = 0
    while have < nbytes:
        for shape, dtype in layer:
            size = int(np.prod(shape)) * dtype.itemsize
            memory = torch.empty(size, dtype=torch.uint8, device="cuda")
            memory.view(torch.int64).random_()
            tensors.append(memory.view(dtype).view(shape))
            have += size
    torch.cuda.synchronize()
    return tensors


def milliseconds(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Device time of each step, sorted; every round runs all of them in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 2):
        for name, step in steps.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            step()
            after.record()
            torch.cuda.synchronize()
            if number >= 2:
                taken[name].append(before.elapsed_time(after))
    return {name: sorted(values) for name, values in taken.items()}


def first_launch() -> None:
    tensors = [torch.zeros(1 << 20, device="cuda")]
    torch.cuda.synchronize()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        Fingerprinter()(tensors)
        seconds.append(time.perf_counter() - started)
    report("first fingerprint of a process", seconds=seconds[0], second_seconds=seconds[1])


def measure(name: str, layer: Shapes, nbytes: int) -> None:
    tensors = tensors_of(layer, nbytes)
    total = sum(tensor.nbytes for tensor in tensors)
    columns = {
        "data_ptr": np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64),
        "nbytes": np.array([tensor.nbytes for tensor in tensors], dtype=np.int64),
    }
    started = time.perf_counter()
    table = AddressTable(torch.device("cuda", 0), columns["data_ptr"], columns["nbytes"])
    torch.cuda.synchronize()
    report(
        "table",
        set=name,
        tensors=len(tensors),
        bytes=total,
        host_ms=1e3 * (time.perf_counter() - started),
        device_bytes=table.nbytes,
    )
    for warps in (4, 8):
        kernel.CHUNK_WARPS = warps
        taken = milliseconds(
            {"read": lambda: table.launch(only_read=True), "fingerprint": table.launch}
        )
        middle = {step: values[ROUNDS // 2] for step, values in taken.items()}
        report(
            "bandwidth",
            set=name,
            warps=warps,
            read_ms=middle["read"],
            fingerprint_ms=middle["fingerprint"],
            spread_ms={step: [values[0], values[-1]] for step, values in taken.items()},
            terabytes_a_second=total / middle["fingerprint"] / 1e9,
            of_reading=middle["read"] / middle["fingerprint"],
        )
    kernel.CHUNK_WARPS = 4
    whole = Fingerprinter()
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        whole(tensors)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            report("memory kept", set=name, bytes=torch.cuda.memory_allocated() - before)
    report(
        "a call, with the host's work",
        set=name,
        first_ms=1e3 * seconds[0],
        next_ms=1e3 * sorted(seconds[1:])[2],
    )
    results = [whole(tensors) for _ in range(2)]
    report(
        "same twice",
        set=name,
        same=bool((results[0] == results[1]).all()),
        distinct=len(np.unique(results[0], axis=0)),
    )


def main() -> None:
    nbytes = int(float(sys.argv[1] if len(sys.argv) > 1 else 40) * 1e9)
    report("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    first_launch()
    for name, layer in (("dense", DENSE), ("experts", EXPERT)):
        measure(name, layer, nbytes)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
