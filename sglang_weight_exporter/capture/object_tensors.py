# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors that an object owns, whatever its class: how pools of every kind are measured."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch


def owned_tensors(
    root: object,
    follow: Callable[[object], bool],
    backed: dict[int, int] | None = None,
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Tensors reachable from ``root`` through attributes, containers and dataclasses.

    Yields each with the attribute names that lead to it (``NAME[KEY]`` inside a dictionary).
    Other objects are entered only where ``follow`` says so: a pool may refer to its scheduler,
    and that to everything.

    ``backed``, if given, receives the physical bytes of storages that reserve addresses for more
    than they have (by address; complete when the iteration has ended).
    """
    seen: set[int] = set()
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), root)])
    while queue:
        path, value = queue.popleft()  # The shortest way to an object names it.
        if isinstance(value, torch.Tensor):
            yield path, value
            continue
        if value is None or isinstance(value, (str, bytes, int, float, type)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            name = path[-1] if path else ""
            queue.extend(((*path[:-1], f"{name}[{key}]"), item) for key, item in value.items())
        elif _is_of_numbers(value):
            continue
        elif isinstance(value, (list, tuple, set, frozenset)):
            names = getattr(value, "_fields", None)  # A named tuple's.
            if names is None:
                queue.extend((path, item) for item in value)
            else:
                queue.extend(((*path, name), item) for name, item in zip(names, value, strict=True))
        elif value is root or dataclasses.is_dataclass(value) or follow(value):
            if backed is not None:
                backed.update(_backed_storages(value))
            queue.extend(((*path, name), item) for name, item in _attributes(value))


def _is_of_numbers(value: object) -> bool:
    """A list of free slots has an entry a slot, and there may be a million."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and isinstance(value[0], int | float)
        and isinstance(value[-1], int | float)
    )


def _backed_storages(owner: object) -> Iterator[tuple[int, int]]:
    """Addresses and physical bytes of an owner of virtual memory (``KvVmmBufferOwner``): it knows
    the sum only, which stands for its first tensor."""
    physical = getattr(owner, "backed_bytes", None)
    tensors = getattr(owner, "tensors", None)
    if isinstance(physical, int) and isinstance(tensors, list):
        for tensor in tensors:
            yield tensor.untyped_storage().data_ptr(), physical
            physical = 0


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in {"__dict__", "__weakref__"} and hasattr(value, name):
                yield name, getattr(value, name)


class Storage(NamedTuple):
    """A piece of memory that tensors of a pool lie in."""

    address: int
    device: str
    #: The label of the first tensor in it.
    label: str
    nbytes: int


def unique_storages(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    counted: Container[int] = (),
    backed: Mapping[int, int] = MappingProxyType({}),
) -> list[Storage]:
    """Storages of labelled tensors, each once, for its first label.

    ``counted``: addresses that are counted elsewhere and left out. ``backed``: bytes of storages
    that do not have what they reserve, by address.
    """
    found: dict[int, Storage] = {}
    for label, tensor in tensors:
        if tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in found and address not in counted:
            nbytes = backed.get(address, storage.nbytes())
            found[address] = Storage(address, str(tensor.device), label, nbytes)
    return list(found.values())
