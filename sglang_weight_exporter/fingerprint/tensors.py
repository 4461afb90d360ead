# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors on any device → their fingerprints, taken where they lie.

With Triton the tensors of a GPU take two launches, whatever their number, over a table of their
addresses that is kept from one time to the next. Elsewhere torch's own operations do the same
arithmetic in blocks. Only the 16 bytes of each tensor come to the host.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint import definition
from sglang_weight_exporter.fingerprint.address_table import AddressTable, kernels, wait_for_ours
from sglang_weight_exporter.fingerprint.definition import CHUNK_BYTES, LANES, STEPS, Chunks

#: Chunks that torch's operations take together: 2 MiB in a core's cache, 64 MiB on a device.
_CPU_BLOCK = 32
_DEVICE_BLOCK = 1024
#: Elements of a tensor with gaps that are gathered at a time, with indices of eight bytes.
_GATHERED = 1 << 20
#: How often the host asks whether the device is ready. A sleep lets other threads run.
_POLL_SECONDS = 5e-5


class FingerprintError(Exception):
    """No fingerprint was taken; the message says why."""


class FingerprintTimeoutError(FingerprintError):
    """It would have taken longer than it may."""


class Fingerprinter:
    """Takes fingerprints of tensors, and keeps tables of their addresses on each device.

    To be called from one thread at a time, in the stream that the tensors were written in, when
    no memory among them is released: reading an unmapped page ends the process. Nothing is left
    on a device that still reads when a call has ended, however it ended, but for :meth:`begin`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tables: dict[tuple[torch.device, str], AddressTable] = {}

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        limit_seconds: float = float("inf"),
        owner: str = "",
        after: torch.cuda.Stream | None = None,
    ) -> NDArray[np.uint64]:
        """Fingerprints as uint64 ``[tensors, 2]``, over the bytes of ``tensor.contiguous()``.

        ``owner``: whose tensors they are; each owner's table is kept until its next call.
        ``after``: another stream, whose work has to end before anything is read. Raises
        FingerprintTimeoutError after ``limit_seconds``, and FingerprintError where a CUDA graph is
        being captured or a tensor has no bytes that could be read (on ``meta``, sparse, emptied,
        or made of other tensors).
        """
        deadline = self._clock() + limit_seconds
        result = np.empty((len(tensors), 2), dtype=np.uint64)
        by_table: dict[torch.device, list[int]] = defaultdict(list)
        by_torch: dict[torch.device, list[int]] = defaultdict(list)
        devices = list(map(attrgetter("device"), tensors))
        lying = _lie_as_they_read(tensors)
        gpus = {device for device in set(devices) if device.type == "cuda"}
        with_kernels = gpus if gpus and kernels() else frozenset()
        for row, (device, lies) in enumerate(zip(devices, lying, strict=True)):
            (by_table if lies and device in with_kernels else by_torch)[device].append(row)
        for device in gpus:
            with torch.cuda.device(device):
                self._wait_for_the_device(device, after, deadline)
        for device, rows in by_table.items():
            with torch.cuda.device(device):
                result[rows] = self._with_table(
                    device,
                    owner,
                    np.array([tensors[row].data_ptr() for row in rows], dtype=np.int64),
                    np.array([tensors[row].nbytes for row in rows], dtype=np.int64),
                )
        for device, rows in by_torch.items():
            with torch.cuda.device(device) if device in gpus else contextlib.nullcontext():
                result[rows] = self._with_torch(device, [tensors[row] for row in rows], deadline)
        return result

    def has_kernels(self, device: torch.device) -> bool:
        """Whether tensors of a device can be read by their addresses alone."""
        return device.type == "cuda" and kernels() is not None

    def of_addresses(
        self,
        device: torch.device,
        data_ptr: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        *,
        limit_seconds: float = float("inf"),
        owner: str = "",
        after: torch.cuda.Stream | None = None,
        begun: bool = False,
    ) -> NDArray[np.uint64]:
        """The same of runs of bytes on a device that has kernels: no tensor is touched.

        ``begun``: what was read since :meth:`begin`, and nothing else; raises FingerprintError
        where other addresses were read.
        """
        deadline = self._clock() + limit_seconds
        with torch.cuda.device(device):
            if begun:
                table = self._tables.get((device, owner))
                if table is None or not table.reads(data_ptr, nbytes):
                    raise FingerprintError(f"{device} has not begun to read these addresses.")
                return table.taken()
            self._wait_for_the_device(device, after, deadline)
            return self._with_table(device, owner, data_ptr, nbytes)

    def begin(
        self,
        device: torch.device,
        data_ptr: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        *,
        owner: str = "",
        after: torch.cuda.Stream | None = None,
    ) -> torch.cuda.Event:
        """Have a device that has kernels read these once it has done what it was asked before, and
        return; :meth:`of_addresses` gives what was read. No memory among them may be released or
        written before the event, but by what the same stream is asked for later."""
        with torch.cuda.device(device):
            _enter_stream(device, after)
            return self._table(device, owner, data_ptr, nbytes).begin()

    def _wait_for_the_device(
        self, device: torch.device, after: torch.cuda.Stream | None, deadline: float
    ) -> None:
        """Until what was asked of it before has ended: then reading takes as long as it takes, and
        nothing of ours waits there for a time when the memory is gone."""
        _enter_stream(device, after)
        before = torch.cuda.Event()
        before.record()
        while not before.query():
            if self._clock() > deadline:
                raise FingerprintTimeoutError(
                    f"{device} was busy with other work for longer than the fingerprint of its "
                    "tensors may take."
                )
            time.sleep(_POLL_SECONDS)

    def _with_table(
        self,
        device: torch.device,
        owner: str,
        data_ptr: NDArray[np.int64],
        nbytes: NDArray[np.int64],
    ) -> NDArray[np.uint64]:
        table = self._table(device, owner, data_ptr, nbytes)
        table.begin()
        return table.taken()

    def _table(
        self,
        device: torch.device,
        owner: str,
        data_ptr: NDArray[np.int64],
        nbytes: NDArray[np.int64],
    ) -> AddressTable:
        """An owner's, of these addresses, which nothing reads."""
        table = self._tables.get((device, owner))
        if table is not None:
            table.wait()
        if table is None or not table.has_sizes(nbytes):
            # Let go of the old one first: both together would be twice the memory.
            self._tables.pop((device, owner), None)
            del table
            table = self._tables[device, owner] = AddressTable(device, data_ptr, nbytes)
        else:
            table.point_to(data_ptr)
        return table

    def _with_torch(
        self, device: torch.device, tensors: list[torch.Tensor], deadline: float
    ) -> NDArray[np.uint64]:
        chunks = Chunks.of([tensor.nbytes for tensor in tensors])
        size = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
        size = max(1, min(size, len(chunks.number) - 1))
        space = torch.empty(size * CHUNK_BYTES, dtype=torch.uint8, device=device)
        sums = torch.zeros((2, len(chunks.number)), dtype=torch.int64, device=device)
        starts = [
            torch.tensor(definition.lane_starts(half), dtype=torch.int64, device=device)
            for half in range(2)
        ]
        bytes_of = [_Bytes(tensor) for tensor in tensors]
        for block in definition.blocks(chunks.nbytes.tolist(), size):
            if self._clock() > deadline:
                raise FingerprintTimeoutError(
                    f"The fingerprint of {len(tensors)} tensors on {device} took longer than it "
                    "may. Triton, which is much faster, is not used for them."
                )
            rows, where = definition.fill(block, chunks, space, bytes_of.__getitem__)
            words = space.view(torch.int64)[: len(rows) * STEPS * LANES].view(-1, STEPS, LANES)
            place = torch.tensor(where, device=device)
            for half in range(2):
                sums[half, place] = definition.chunk_sums(words, rows, starts[half], half)
            if device.type == "cuda":
                wait_for_ours()

        def on_device(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device, copy=True)

        halves = torch.stack(
            [
                definition.tensor_halves(
                    sums[half],
                    on_device(chunks.number),
                    on_device(chunks.first),
                    on_device(chunks.after),
                    on_device(chunks.nbytes),
                    half,
                )
                for half in range(2)
            ],
            dim=1,
        )
        result: NDArray[np.uint64] = halves.cpu().numpy().view(np.uint64)
        return result


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with its dimensions in the order in which they lie there.

    Contiguous where the tensor was without gaps, so that its bytes are read where they are. For a
    weight that was transposed after it was loaded these are the checkpoint's bytes.
    """
    if tensor.is_contiguous():
        return tensor
    stride = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -stride[dim]))


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether its bytes are anywhere: not on ``meta``, nor where its storage was emptied."""
    if tensor.device.type == "meta":
        return False
    return tensor.untyped_storage().nbytes() > 0 or not tensor.numel()


