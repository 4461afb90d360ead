# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors a model holds its weights in, and whether they are still what they were.

Beside parameters and buffers, SGLang keeps weights as plain attributes of modules (DeepSeek's
``w_kc`` and ``w_vc``, scales, repacked copies) and binds some of them anew at every reload. Where
they hang is found out by one thorough walk (:func:`derived_slots`) and then looked up again.

Looks happen inside the engine, between the last byte of an update and the first token after it.
No object is kept for a tensor and no tensor is kept alive: what remains between two looks are
numbers and names, so that Python's garbage collector never has a reason to run because of us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, eq, is_not
from typing import Any

import torch

#: What a slot is looked up by: the module's number in the order of the walk, its name with a dot
#: behind, and attribute, then index or key in the containers there.
Slot = tuple[int, str, tuple[Any, ...]]

#: What torch itself keeps in a module's dictionary.
_OF_TORCH = frozenset(vars(torch.nn.Module()))

#: Containers in attributes are entered this deep.
_DEPTH = 3

_present: Callable[[object], bool] = partial(is_not, None)


@dataclass(frozen=True)
class NamedTensors:
    """Every parameter, then every buffer, then every derived weight, with the counts of each."""

    names: list[str]
    tensors: list[torch.Tensor]
    parameters: int
    buffers: int
    #: Names of module attributes, ``None`` ones included, in the order of the walk: what a look
    #: that builds no names compares.
    keys: list[str]
    #: Modules walked, a shared one as often as it appears.
    modules: int
    #: Whether each tensor is itself what its module holds, and no part of a wrapper subclass.
    plain: bool


def named_tensors(model: torch.nn.Module, slots: Iterable[Slot] = ()) -> NamedTensors:
    """Names and tensors of a model, and of its derived weights in ``slots``.

    Unlike ``named_parameters()`` a tied tensor appears under all its names. Wrapper subclasses
    (DTensor, torchao's quantized tensors) own no memory themselves and are replaced by the
    tensors inside them, named ``NAME.INNER``.
    """
    prefixes, modules = _walk(model)
    own: list[tuple[list[str], list[torch.Tensor]]] = [([], []), ([], [])]
    keys: list[list[str]] = [[], []]
    for prefix, module in zip(prefixes, modules, strict=True):
        for number, held in enumerate((module._parameters, module._buffers)):
            if held:
                keys[number].extend(held)
                names, tensors = own[number]
                for name, tensor in held.items():
                    if tensor is not None:
                        names.append(prefix + name)
                        tensors.append(tensor)
    known = set(map(id, chain(own[0][1], own[1][1]))) if slots else set()
    derived: tuple[list[str], list[torch.Tensor]] = ([], [])
    for number, prefix, path in slots:
        tensor = _at(modules[number], path) if number < len(modules) else None
        if tensor is not None and id(tensor) not in known:
            derived[0].append((prefix + ".".join(map(str, path))).replace("\n", "\\n"))
            derived[1].append(tensor)
    found = [*own, derived]
    plain = not any(map(_wraps, set(map(type, chain(*(tensors for _, tensors in found))))))
    if not plain:
        found = [_unwrapped(names, tensors) for names, tensors in found]
    return NamedTensors(
        names=found[0][0] + found[1][0] + found[2][0],
        tensors=found[0][1] + found[1][1] + found[2][1],
        parameters=len(found[0][0]),
        buffers=len(found[1][0]),
        keys=keys[0] + keys[1],
        modules=len(modules),
        plain=plain,
    )


def _walk(model: torch.nn.Module) -> tuple[list[str], list[torch.nn.Module]]:
    """Every module under each of its names, with a dot behind; a module inside itself once."""
    prefixes: list[str] = []
    modules: list[torch.nn.Module] = []
    ancestors: set[int] = set()

    def visit(prefix: str, module: torch.nn.Module) -> None:
        prefixes.append(prefix)
        modules.append(module)
        if module._modules:
            ancestors.add(id(module))
            for name, child in module._modules.items():
                if child is not None and id(child) not in ancestors:
                    visit(f"{prefix}{name}.", child)
            ancestors.discard(id(module))

    visit("", model)
    return prefixes, modules


def _wraps(kind: type) -> bool:
    return hasattr(kind, "__tensor_flatten__")


def _unwrapped(
    names: list[str], tensors: list[torch.Tensor]
) -> tuple[list[str], list[torch.Tensor]]:
    """The same with what is inside of wrappers in their place."""
    inner = [
        pair
        for name, tensor in zip(names, tensors, strict=True)
        for pair in _flattened(name, tensor)
    ]
    return [name for name, _ in inner], [tensor for _, tensor in inner]


def _flattened(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not _wraps(type(tensor)):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, attribute)
        if isinstance(inner, torch.Tensor):  # DTensor names its device mesh among them.
            yield from _flattened(f"{name}.{attribute}", inner)


