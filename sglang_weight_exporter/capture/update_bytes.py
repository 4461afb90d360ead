# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Incoming bytes of an update: of tensors that are handed over, or of files that are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sglang_weight_exporter.records.updates import LARGEST_BYTES


def of_call(argument: Callable[[str], Any]) -> int | None:
    """By the arguments of a call that writes weights, as SGLang names them: names and tensors, one
    flat tensor, or types and shapes of what is broadcast; whole tensors, of which a rank of several
    keeps its part. ``None`` where they do not tell, or are something else than SGLang takes, which
    is SGLang's to refuse: clients sent them, so any value may come."""
    try:
        nbytes = _of_arguments(argument)
    except Exception:
        return None
    return nbytes if type(nbytes) is int and 0 <= nbytes < LARGEST_BYTES else None


def _of_arguments(argument: Callable[[str], Any]) -> int | None:
    named = argument("named_tensors")
    if isinstance(named, dict):
        return _of_tensors([named.get("flattened_tensor")])
    if isinstance(named, list | tuple):
        return _of_tensors([tensor for _, tensor in named])
    dtypes, shapes = argument("dtypes"), argument("shapes")
    if dtypes is None or shapes is None:
        return None
    sizes: list[int] = [
        math.prod(shape) * _dtype(dtype).itemsize
        for dtype, shape in zip(dtypes, shapes, strict=False)
    ]
    return sum(sizes)


def _dtype(dtype: Any) -> torch.dtype:
    """SGLang takes either."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _of_tensors(tensors: list[Any]) -> int:
    # One that is still a pickled handle for each rank has no size that anybody knows, and raises. A
    # list, because a bucket has hundreds and may take microseconds.
    return sum([tensor.nbytes for tensor in tensors])


def of_files(paths: Iterable[str]) -> int:
    """Raises ``OSError``."""
    return sum(Path(path).stat().st_size for path in paths)
