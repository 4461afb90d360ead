# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update does to a GPU: it waits for nothing, allocates nothing, and ends when the device
has the bytes. A process of its own each, with stand-ins for SGLang's classes."""

from __future__ import annotations

import pytest
from gpu_engines import Record, run_on_gpu

BEGIN = """
import gc, sys, tempfile, time
from pathlib import Path
import torch
from standins import Rank, Request, session
from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.weight_table import table_fingerprints

class GpuRank(Rank):
    allocations = property(lambda self: Segments.of_cuda(), lambda self, value: None)

def made(tensors, gaps=False, **answers):
    model = torch.nn.ModuleList(
        torch.nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(tensors)
    ).cuda()
    model[0].weight.data = model[0].weight.data.t()
    model[1].w_kc = torch.ones(8, 8, device="cuda")[:, :: 1 + gaps]
    directory = Path(tempfile.mkdtemp())
    rank = GpuRank(directory / "runtime", fingerprinter=Fingerprinter() if FINGERPRINTS else None)
    runner = rank.runner(model=model, device="cuda", answers=answers)
    for _ in range(2):
        session(runner, loads=1)
    return rank, runner

def allocations():
    return torch.cuda.memory_stats()["allocation.all.allocated"]
"""

NOTHING = """
rank, runner = made(2000)
gc.collect()
runs = []
gc.callbacks.append(lambda phase, info: runs.append(info) if phase == "start" else None)
before = allocations()
torch.cuda.synchronize()
if not FINGERPRINTS:
    torch.cuda.set_sync_debug_mode("error")
for _ in range(5):
    session(runner, loads=1)
torch.cuda.set_sync_debug_mode("default")
assert runs == [], runs
assert allocations() == before, allocations() - before
assert rank.role().updates["tensor"].updates == 7
assert rank.snapshot().hook_errors == {}
"""

SAME = """
def write():
    if model is not None:
        with torch.no_grad():
            model[7].weight += 1
            model[1].w_kc += 1
            model[9].weight.data = model[9].weight.data.clone()
    return True, "Success"

model = None
rank, runner = made(200, gaps=True, tensor=write)
model = runner.model
def flat(name, tensor):
    # As it lies in memory: the transposed one was loaded so.
    tensor = tensor.t() if name == "0.weight" else tensor
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return fingerprint.of_bytes(data.numpy().tobytes())
seen = set()
for _ in range(3):
    named = dict(model.named_parameters()) | {"1.w_kc": model[1].w_kc}
    expected = {name: flat(name, tensor) for name, tensor in named.items()}
    assert rank.role().table.fingerprint == fingerprint.of_rank(expected)
    seen.add(rank.role().table.fingerprint)
    session(runner, loads=1)
assert len(seen) == 3
assert rank.role().fingerprints.modified == {"serving": {}}
"""

LATE = """
cycles = 4_000_000_000  # Two seconds and more.

def queued():
    if late:
        torch.cuda._sleep(cycles)  # As NCCL's kernel, whose peer is not there yet.
    return True, "Success"

late = False
rank, runner = made(2000, distributed=queued)
call = lambda: runner.weight_updater.update_weights_from_distributed(["w"], [], [], "group")
components = rank.scheduler(runner)
def ask():
    components._fan_out = lambda recv_req, one: (
        call(), type("Answer", (), {"success": True, "message": ""})()
    )[1]
    components.update_weights_from_tensor(Request())
ask()
torch.cuda.synchronize()
late = True
began = time.perf_counter()
ask()
answered = time.perf_counter() - began
updates = lambda: rank.role().updates["distributed"].updates
assert answered < 0.5, answered
while updates() < 2:
    assert time.perf_counter() - began < 60
    time.sleep(0.01)
there = time.perf_counter() - began
print(f"answered after {answered:.3f} s, there after {there:.3f} s")
assert there > 1.0
assert rank.snapshot().hook_errors == {}
"""

#: Buffers that are gone when an update ends: below torch's peak until then, and above it.
PEAK = """
from types import SimpleNamespace
from sglang_weight_exporter.hooks.targets import SCHEDULER

class Scheduler:
    def __init__(self, make):
        self.tree_cache = SimpleNamespace(evictable_size=int, protected_size=int)
        self.running_batch, self.waiting_queue = SimpleNamespace(reqs=[]), []
        make()
    def flush_cache(self, empty_cache=True):
        torch.cuda.empty_cache()
        return True

def take():
    buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
    needed.append(torch.cuda.memory_reserved() - before)
    del buffer
    flush()
    return True, "Success"

needed = []
rank, runner = made(200, disk=take)
scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
components = rank.scheduler(runner)
torch.empty(6 << 30, dtype=torch.uint8, device="cuda")
torch.cuda.empty_cache()
peak = torch.cuda.max_memory_reserved()
for size, flush in ((3 << 30, scheduler.flush_cache), (8 << 30, torch.cuda.empty_cache)):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert components.update_weights_from_disk(Request()).success
    (memory,) = rank.snapshot().memory
    print(f"needed {needed[-1]}, seen {memory.update_peak}")
    assert memory.update_peak == needed[-1] >= size
    assert torch.cuda.memory_reserved() == before
assert torch.cuda.max_memory_reserved() >= peak  # Which nobody has reset.
"""


def run(code: str, *, fingerprints: bool) -> str:
    program = f"FINGERPRINTS = {fingerprints}\n{BEGIN}{code}"
    return run_on_gpu("-c", program, SGLANG_WEIGHT_EXPORTER_DISABLED="1")


@pytest.mark.parametrize("fingerprints", [False, True])
def test_an_update_allocates_nothing_and_collects_no_garbage(fingerprints: bool) -> None:
    """And, without fingerprints, waits for no device."""
    run(NOTHING, fingerprints=fingerprints)


def test_fingerprints_by_address_are_those_of_the_tensors() -> None:
    run(SAME, fingerprints=True)


@pytest.mark.parametrize("fingerprints", [False, True])
def test_nobody_waits_for_a_late_sender(fingerprints: bool, record_property: Record) -> None:
    said = run(LATE, fingerprints=fingerprints)
    record_property("a late broadcast", said.strip())


def test_what_an_update_needs_for_a_moment_is_seen(record_property: Record) -> None:
    record_property("buffers", run(PEAK, fingerprints=False).strip())