def derived_slots(model: torch.nn.Module) -> tuple[Slot, ...]:
    """Where tensors hang that are plain attributes of modules, or in lists, tuples and
    dictionaries there. Other objects are not entered (SGLang's caches, pools and managers), and
    no property is run. A parameter or buffer under a further name is none of them."""
    prefixes, modules = _walk(model)
    held = {
        id(tensor)
        for module in modules
        for tensor in chain(module._parameters.values(), module._buffers.values())
    }
    slots: list[Slot] = []
    for number, (prefix, module) in enumerate(zip(prefixes, modules, strict=True)):
        for attribute, value in vars(module).items():
            if attribute in _OF_TORCH:
                continue
            slots.extend(
                (number, prefix, path)
                for path, tensor in _tensors_in((attribute,), value)
                if id(tensor) not in held
            )
    return tuple(slots)


def _tensors_in(path: tuple[Any, ...], value: object) -> Iterator[tuple[tuple[Any, ...], object]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif len(path) <= _DEPTH and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in((*path, index), item)
    elif len(path) <= _DEPTH and isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, (str, int)):
                yield from _tensors_in((*path, key), item)


def _at(module: torch.nn.Module, path: tuple[Any, ...]) -> torch.Tensor | None:
    """What a slot holds now; ``None`` where that is no tensor any more."""
    try:
        value = vars(module)[path[0]]
        for step in path[1:]:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Remembered:
    """Enough of one look to tell whether another would find the same, a fraction of its price."""

    slots: tuple[Slot, ...]
    modules: int
    keys: list[str]
    #: ``id()`` of each tensor. A new object may have an old number, so all else is compared too.
    ids: list[int]
    data_ptr: list[int]
    shape: list[torch.Size]
    dtype: list[torch.dtype]
    contiguous: list[bool]
    #: Row → stride, of those that are not contiguous.
    stride: Mapping[int, tuple[int, ...]]
    storage_ptr: list[int]
    storage_nbytes: list[int]

    @classmethod
    def of(
        cls,
        found: NamedTensors,
        slots: tuple[Slot, ...],
        *,
        data_ptr: list[int],
        shape: list[torch.Size],
        dtype: list[torch.dtype],
        storage_ptr: list[int],
        storage_nbytes: list[int],
    ) -> Remembered:
        """The columns: of each of the tensors that were found. Equal shapes are one object, as
        twenty thousand would be the collector's work."""
        contiguous = list(map(torch.Tensor.is_contiguous, found.tensors))
        return cls(
            slots=slots,
            modules=found.modules,
            keys=found.keys,
            ids=list(map(id, found.tensors)),
            data_ptr=data_ptr,
            shape=shape,
            dtype=dtype,
            contiguous=contiguous,
            stride={
                row: found.tensors[row].stride() for row, run in enumerate(contiguous) if not run
            },
            storage_ptr=storage_ptr,
            storage_nbytes=storage_nbytes,
        )

    def is_current(self, model: torch.nn.Module) -> bool:
        """Whether every tensor of the model is where it was, as it was."""
        modules, keys, held = self._held(model)
        if len(modules) != self.modules or keys != self.keys:
            return False
        tensors: list[torch.Tensor] = list(filter(_present, held))
        if self.slots:
            tensors += self._derived(modules, tensors)
        ids = list(map(id, tensors))
        return (
            len(tensors) == len(self.ids)
            and list(map(torch.Tensor.data_ptr, tensors)) == self.data_ptr
            and all(map(eq, map(attrgetter("shape"), tensors), self.shape))
            and list(map(attrgetter("dtype"), tensors)) == self.dtype
            and list(map(torch.Tensor.is_contiguous, tensors)) == self.contiguous
            and all(tensors[row].stride() == stride for row, stride in self.stride.items())
            and (ids == self.ids or self._same_storages(tensors, ids))
        )

    def _held(self, model: torch.nn.Module) -> tuple[list[torch.nn.Module], list[str], list[Any]]:
        """The modules in the order of the walk, what each names, and what is under the names.
        One pass: modules and their dictionaries are not in the processor's caches. It ends once
        there are more modules than there were, as one that contains itself has no end."""
        found: list[torch.nn.Module] = []
        keys: list[str] = []
        tensors: list[Any] = []
        names_of_buffers: list[str] = []
        buffers: list[Any] = []
        stack: list[torch.nn.Module | None] = [model]
        while stack and len(found) <= self.modules:
            module = stack.pop()
            if module is None:
                continue
            found.append(module)
            if held := module._parameters:
                keys.extend(held)
                tensors.extend(held.values())
            if held := module._buffers:
                names_of_buffers.extend(held)
                buffers.extend(held.values())
            if children := module._modules:
                stack.extend(reversed(children.values()))
        return found, keys + names_of_buffers, tensors + buffers

    def _derived(
        self, modules: list[torch.nn.Module], tensors: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        held = set(map(id, tensors))
        found = (_at(modules[number], path) for number, _, path in self.slots)
        return [tensor for tensor in found if tensor is not None and id(tensor) not in held]

    def _same_storages(self, tensors: list[torch.Tensor], ids: list[int]) -> bool:
        """Whether tensors that are new objects at an old address have the old storage."""
        for row, (old, new) in enumerate(zip(self.ids, ids, strict=True)):
            if old != new:
                storage = tensors[row].untyped_storage()
                if (
                    storage.data_ptr() != self.storage_ptr[row]
                    or storage.nbytes() != self.storage_nbytes[row]
                ):
                    return False
        return True