def _lie_as_they_read(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Of each, whether the bytes at its address are its elements in their order, all of them.

    Raises FingerprintError for what has no bytes. A pass over all tensors for each question: the
    engine waits, and there may be twenty thousand.
    """
    for kind in set(map(type, tensors)):
        if hasattr(kind, "__tensor_flatten__"):
            raise FingerprintError(
                f"A {kind.__name__} is made of other tensors. Take theirs, or make it whole first "
                "(full_tensor() of a DTensor)."
            )
    kinds = set(
        zip(map(attrgetter("layout"), tensors), map(attrgetter("device"), tensors), strict=True)
    )
    if any(layout is not torch.strided or device.type == "meta" for layout, device in kinds):
        _refuse(tensors)
    nbytes = list(map(attrgetter("nbytes"), tensors))
    stored = [tensor.untyped_storage().nbytes() for tensor in tensors]
    if any(size and not there for size, there in zip(nbytes, stored, strict=True)):
        _refuse(tensors)
    return [
        contiguous and size <= there and not (conjugate or negative)
        for contiguous, size, there, conjugate, negative in zip(
            map(torch.Tensor.is_contiguous, tensors),
            nbytes,
            stored,
            map(torch.Tensor.is_conj, tensors),
            map(torch.Tensor.is_neg, tensors),
            strict=True,
        )
    ]


def _refuse(tensors: Sequence[torch.Tensor]) -> NoReturn:
    tensor = next(one for one in tensors if one.layout is not torch.strided or not has_memory(one))
    raise FingerprintError(
        f"A tensor of layout {tensor.layout} on {tensor.device} has no bytes to read."
    )


def _enter_stream(device: torch.device, after: torch.cuda.Stream | None) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise FingerprintError(
            "A CUDA graph is being captured: the kernel would become part of it."
        )
    if after is not None and after.device == device:
        torch.cuda.current_stream().wait_stream(after)


@dataclass(frozen=True)
class _Bytes:
    """A tensor's bytes in the order of its elements, read piece by piece.

    A tensor with gaps is never copied whole: a copy of it may not fit beside the KV pool.
    """

    tensor: torch.Tensor

    def __getitem__(self, piece: slice) -> torch.Tensor:
        tensor = integers(self.tensor)
        if tensor.is_contiguous():
            # A single element may have any stride and is contiguous all the same.
            return _as_bytes(tensor.as_strided((tensor.numel(),), (1,)))[piece]
        item = tensor.element_size()  # Divides what a chunk has.
        first, after = piece.start // item, -(-piece.stop // item)
        parts = [
            _as_bytes(_gathered(tensor, at, min(at + _GATHERED, after)))
            for at in range(first, after, _GATHERED)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _gathered(tensor: torch.Tensor, first: int, after: int) -> torch.Tensor:
    """Elements by their number in the order of the tensor, one-dimensional."""
    element = torch.arange(first, after, device=tensor.device)
    offset = torch.zeros_like(element)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offset += element % size * stride
        element //= size
    span = 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.as_strided((span,), (1,))[offset]


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """With integers for elements, in the same memory: not every dtype can be indexed."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)
