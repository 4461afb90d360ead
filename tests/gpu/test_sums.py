# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Sums of shares on a GPU are those of the same words on the CPU, and what they take there and in a
trainer's process. A process of its own: the tests that start engines count memory of the device."""

from __future__ import annotations

from gpu_engines import run_on_gpu

BEGIN = """
import time
import numpy as np, torch
from sglang_weight_exporter import sum_tensors
from sglang_weight_exporter.fingerprint.address_sums import AddressSums
from sglang_weight_exporter.fingerprint.tensor_sums import Run, of_runs
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter

def table(runs):
    return AddressSums(
        torch.device("cuda"),
        rows=np.array([run.words.shape[0] for run in runs]),
        columns=np.array([run.words.shape[1] for run in runs]),
        first_row=np.array([run.row for run in runs]),
        first_column=np.array([run.column for run in runs]),
    )

def addresses(runs):
    return np.array([run.words.data_ptr() for run in runs])

def seconds(act):
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        act()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[5]
"""

SAME = """
generator = torch.Generator().manual_seed(1)
memory = torch.randint(-9, 9, (1 << 20,), generator=generator)
shapes = [(1, 1), (3, 1), (1, 7), (5, 1023), (5, 1024), (3, 1025), (400, 500), (2, 9000), (0, 4)]
runs = [
    Run(memory[offset : offset + rows * columns].view(rows, columns), row, column)
    for rows, columns in shapes
    for offset, row, column in ((0, 0, 0), (3, 70000, 5), (4, 1, 1 << 33))
]
there = [run._replace(words=run.words.cuda()) for run in runs]
assert (table(there).take(addresses(there)) == of_runs(runs)).all()
assert (of_runs(there) == of_runs(runs)).all()
host = {"w": torch.randn((1024, 512), generator=generator).to(torch.bfloat16)}
assert sum_tensors({"w": host["w"].cuda()}) == sum_tensors(host)
"""

SPEED = """
layers = [torch.empty((4096 * 6, 4096), dtype=torch.bfloat16, device="cuda") for _ in range(80)]
for each in layers:
    each.normal_()
nbytes = sum(each.nbytes for each in layers)
runs = [
    Run(part.view(torch.int64), 4096 * at)
    for each in layers
    for at, part in enumerate(each.split(4096))
]
columns = [Run(each.view(torch.int64), 0, 1024) for each in layers]
take = Fingerprinter()
for name, some in (("rows", runs), ("columns", columns)):
    known, where = table(some), addresses(some)
    print(f"sums of {name}: {nbytes / seconds(lambda: known.take(where)) / 1e12:.2f} TB/s")
print(f"fingerprints: {nbytes / seconds(lambda: take(layers)) / 1e12:.2f} TB/s")
reading = seconds(lambda: [each.view(torch.int64).sum() for each in layers])
print(f"reading: {nbytes / reading / 1e12:.2f} TB/s")
sent = {str(number): each for number, each in enumerate(layers)}
print(f"sum_tensors of a trainer: {nbytes / seconds(lambda: sum_tensors(sent)) / 1e12:.3f} TB/s")
"""


def run(code: str) -> str:
    return run_on_gpu("-c", BEGIN + code)


def test_sums_on_a_gpu_are_those_of_the_cpu() -> None:
    run(SAME)


def test_what_sums_take() -> None:
    said = run(SPEED)
    print(said)
    assert said.count("TB/s") == 5
