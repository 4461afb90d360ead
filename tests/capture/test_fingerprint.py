# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors' fingerprints are those of their bytes, whatever their dtype, strides and place.

Expected ones come from NumPy over ``contiguous()`` bytes. The kernels run in Triton's interpreter
here, and are compiled for GPUs that are not there; on a GPU they run in ``tests/gpu``.
"""

from __future__ import annotations

import pytest
from waiting import LIMIT

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import ctypes  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from sglang_weight_exporter import fingerprint  # noqa: E402
from sglang_weight_exporter.fingerprint.address_table import kernels  # noqa: E402
from sglang_weight_exporter.fingerprint.tensors import (  # noqa: E402
    Fingerprinter,
    FingerprintError,
    FingerprintTimeoutError,
    _Bytes,
    has_memory,
    in_memory_order,
)

CHUNK = 65536
DTYPES = sorted({one for one in vars(torch).values() if isinstance(one, torch.dtype)}, key=str)
QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


def memory_of(tensor: Any) -> bytes:
    """What lies at its address, read past torch."""
    assert tensor.is_contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def taken(*tensors: Any) -> list[str]:
    return fingerprint.texts(Fingerprinter()(tensors))


def noise(nbytes: int) -> Any:
    generator = torch.Generator().manual_seed(nbytes)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_counts_as_its_bytes(dtype: Any) -> None:
    if dtype in QUANTIZED:  # No view of bytes, but made from numbers.
        tensor = torch.quantize_per_tensor(torch.randn(50_000), 0.1, 3, dtype)
    else:
        tensor = noise(3 * CHUNK + 48).view(dtype)
    assert taken(tensor) == [fingerprint.of_bytes(memory_of(tensor))]


def test_patterns_that_are_not_numbers() -> None:
    first = torch.full((4096,), 0x7FC00001, dtype=torch.int32).view(torch.float32)
    second = torch.full((4096,), 0x7FC00002, dtype=torch.int32).view(torch.float32)
    zeros = [torch.zeros(8), -torch.zeros(8)]
    texts = taken(first, second, *zeros)
    assert texts == [fingerprint.of_bytes(memory_of(one)) for one in (first, second, *zeros)]
    assert len(set(texts)) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 150_000), st.integers(0, 31)), min_size=1, max_size=12))
def test_odd_sizes_at_odd_addresses(pieces: list[tuple[int, int]]) -> None:
    memory = noise(200_000)
    tensors = [memory[offset : offset + size] for size, offset in pieces]
    assert taken(*tensors) == [fingerprint.of_bytes(memory_of(tensor)) for tensor in tensors]


@st.composite
def views(draw: Any) -> Any:
    """Views of one memory: transposed, sliced with steps, expanded."""
    dtype = draw(
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.bool])
    )
    shape = draw(st.lists(st.integers(0, 33), min_size=1, max_size=4))
    count = 1
    for size in shape:
        count *= size
    tensor = torch.randint(0, 2**31, (count,)).to(dtype).view(shape)
    for dim in range(tensor.dim()):
        step = draw(st.integers(1, 3))
        start = draw(st.integers(0, max(0, tensor.shape[dim] - 1)))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor.permute(draw(st.permutations(range(tensor.dim()))))


@settings(max_examples=80, deadline=None)
@given(views())
def test_elements_count_in_their_logical_order(tensor: Any) -> None:
    assert taken(tensor) == [fingerprint.of_bytes(memory_of(tensor.contiguous()))]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.complex64, torch.complex128])
def test_a_tensor_with_gaps_over_many_chunks(dtype: Any) -> None:
    wide = noise(4 * 1024 * 1024).view(dtype).view(64, -1)
    for tensor in (wide[:, 1:], wide[:, ::3], wide.t()):
        assert taken(tensor) == [fingerprint.of_bytes(memory_of(tensor.contiguous()))]


def test_a_conjugate_counts_as_what_it_shows() -> None:
    tensor = torch.randn(100, dtype=torch.complex64).conj()
    assert taken(tensor) == [fingerprint.of_bytes(memory_of(tensor.resolve_conj().contiguous()))]


def test_a_transposed_weight_in_memory_order_is_what_was_loaded() -> None:
    loaded = torch.randn(48, 96)
    turned = in_memory_order(loaded.t())
    assert turned.data_ptr() == loaded.data_ptr()
    assert taken(turned) == taken(loaded) != taken(loaded.t())
    assert in_memory_order(loaded) is loaded
    with_gaps = loaded[:, ::2]
    assert taken(in_memory_order(with_gaps)) == taken(with_gaps)


def test_no_tensors_and_empty_ones() -> None:
    assert taken() == []
    empty = torch.empty(0, 5)
    assert taken(empty, torch.ones(3), empty) == [
        fingerprint.of_bytes(data) for data in (b"", memory_of(torch.ones(3)), b"")
    ]


def test_one_element_of_any_stride() -> None:
    tensor = torch.arange(4, dtype=torch.bfloat16)[1::2][:1]
    assert tensor.stride() == (2,)
    assert taken(tensor) == [fingerprint.of_bytes(memory_of(tensor))]


def test_a_parameter_and_a_scalar() -> None:
    parameter = torch.nn.Parameter(torch.randn(7))
    scalar = torch.tensor(3.5)
    assert taken(parameter, scalar) == [
        fingerprint.of_bytes(memory_of(one)) for one in (parameter, scalar)
    ]


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, device="meta"), torch.eye(3).to_sparse()],
    ids=["meta", "sparse"],
)
def test_what_has_no_bytes_is_refused(tensor: Any) -> None:
    with pytest.raises(FingerprintError, match="no bytes to read"):
        taken(torch.ones(3), tensor)


def test_a_limit_that_is_over_ends_it() -> None:
    now = iter(range(100))
    fingerprinter = Fingerprinter(clock=lambda: float(next(now)))
    with pytest.raises(FingerprintTimeoutError, match="took longer than it may"):
        fingerprinter([torch.ones(1 << 22)], limit_seconds=3.0)
    assert fingerprint.texts(fingerprinter([torch.ones(3)])) == taken(torch.ones(3))


def in_a_process(code: str, **variables: str) -> None:
    """Triton reads its environment when it is imported."""
    package = Path(sys.modules["sglang_weight_exporter"].__path__[0]).parent
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr


INTERPRETED = """
import numpy as np, torch
from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint.address_table import AddressTable

