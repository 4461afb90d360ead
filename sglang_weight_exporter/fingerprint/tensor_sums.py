# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors on any device → sums over their words, taken where they lie with torch's operations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint import sums
from sglang_weight_exporter.fingerprint.address_table import wait_for_ours
from sglang_weight_exporter.fingerprint.tensors import FingerprintTimeoutError, integers

#: Words that torch's operations take together: 1 MiB in a core's cache, 32 MiB on a device. Some
#: ten arrays of that size are there at a time.
_CPU_WORDS = 1 << 17
_DEVICE_WORDS = 1 << 22


class Run(NamedTuple):
    """Words that follow one another in memory, and where in their tensor they belong."""

    #: int64 ``[rows, columns]``.
    words: torch.Tensor
    row: int = 0
    column: int = 0


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a matrix of int64 words, in its own memory where it lies so."""
    flat = integers(tensor).contiguous()
    rows, nbytes = sums.matrix(flat.shape, flat.element_size())
    if not flat.numel():
        return torch.zeros((rows, 0), dtype=torch.int64, device=flat.device)
    content = flat.reshape(rows, -1).view(torch.uint8).reshape(rows, nbytes)
    missing = -nbytes % sums.WORD_BYTES
    if missing:
        content = torch.nn.functional.pad(content, (0, missing))
    elif content.data_ptr() % sums.WORD_BYTES or content.storage_offset() % sums.WORD_BYTES:
        content = content.clone()
    return content.view(torch.int64)


def of_runs(
    runs: Sequence[Run],
    *,
    limit_seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> NDArray[np.uint64]:
    """Their sums, uint64 ``[runs, 2]``. Raises FingerprintTimeoutError."""
    deadline = clock() + limit_seconds
    found = np.zeros((len(runs), 2), dtype=np.uint64)
    alike: dict[tuple[torch.device, torch.Size], list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        if run.words.numel():
            alike[run.words.device, run.words.shape].append(number)
    for (device, shape), numbers in alike.items():
        most = _CPU_WORDS if device.type == "cpu" else _DEVICE_WORDS
        together = max(1, most // shape.numel())
        for at in range(0, len(numbers), together):
            if clock() > deadline:
                raise FingerprintTimeoutError(
                    f"Sums of {len(runs)} parts of tensors on {device} took longer than they may."
                )
            some = numbers[at : at + together]
            found[some] = _together([runs[number] for number in some], most)
    return found


def _together(runs: Sequence[Run], most: int) -> NDArray[np.uint64]:
    """Sums of runs of one shape and device, ``[runs, 2]``. On a CPU with NumPy: torch's operations
    would have a thread a core each, and wait for all of them where others are busy there."""
    device, (rows, columns) = runs[0].words.device, runs[0].words.shape
    words = [run.words for run in runs]
    library: Any = np if device.type == "cpu" else torch
    on_device: dict[str, Any] = {} if device.type == "cpu" else {"device": device}
    held = [each.numpy() for each in words] if device.type == "cpu" else words
    first_row, first_column = (
        library.asarray([getattr(run, name) for run in runs], **on_device)[:, None, None]
        for name in ("row", "column")
    )
    column = first_column + library.arange(columns, **on_device)
    total = library.zeros((len(runs), 2), dtype=library.int64, **on_device)
    step = max(1, most // (len(runs) * columns))
    for at in range(0, rows, step):
        after = min(at + step, rows)
        row = first_row + library.arange(at, after, **on_device)[:, None]
        some = [each[at:after] for each in held]
        stacked = some[0][None] if len(some) == 1 else library.stack(some)
        for half, each in enumerate(sums.terms(stacked, sums.keys(row, column))):
            total[:, half] += each.sum((1, 2))
        if device.type == "cuda":
            wait_for_ours()
    taken = total if device.type == "cpu" else total.cpu().numpy()
    found: NDArray[np.uint64] = taken.view(np.uint64)
    return found


def grid(
    words: torch.Tensor, row: int, column: int, rows: Sequence[int], columns: Sequence[int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Sums of a matrix between each two of ``rows``, and between each two of ``columns``, which
    are numbers in the whole tensor: uint64 ``[cuts - 1, 2]`` each, in one pass."""
    device, (count, width) = words.device, words.shape
    by_row = torch.zeros((2, count + 1), dtype=torch.int64, device=device)
    by_column = torch.zeros((2, width + 1), dtype=torch.int64, device=device)
    for at, after, halves in _halves(words, row, column):
        for half, each in enumerate(halves):
            by_row[half, 1 + at : 1 + after] = each.sum(1)
            by_column[half, 1:] += each.sum(0)
    return _between(by_row, row, rows), _between(by_column, column, columns)


def _halves(
    words: torch.Tensor, row: int, column: int
) -> Iterator[tuple[int, int, tuple[torch.Tensor, torch.Tensor]]]:
    device, (count, width) = words.device, words.shape
    most = _CPU_WORDS if device.type == "cpu" else _DEVICE_WORDS
    columns = column + torch.arange(width, device=device)
    step = max(1, most // max(1, width))
    for at in range(0, count if width else 0, step):
        after = min(at + step, count)
        rows = row + torch.arange(at, after, device=device)[:, None]
        yield at, after, sums.terms(words[at:after], sums.keys(rows, columns))


def _between(found: torch.Tensor, first: int, cuts: Sequence[int]) -> NDArray[np.uint64]:
    before = found.cumsum(1)
    there = torch.tensor(cuts, device=found.device).sub(first).clamp(0, found.shape[1] - 1)
    parts = before[:, there]
    result: NDArray[np.uint64] = (parts[:, 1:] - parts[:, :-1]).T.cpu().numpy().view(np.uint64)
    return result


def texts(found: NDArray[np.uint64]) -> list[str]:
    """Each sum as it is written."""
    return [sums.text(int(first), int(second)) for first, second in found.tolist()]
