# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Sums over shares by their addresses: one launch, whatever their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint.address_table import wait_for_ours
from sglang_weight_exporter.fingerprint.definition import LANES, STEPS

_CHUNK = LANES * STEPS


class AddressSums:
    """What the kernel reads on one device: 44 bytes a share in, 20 a chunk of 64 KiB."""

    def __init__(
        self,
        device: torch.device,
        *,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        first_row: NDArray[np.int64],
        first_column: NDArray[np.int64],
    ) -> None:
        self.device = device
        words = rows * columns
        count = -(-words // _CHUNK)
        after = np.cumsum(count)
        self._chunks = int(count.sum())

        def on_device(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._words, self._width = on_device(words), on_device(columns)
        self._row, self._column = on_device(first_row), on_device(first_column)
        self._first = on_device((after - count).astype(np.int32))
        self._share = on_device(np.repeat(np.arange(len(words), dtype=np.int32), count))
        #: Where each share's chunks begin and end among all.
        self._ends = on_device(np.stack([after - count, after]))
        self._sums = torch.empty((2, self._chunks), dtype=torch.int64, device=device)

    def take(self, data_ptr: NDArray[np.int64]) -> NDArray[np.uint64]:
        """uint64 ``[shares, 2]`` of what lies there now."""
        from sglang_weight_exporter.fingerprint import sum_kernel

        if self._chunks:
            sum_kernel.sum_kernel[(self._chunks,)](
                torch.from_numpy(data_ptr).to(self.device),
                self._words,
                self._width,
                self._row,
                self._column,
                self._first,
                self._share,
                self._sums,
                self._chunks,
                num_warps=sum_kernel.WARPS,
            )
        before = torch.nn.functional.pad(self._sums.cumsum(1), (1, 0))
        taken = before[:, self._ends[1]] - before[:, self._ends[0]]
        if self.device.type == "cuda":
            wait_for_ours()
        found: NDArray[np.uint64] = taken.T.cpu().numpy().view(np.uint64)
        return found