generator = torch.Generator().manual_seed(1)
memory = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)
sizes = [0, 1, 7, 8, 9, 4096, 8192, 8193, 65535, 65536, 65537, 200003, 3 * 65536 + 8]
tensors = [memory[offset : offset + size] for size in sizes for offset in (0, 3, 8, 16)]
table = AddressTable(
    torch.device("cpu"),
    np.array([tensor.data_ptr() for tensor in tensors]),
    np.array([tensor.nbytes for tensor in tensors]),
)
table.launch()
taken = table.fingerprints.numpy().view(np.uint64)
assert (taken == fingerprint.of_arrays([tensor.numpy() for tensor in tensors])).all()
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sglang_weight_exporter.fingerprint import kernel as kernels

pointers = dict(data_ptr="*i64", nbytes_ptr="*i64", first_ptr="*i32", tensor_ptr="*i32")
source = ASTSource(
    fn=kernels.chunk_kernel,
    signature=pointers | dict(sums_ptr="*i64", chunks="i32", HASH="constexpr"),
    constexprs={"HASH": True},
)
options = {"num_warps": kernels.CHUNK_WARPS}
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)):
    assert "v2.b64" in compile(source, target=target, options=options).asm["ptx"]
assert compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).asm["amdgcn"]
"""


#: Shares of a matrix of each width, in rows and columns, and where they begin in it.
SUMS_INTERPRETED = """
import numpy as np, torch
from sglang_weight_exporter.fingerprint.address_sums import AddressSums
from sglang_weight_exporter.fingerprint.tensor_sums import Run, of_runs

