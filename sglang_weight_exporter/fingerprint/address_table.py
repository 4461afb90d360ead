# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernels read on a device, kept there from one time to the next."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint.definition import Chunks


@functools.cache
def kernels() -> Any:
    """The module of kernels, or None where Triton is not, or is broken: asked once, because a
    failed import is made anew each time."""
    try:
        from sglang_weight_exporter.fingerprint import kernel
    except Exception:
        return None
    return kernel


def end_of_ours() -> torch.cuda.Event:
    """Ends with what was just put into the current stream. Other threads run while one waits."""
    done = torch.cuda.Event(blocking=True)
    done.record()
    return done


def wait_for_ours() -> None:
    """For what was just put into the current stream; other threads run meanwhile."""
    end_of_ours().synchronize()


class AddressTable:
    """What the kernels read, on one device: 16 bytes a tensor in, 20 a chunk, 16 a tensor out."""

    def __init__(
        self, device: torch.device, data_ptr: NDArray[np.int64], nbytes: NDArray[np.int64]
    ) -> None:
        chunks = Chunks.of(nbytes.tolist())
        count = chunks.after - chunks.first
        self._host = data_ptr, nbytes
        self._chunks = int(count.sum())
        self._tensors = len(nbytes)
        tensor = np.repeat(np.arange(len(nbytes), dtype=np.int32), count)

        def on_device(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        self._data_ptr, self._nbytes = on_device(data_ptr), on_device(nbytes)
        self._first = on_device(chunks.first.astype(np.int32))
        self._after = on_device(chunks.after.astype(np.int32))
        self._tensor = on_device(tensor)
        self._sums = torch.empty((2, self._chunks), dtype=torch.int64, device=device)
        self.fingerprints = torch.empty((self._tensors, 2), dtype=torch.int64, device=device)
        #: Where they come to on the host, in memory that a device writes without anybody's help.
        self._on_host = torch.empty(
            (self._tensors, 2), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        #: The end of what was begun and not taken.
        self._reading: torch.cuda.Event | None = None

    def has_sizes(self, nbytes: NDArray[np.int64]) -> bool:
        return np.array_equal(self._host[1], nbytes)

    def point_to(self, data_ptr: NDArray[np.int64]) -> None:
        """Tensors of the same sizes, maybe elsewhere."""
        if not np.array_equal(self._host[0], data_ptr):
            self._host = data_ptr, self._host[1]
            self._data_ptr.copy_(torch.from_numpy(data_ptr))

    def reads(self, data_ptr: NDArray[np.int64], nbytes: NDArray[np.int64]) -> bool:
        """Whether these were begun and not taken."""
        same = self._reading is not None and self.has_sizes(nbytes)
        return same and np.array_equal(self._host[0], data_ptr)

    def begin(self) -> torch.cuda.Event:
        """Read, and bring what was read to the host; the event of its end."""
        self.launch()
        self._on_host.copy_(self.fingerprints, non_blocking=True)
        self._reading = end_of_ours()
        return self._reading

    def wait(self) -> None:
        """Until nothing is read. Other threads run meanwhile."""
        if self._reading is not None:
            self._reading.synchronize()
            self._reading = None

    def taken(self) -> NDArray[np.uint64]:
        """What was begun, as soon as it is there."""
        self.wait()
        halves: NDArray[np.uint64] = self._on_host.numpy().view(np.uint64).copy()
        return halves

    @property
    def nbytes(self) -> int:
        """Memory that it takes on its device."""
        return sum(
            tensor.nbytes
            for tensor in (
                self._data_ptr,
                self._nbytes,
                self._first,
                self._after,
                self._tensor,
                self._sums,
                self.fingerprints,
            )
        )

    def launch(self, *, only_read: bool = False) -> None:
        """Put the work into the current stream. ``only_read`` is what it is measured against."""
        module = kernels()
        if self._chunks:
            module.chunk_kernel[(self._chunks,)](
                self._data_ptr,
                self._nbytes,
                self._first,
                self._tensor,
                self._sums,
                self._chunks,
                HASH=not only_read,
                num_warps=module.CHUNK_WARPS,
            )
        if not only_read:
            module.tensor_kernel[(self._tensors, 2)](
                self._sums,
                self._nbytes,
                self._first,
                self._after,
                self.fingerprints,
                self._chunks,
                BLOCK=module.TENSOR_BLOCK,
                num_warps=module.TENSOR_WARPS,
            )
