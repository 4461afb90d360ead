# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors a model holds its weights in, and whether they are still what they were.

Beside parameters and buffers, SGLang keeps weights as plain attributes of modules (DeepSeek's
``w_kc`` and ``w_vc``, scales, repacked copies) and binds some of them anew at every reload. Where
they hang is found out by one thorough walk (:func:`derived_paths`) and then looked up again.

Looks happen inside the engine, between the last byte of an update and the first token after it.
No object is kept for a tensor and no tensor is kept alive: what remains between two looks are
numbers and names, so that Python's garbage collector never has a reason to run because of us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import is_not
from typing import Any

import torch

#: What a slot is looked up by: the module's number in the order of the walk, its name with a dot
#: behind, and attribute, then index or key in the containers there.
AttributePath = tuple[int, str, tuple[Any, ...]]

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
    #: Modules walked, a shared one as often as it appears.
    modules: int


def named_tensors(model: torch.nn.Module, slots: Iterable[AttributePath] = ()) -> NamedTensors:
    """Names and tensors of a model, and of its derived weights in ``slots``.

    Unlike ``named_parameters()`` a tied tensor appears under all its names. Wrapper subclasses
    (DTensor, torchao's quantized tensors) own no memory themselves and are replaced by the
    tensors inside them, named ``NAME.INNER``.
    """
    prefixes, modules = _walk(model)
    own: list[tuple[list[str], list[torch.Tensor]]] = [([], []), ([], [])]
    for prefix, module in zip(prefixes, modules, strict=True):
        for number, held in enumerate((module._parameters, module._buffers)):
            if held:
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
    if any(map(_wraps, set(map(type, chain(*(tensors for _, tensors in found)))))):
        found = [_unwrapped(names, tensors) for names, tensors in found]
    return NamedTensors(
        names=found[0][0] + found[1][0] + found[2][0],
        tensors=found[0][1] + found[1][1] + found[2][1],
        parameters=len(found[0][0]),
        buffers=len(found[1][0]),
        modules=len(modules),
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


def derived_paths(model: torch.nn.Module) -> tuple[AttributePath, ...]:
    """Where tensors hang that are plain attributes of modules, or in lists, tuples and
    dictionaries there. Other objects are not entered (SGLang's caches, pools and managers), and
    no property is run. A parameter or buffer under a further name is none of them."""
    prefixes, modules = _walk(model)
    held = {
        id(tensor)
        for module in modules
        for tensor in chain(module._parameters.values(), module._buffers.values())
    }
    slots: list[AttributePath] = []
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
class PreviousCapture:
    """Enough of one look for the next to find what is elsewhere, a fraction of its price."""

    slots: tuple[AttributePath, ...]
    modules: int
    #: Names of parameters, buffers and child modules, in the order of the walk.
    keys: list[str]
    #: Which of what is under the names, and then in the slots, is no tensor of its own.
    absent: list[int]
    #: ``id()`` of each tensor. A new object may have an old number, so all else is compared too.
    ids: list[int]
    data_ptr: list[int]
    shape: list[torch.Size]
    dtype: list[torch.dtype]
    #: As ``get_device()`` has it.
    device: list[int]
    contiguous: list[bool]
    #: Row → stride, of those that are not contiguous.
    stride: Mapping[int, tuple[int, ...]]
    storage_ptr: list[int]
    storage_nbytes: list[int]

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        found: NamedTensors,
        slots: tuple[AttributePath, ...],
        *,
        data_ptr: list[int],
        shape: list[torch.Size],
        dtype: list[torch.dtype],
        storage_ptr: list[int],
        storage_nbytes: list[int],
    ) -> PreviousCapture | None:
        """The columns: of each of the tensors that were found. Equal shapes are one object, as
        twenty thousand would be the collector's work. ``None``: what was found is not what hangs
        under the names (parts of a wrapper), or a module contains itself."""
        keys, absent, tensors = _held(model, slots, found.modules)
        ids = list(map(id, tensors))
        if ids != list(map(id, found.tensors)):
            return None
        contiguous = list(map(torch.Tensor.is_contiguous, tensors))
        return cls(
            slots=slots,
            modules=found.modules,
            keys=keys,
            absent=absent,
            ids=ids,
            data_ptr=data_ptr,
            shape=shape,
            dtype=dtype,
            device=list(map(torch.Tensor.get_device, tensors)),
            contiguous=contiguous,
            stride={row: tensors[row].stride() for row, run in enumerate(contiguous) if not run},
            storage_ptr=storage_ptr,
            storage_nbytes=storage_nbytes,
        )

    def capture(self, model: torch.nn.Module) -> PreviousCapture | None:
        """What hangs under the same names now, as long as every tensor is what it was, be it
        elsewhere; itself if nothing is. ``None``: something else has changed."""
        keys, absent, tensors = _held(model, self.slots, self.modules)
        if keys != self.keys or absent != self.absent:
            return None
        if self._is_current(tensors):
            return self
        for tensor, shape, dtype, contiguous in zip(
            tensors, self.shape, self.dtype, self.contiguous, strict=True
        ):
            if (
                tensor.shape != shape
                or tensor.dtype is not dtype
                or tensor.is_contiguous() is not contiguous
            ):
                return None
        if (
            not self._has_strides(tensors)
            or list(map(torch.Tensor.get_device, tensors)) != self.device
        ):
            return None
        data_ptr = list(map(torch.Tensor.data_ptr, tensors))
        ids = list(map(id, tensors))
        storage_ptr, storage_nbytes = self.storage_ptr.copy(), self.storage_nbytes.copy()
        for row, (tensor, address, number, old_address, old_number) in enumerate(
            zip(tensors, data_ptr, ids, self.data_ptr, self.ids, strict=True)
        ):
            if address != old_address or number != old_number:
                if not address:  # On no device, or of no bytes.
                    return None
                storage = tensor.untyped_storage()
                storage_ptr[row] = storage.data_ptr()
                storage_nbytes[row] = storage.nbytes()
        return replace(
            self,
            ids=ids,
            data_ptr=data_ptr,
            storage_ptr=storage_ptr,
            storage_nbytes=storage_nbytes,
        )

    def _is_current(self, tensors: list[torch.Tensor]) -> bool:
        """Whether every tensor is where it was, as it was. They are not in the processor's caches:
        what is asked of each is asked at once."""
        for tensor, address, shape, dtype, contiguous in zip(
            tensors, self.data_ptr, self.shape, self.dtype, self.contiguous, strict=True
        ):
            if (
                tensor.data_ptr() != address
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or tensor.is_contiguous() is not contiguous
            ):
                return False
        return list(map(id, tensors)) == self.ids and self._has_strides(tensors)

    def _has_strides(self, tensors: list[torch.Tensor]) -> bool:
        return all(tensors[row].stride() == stride for row, stride in self.stride.items())