generator = torch.Generator().manual_seed(1)
memory = torch.randint(-9, 9, (1 << 17,), generator=generator)  # A word in eighteen is zero.
shapes = [(1, 1), (3, 1), (1, 7), (5, 1023), (5, 1024), (3, 1025), (40, 500), (2, 9000), (0, 4)]
runs = [
    Run(memory[offset : offset + rows * columns].view(rows, columns), row, column)
    for rows, columns in shapes
    for offset, row, column in ((0, 0, 0), (3, 70000, 5), (4, 1, 1 << 33))
]
table = AddressSums(
    torch.device("cpu"),
    rows=np.array([run.words.shape[0] for run in runs]),
    columns=np.array([run.words.shape[1] for run in runs]),
    first_row=np.array([run.row for run in runs]),
    first_column=np.array([run.column for run in runs]),
)
taken = table.take(np.array([run.words.data_ptr() for run in runs]))
assert (taken == of_runs(runs)).all()
"""

SUMS_COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sglang_weight_exporter.fingerprint import sum_kernel as kernels

names = ("data_ptr", "words_ptr", "width_ptr", "row_ptr", "column_ptr")
signature = dict.fromkeys(names, "*i64") | {"first_ptr": "*i32", "share_ptr": "*i32"}
source = ASTSource(
    fn=kernels.sum_kernel, signature=signature | {"sums_ptr": "*i64", "chunks": "i32"}
)
options = {"num_warps": kernels.WARPS}
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)):
    assert compile(source, target=target, options=options).asm["ptx"]
assert compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).asm["amdgcn"]
"""


@pytest.mark.parametrize("code", [INTERPRETED, SUMS_INTERPRETED], ids=["fingerprints", "sums"])
def test_the_kernels_give_the_same_in_tritons_interpreter(code: str) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with SGLang")
    in_a_process(code, TRITON_INTERPRET="1")


def test_the_kernel_of_sums_compiles_for_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with SGLang")
    in_a_process(SUMS_COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_the_kernels_compile_for_gpus_and_read_sixteen_bytes_a_thread(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with SGLang")
    in_a_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_a_triton_that_cannot_be_imported_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken one may take seconds to fail, and an update would wait for it each time."""
    tried = []

    class Finder:
        def find_spec(self, name: str, *more: Any) -> None:
            if name == "triton":
                tried.append(name)
                raise RuntimeError("0 active drivers")

    for name in ("triton", "sglang_weight_exporter.fingerprint.kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(fingerprint, "kernel", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    fingerprinter = Fingerprinter()
    kernels.cache_clear()
    try:
        for _ in range(3):
            assert not fingerprinter.has_kernels(torch.device("cuda"))
    finally:
        kernels.cache_clear()
    assert tried == ["triton"]


# --- on a GPU that is not there -------------------------------------------------------------------


def test_a_tensor_whose_memory_was_given_back_is_refused() -> None:
    """Read on a GPU it would end the process. SGLang's DWDP gives experts' back like this."""
    for tensor in (torch.ones(100_000), torch.ones(100_000)[500:]):
        tensor.untyped_storage().resize_(0)
        with pytest.raises(FingerprintError, match="no bytes to read"):
            taken(torch.ones(3), tensor)
        assert not has_memory(tensor)
    assert has_memory(torch.ones(3))
    assert has_memory(torch.empty(0))


def test_gaps_are_read_with_little_memory_beside() -> None:
    """Indices of eight bytes an element, for all of a block at once, would be gigabytes."""
    wide = noise(64 << 20).view(8192, -1)[:, 1:]
    own, peak = wide.untyped_storage().data_ptr(), 0

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            storage = result.untyped_storage()
            if storage.data_ptr() != own:
                peak = max(peak, storage.nbytes())
            return result

    piece = _Bytes(wide)
    with Seen():
        read = piece[0 : 32 << 20]
    assert read.equal(wide.contiguous().view(-1)[: 32 << 20])
    assert peak <= 32 << 20
