# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where an allocation ends: regions under each way that torch gets memory of a GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from gpu_engines import run_on_gpu

SCRIPT = """
import json, sys
from array import array
import torch
import torch.multiprocessing as multiprocessing
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.weights import capture_weights

def report(tensors):
    model = torch.nn.Module()
    for number, tensor in enumerate(tensors):
        model.register_buffer(f"t{number}", tensor)
    capture = capture_weights(
        model, role="target", captured_at=0.0, segments=Segments.of_cuda
    )
    table = capture.table
    print(json.dumps({
        "regions": list(zip(array("Q", table.region_ptr), array("Q", table.region_nbytes))),
        "tensors": [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors],
        "bytes": sum(usage.nbytes for usage in capture.usage),
        "segments": [
            (segment["address"], segment["total_size"], segment["is_expandable"])
            for segment in torch.cuda.memory_snapshot()
        ],
    }))

def receive(queue, done):
    tensor = queue.get()
    report([tensor])
    del tensor
    done.set()

if __name__ == "__main__":
    if sys.argv[1] == "ipc":
        context = multiprocessing.get_context("spawn")
        queue, done = context.Queue(), context.Event()
        child = context.Process(target=receive, args=(queue, done))
        child.start()
        tensor = torch.ones(1 << 20, device="cuda")
        queue.put(tensor)
        done.wait(60)
        child.join()
    else:
        # Four fill a segment of 2 MiB; the last has one of its own.
        sizes = [1 << 19] * 12 + [1 << 25]
        report([torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes])
"""


def run(tmp_path: Path, what: str, configuration: str = "") -> dict[str, Any]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    variables = {"PYTORCH_CUDA_ALLOC_CONF": configuration} if configuration else {}
    answer: dict[str, Any] = json.loads(run_on_gpu(script, what, **variables))
    return answer


def test_neighbours_merge_inside_a_segment_and_never_across_two(tmp_path: Path) -> None:
    seen = run(tmp_path, "own")
    assert not any(expandable for _, _, expandable in seen["segments"])
    runs: list[list[int]] = []
    starts = {start for start, _, _ in seen["segments"]}
    for address, size in sorted(seen["tensors"]):
        if runs and sum(runs[-1]) == address and address not in starts:
            runs[-1][1] += size
        else:
            runs.append([address, size])
    assert seen["regions"] == runs
    assert 1 < len(runs) < len(seen["tensors"])


def test_in_an_expandable_segment_each_tensor_is_its_own_region(tmp_path: Path) -> None:
    seen = run(tmp_path, "own", "expandable_segments:True")
    assert all(expandable for _, _, expandable in seen["segments"])
    tensors = sorted(seen["tensors"])
    neighbours = [sum(one) == two[0] for one, two in itertools.pairwise(tensors)]
    assert any(neighbours)  # Else nothing was shown.
    assert seen["regions"] == tensors


def test_memory_of_another_process_is_a_region_of_its_own(tmp_path: Path) -> None:
    seen = run(tmp_path, "ipc")
    ((address, size),) = seen["tensors"]
    assert not any(start <= address < start + total for start, total, _ in seen["segments"])
    assert seen["regions"] == [[address, size]]
    assert seen["bytes"] == size == 4 << 20