def _held(
    model: torch.nn.Module, slots: tuple[AttributePath, ...], limit: int
) -> tuple[list[str], list[int], list[torch.Tensor]]:
    """All names, which of them and of the slots hold no tensor, and the tensors, in the order of
    :func:`named_tensors`. One pass, no names with dots: modules and their dictionaries are not in
    the processor's caches. It ends behind ``limit`` modules, as a module that contains itself has
    no end."""
    modules: list[torch.nn.Module] = []
    keys: list[str] = []
    held: list[Any] = []
    names_of_buffers: list[str] = []
    buffers: list[Any] = []
    stack: list[torch.nn.Module | None] = [model]
    while stack and len(modules) <= limit:
        module = stack.pop()
        if module is None:
            continue
        modules.append(module)
        if parameters := module._parameters:
            keys.extend(parameters)
            held.extend(parameters.values())
        if module._buffers:
            names_of_buffers.extend(module._buffers)
            buffers.extend(module._buffers.values())
        if children := module._modules:
            keys.extend(children)
            stack.extend(reversed(children.values()))
    held += buffers
    tensors: list[torch.Tensor] = list(filter(_present, held))
    absent: list[int] = []
    if len(tensors) != len(held):
        absent = [row for row, tensor in enumerate(held) if tensor is None]
    if slots:
        known = set(map(id, tensors))
        for row, (number, _, path) in enumerate(slots, start=len(held)):
            tensor = _at(modules[number], path) if number < len(modules) else None
            if tensor is None or id(tensor) in known:
                absent.append(row)
            else:
                tensors.append(tensor)
    return keys + names_of_buffers, absent, tensors
