# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints on a GPU are those of the same bytes on the CPU.

A process of its own: the tests that start engines count memory of the whole device.
"""

from __future__ import annotations

import pytest
from gpu_engines import run_on_gpu

BEGIN = """
import numpy as np, torch
from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint.tensors import (
    Fingerprinter, FingerprintError, FingerprintTimeoutError, kernels, in_memory_order,
)

take = Fingerprinter()
generator = torch.Generator().manual_seed(1)

def noise(nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

def of_cpu(*tensors):
    flat = [tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors]
    return fingerprint.of_arrays(flat)
"""

CASES = {
    "what has begun": """
memory = noise(1 << 22).cuda()
where = memory.device, np.array([memory.data_ptr()]), np.array([memory.nbytes])
first = take.of_addresses(*where)
torch.cuda._sleep(200_000_000)
end = take.begin(*where)
memory += 1
assert not end.query()
assert (take.of_addresses(*where, begun=True) == first).all()
assert (take.of_addresses(*where) == of_cpu(memory)).all() and (of_cpu(memory) != first).any()
try:
    take.of_addresses(*where, begun=True)
except FingerprintError:
    pass
else:
    raise AssertionError("what was taken is not there twice")
""",
    "sizes and offsets": """
assert kernels() is not None
memory = noise(1 << 22).cuda()
sizes = [0, 1, 7, 8, 9, 255, 4096, 8191, 8192, 8193, 65535, 65536, 65537, 200003, 3 * 65536 + 8]
tensors = [memory[at : at + size] for size in sizes for at in (0, 1, 3, 4, 8, 16, 4096 + 8)]
assert (take(tensors) == of_cpu(*tensors)).all()
shuffled = [tensors[row] for row in torch.randperm(len(tensors), generator=generator).tolist()]
assert (take(shuffled) == of_cpu(*shuffled)).all()  # Another table.
assert (take([]) == of_cpu()).all() and (take([memory[:0]]) == of_cpu(memory[:0])).all()
""",
    "every dtype": """
dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
dtypes = [one for one in dtypes if one not in (torch.qint8, torch.quint8, torch.qint32)]
host = noise(3 * 65536 + 48)
tensors = []
for dtype in dtypes:
    try:
        tensors.append(host.cuda().view(dtype))
    except RuntimeError:  # Packed dtypes that this torch has on the CPU only.
        continue
assert len(tensors) > 20
want = fingerprint.of_arrays([host.numpy()])
assert (take(tensors) == want).all()
""",
    "strides": """
wide = noise(1 << 22).view(torch.bfloat16).view(1024, -1).cuda()
tensors = [wide[:, 1:], wide[::3, ::2], wide.t(), wide[:4].expand(3, *wide[:4].shape), wide]
assert (take(tensors) == of_cpu(*tensors)).all()
assert (take([in_memory_order(wide.t())]) == of_cpu(wide)).all()
numbers = torch.randn(70_000, dtype=torch.complex64, generator=generator)
assert (take([numbers.cuda().conj()]) == take([numbers.conj()])).all()
""",
    "two devices": """
tensors = [noise(size).to(place) for size in (5, 70_000) for place in ("cuda", "cpu", "cuda")]
assert (take(tensors) == of_cpu(*tensors)).all()
""",
    "gaps beside a full device": """
wide = noise(1 << 28).cuda().view(1 << 14, -1)[:, 1:]
want = of_cpu(wide)
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
assert (take([wide]) == want).all()
beside = torch.cuda.max_memory_allocated() - before
assert beside < 512 << 20, beside
""",
    "memory that was given back": """
tensors = [torch.ones(100_000, device="cuda") for _ in range(2)]
tensors[1].untyped_storage().resize_(0)
try:
    take(tensors)
    raise SystemExit("read")
except FingerprintError as error:
    assert "no bytes to read" in str(error)
torch.cuda.synchronize()
assert (take(tensors[:1]) == of_cpu(tensors[0])).all()
""",
    "behind forward passes in another stream": """
tensor = torch.ones(1 << 20, device="cuda")
want = take([tensor])
forward_passes = torch.cuda.Stream()
with torch.cuda.stream(forward_passes):
    torch.cuda._sleep(int(1e9))
    ended = torch.cuda.Event()
    ended.record()
assert (take([tensor]) == want).all() and not ended.query()
assert (take([tensor], after=forward_passes) == want).all() and ended.query()
""",
    "a table an owner": """
from sglang_weight_exporter.fingerprint import tensors as module
models = {"target": [noise(1 << 16).cuda()], "draft": [noise(1 << 16).cuda() for _ in range(3)]}
made = []
original = module.AddressTable
module.AddressTable = lambda *columns: made.append(1) or original(*columns)
for _ in range(5):
    for owner, tensors in models.items():
        assert (take(tensors, owner=owner) == of_cpu(*tensors)).all()
assert len(made) == 2
""",
    "with and without Triton": """
from sglang_weight_exporter.fingerprint import tensors as module
tensors = [noise(size).cuda() for size in (5, 70_000, 9_000_000)]
with_triton = take(tensors)
module.kernels = lambda: None
assert (Fingerprinter()(tensors) == with_triton).all()
""",
    "more than two gigabytes": """
size = (5 << 30) + 12_345
tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
tensor[: size // 8 * 8].view(torch.int64).random_()
tensor[size // 8 * 8 :].random_()
first = take([tensor])
assert (first == of_cpu(tensor)).all()
tensor[-1] ^= 1
last = take([tensor])
assert (last != first).all()
tensor[(4 << 30) + 77] ^= 64
assert (take([tensor]) != last).all()
""",
    "every flipped bit": """
tensors = [noise(1 << 20).cuda() for _ in range(2)]
before = take(tensors)
for at in torch.randint(0, 1 << 20, (64,), generator=generator).tolist():
    tensors[0][at] ^= 1 << at % 8
    after = take(tensors)
    assert (after[0] != before[0]).all() and (after[1] == before[1]).all()
    before = after
""",
    "in the order of the stream": """
tensor = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
host = noise(1 << 28).pin_memory()
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    take([tensor])
    for _ in range(8):
        tensor.copy_(torch.zeros_like(tensor), non_blocking=True)
    tensor.copy_(host, non_blocking=True)
    taken = take([tensor])
assert (taken == of_cpu(host)).all()
""",
    "never in a graph's capture": """
tensor = torch.ones(1000, device="cuda")
want = take([tensor])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    tensor.add_(1)
    try:
        take([tensor])
    except FingerprintError as error:
        refused = str(error)
assert "CUDA graph" in refused
graph.replay()
assert (take([tensor]) == of_cpu(torch.full((1000,), 2.0))).all()
""",
    "a limit": """
tensor = torch.ones(1 << 20, device="cuda")
want = take([tensor])
torch.cuda._sleep(int(2e9))  # Cycles of the device: about a second of other work before it.
try:
    take([tensor], limit_seconds=0.05)
    raise SystemExit("no limit")
except FingerprintTimeoutError:
    pass
del tensor  # Nothing reads it any more: its memory may go.
torch.cuda.synchronize()
torch.cuda.empty_cache()
assert (take([torch.ones(1 << 20, device="cuda")]) == want).all()
""",
    "memory": """
tensors = [noise(1 << 20).cuda() for _ in range(64)]
take(tensors)
kept = torch.cuda.memory_allocated()
for _ in range(20):
    take(tensors)
    take(tensors[:50])
    take(tensors)
assert torch.cuda.memory_allocated() == kept
""",
}


@pytest.mark.parametrize("case", CASES)
def test_a_gpus_fingerprints_are_the_cpus(case: str) -> None:
    run_on_gpu("-c", BEGIN + CASES[case])
