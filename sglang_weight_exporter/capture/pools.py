# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors that an object owns, whatever its class: how pools of every kind are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


def owned_tensors(
    root: object, follow: Callable[[object], bool]
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Tensors reachable from ``root`` through attributes, containers and dataclasses.

    Yields each with the attribute names that lead to it. Other objects are entered only where
    ``follow`` says so: a pool may refer to its scheduler, and that to everything.
    """
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield path, value
            continue
        if value is None or isinstance(value, (str, bytes, int, float, type)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack.extend((path, item) for item in value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            names = getattr(value, "_fields", None)  # A named tuple's.
            if names is None:
                stack.extend((path, item) for item in value)
            else:
                stack.extend(((*path, name), item) for name, item in zip(names, value, strict=True))
        elif value is root or dataclasses.is_dataclass(value) or follow(value):
            stack.extend(((*path, name), item) for name, item in _attributes(value))


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in {"__dict__", "__weakref__"} and hasattr(value, name):
                yield name, getattr(value, name)


def storage_bytes(
    tensors: Iterator[tuple[str, torch.Tensor]], *, counted: set[int]
) -> dict[tuple[str, str], int]:
    """Bytes of unique storages by ``(device, label)``; a storage counts for its first label.

    ``counted`` holds the addresses that were counted already, and is added to.
    """
    totals: dict[tuple[str, str], int] = {}
    for label, tensor in tensors:
        if tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        key = (str(tensor.device), label)
        totals.setdefault(key, 0)
        address = storage.data_ptr()
        if address and address not in counted:
            counted.add(address)
            totals[key] += storage.nbytes()
    return totals
