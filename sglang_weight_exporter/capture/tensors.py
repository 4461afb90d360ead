# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors a model holds its weights in, and whether they are still what they were.

Beside parameters and buffers, SGLang keeps weights as plain attributes of modules (DeepSeek's
``w_kc`` and ``w_vc``, scales, repacked copies) and binds some of them anew at every reload. Which
attributes these are is found out once, when a load has ended (:class:`DerivedPaths`): what a
forward pass binds to a module later is no weight.

Captures happen inside the engine, between the last byte of an update and the first token after it.
No tensor is kept alive, and no object is made where nothing has changed: Python's garbage collector
never has a reason to run because of us.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import is_not
from typing import Any

import torch

from sglang_weight_exporter.capture.references import References, Registrations

#: How a derived weight is found: the module's number in the order of the walk, its name with a dot
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
    #: Names of buffers that torch does not count to the model's state (``persistent=False``).
    not_persistent: frozenset[str]
    #: Names of modules that were walked.
    modules: int
    #: Whether a module has several.
    shared: bool


def named_tensors(model: torch.nn.Module, paths: Iterable[AttributePath] = ()) -> NamedTensors:
    """Names and tensors of a model, and of its derived weights at ``paths``.

    Unlike ``named_parameters()`` a tied tensor appears under the names of all its modules. Wrapper
    subclasses (DTensor, torchao's quantized tensors) own no memory themselves and are replaced by
    the tensors inside them, named ``NAME.INNER``.
    """
    prefixes, modules = walk(model)
    own: list[tuple[list[str], list[torch.Tensor]]] = [([], []), ([], [])]
    not_persistent: list[str] = []
    for prefix, module in zip(prefixes, modules, strict=True):
        for number, held in enumerate((module._parameters, module._buffers)):
            if held:
                names, tensors = own[number]
                for name, tensor in held.items():
                    if tensor is not None:
                        names.append(prefix + name)
                        tensors.append(tensor)
        if module._buffers:
            not_persistent += [prefix + name for name in module._non_persistent_buffers_set]
    known = set(map(id, chain(own[0][1], own[1][1]))) if paths else set()
    derived: tuple[list[str], list[torch.Tensor]] = ([], [])
    for number, prefix, path in paths:
        tensor = _at(modules[number], path) if number < len(modules) else None
        if tensor is not None and id(tensor) not in known:
            derived[0].append(_name(prefix, path))
            derived[1].append(tensor)
    found = [*own, derived]
    if any(map(_wraps, set(map(type, chain(*(tensors for _, tensors in found)))))):
        found = [_unwrapped(names, tensors) for names, tensors in found]
    return NamedTensors(
        names=found[0][0] + found[1][0] + found[2][0],
        tensors=found[0][1] + found[1][1] + found[2][1],
        parameters=len(found[0][0]),
        buffers=len(found[1][0]),
        not_persistent=frozenset(not_persistent),
        modules=len(modules),
        shared=len(set(map(id, modules))) < len(modules),
    )


def _name(prefix: str, path: tuple[Any, ...]) -> str:
    return (prefix + ".".join(map(str, path))).replace("\n", "\\n")


def walk(model: torch.nn.Module) -> tuple[list[str], list[torch.nn.Module]]:
    """Every module under each name that a module gives it, with a dot behind. Below a module that
    was met before nothing is met again: by all their names, layers that hold one another are more
    than can be counted."""
    prefixes: list[str] = []
    modules: list[torch.nn.Module] = []
    seen: set[int] = set()
    # Two stacks and no pairs: thousands of tuples at a time would be the collector's work.
    names, stack = [""], [model]
    while stack:
        prefix, module = names.pop(), stack.pop()
        prefixes.append(prefix)
        modules.append(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, child in reversed(module._modules.items()):
            if child is not None:
                names.append(f"{prefix}{name}.")
                stack.append(child)
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


@dataclass(frozen=True)
class DerivedPaths:
    """Which attributes of which modules a load has left weights in."""

    paths: tuple[AttributePath, ...] = ()
    #: The module of each.
    modules: tuple[weakref.ref[torch.nn.Module], ...] = ()

    @classmethod
    def of(
        cls, model: torch.nn.Module, *, foreign: Callable[[torch.nn.Module], bool] | None = None
    ) -> DerivedPaths:
        """Plain attributes of modules that are tensors, or lists, tuples and dictionaries of
        them. Other objects are not entered (SGLang's caches, pools and managers), and no property
        is run. A parameter or buffer under a further name is none of them.

        ``foreign``: whether a module's attributes are somebody else's, as adapter slots are.
        """
        prefixes, modules = walk(model)
        held = {
            id(tensor)
            for module in modules
            for tensor in chain(module._parameters.values(), module._buffers.values())
        }
        paths: list[AttributePath] = []
        seen: set[int] = set()
        for number, (prefix, module) in enumerate(zip(prefixes, modules, strict=True)):
            if id(module) in seen or (foreign is not None and foreign(module)):
                continue
            seen.add(id(module))
            for attribute, value in vars(module).items():
                if attribute not in _OF_TORCH:
                    paths.extend(
                        (number, prefix, path)
                        for path, tensor in _tensors_in((attribute,), value)
                        if id(tensor) not in held
                    )
        return cls(tuple(paths), tuple(weakref.ref(modules[number]) for number, _, _ in paths))

    def renamed(self, model: torch.nn.Module) -> DerivedPaths:
        """The same attributes of the same modules, as they are called in the model now: modules
        that adapters wrap have another name."""
        prefixes, modules = walk(model)
        places: dict[int, int] = {}
        for place, module in enumerate(modules):
            places.setdefault(id(module), place)
        there = [
            ((number, prefixes[number], path), known)
            for (_, _, path), known in zip(self.paths, self.modules, strict=True)
            if (number := places.get(id(known()))) is not None
        ]
        return DerivedPaths(tuple(path for path, _ in there), tuple(known for _, known in there))

    def only(self, indices: Collection[int]) -> DerivedPaths:
        paths, modules = self.paths, self.modules
        return DerivedPaths(tuple(paths[i] for i in indices), tuple(modules[i] for i in indices))

    def tensors(self) -> list[torch.Tensor | None]:
        """What is there now, without a walk through the model."""
        return [
            None if (module := known()) is None else _at(module, path)
            for (_, _, path), known in zip(self.paths, self.modules, strict=True)
        ]

    def names(self) -> list[str]:
        return [_name(prefix, path) for _, prefix, path in self.paths]


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
    """What hangs there now; ``None`` where that is no tensor any more."""
    try:
        value = vars(module)[path[0]]
        for step in path[1:]:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class PreviousCapture:
    """Enough of one capture for the next to find what is elsewhere, a fraction of its price."""

    derived: DerivedPaths
    #: Names of modules that a walk has to meet where no module has several; ``None``: one has.
    limit: int | None
    #: Names of parameters, buffers and child modules, in the order of the walk.
    keys: list[str]
    #: Which of what is under the names, and then at the paths, is no tensor of its own.
    absent: list[int]
    #: Which paths have a tensor of their own; the last columns are theirs.
    present: list[int]
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
    #: By which the tensors are found without a walk.
    references: References = field(compare=False, repr=False)

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        found: NamedTensors,
        derived: DerivedPaths,
        *,
        data_ptr: list[int],
        shape: list[torch.Size],
        dtype: list[torch.dtype],
        storage_ptr: list[int],
        storage_nbytes: list[int],
        registrations: Registrations | None,
    ) -> PreviousCapture | None:
        """The columns: of each tensor that was found; equal shapes are one object, for the
        collector's sake. ``None``: what hangs under the names are wrappers of what was found."""
        references = References(registrations)
        registered = references.begin_walk()
        limit = None if found.shared else found.modules
        modules, keys, absent, present, tensors = _held(model, derived.paths, limit)
        ids = list(map(id, tensors))
        if ids != list(map(id, found.tensors)):
            return None
        contiguous = list(map(torch.Tensor.is_contiguous, tensors))
        references.learn(model, modules, tensors, registered)
        return cls(
            derived=derived,
            limit=limit,
            keys=keys,
            absent=absent,
            present=present,
            ids=ids,
            data_ptr=data_ptr,
            shape=shape,
            dtype=dtype,
            device=list(map(torch.Tensor.get_device, tensors)),
            contiguous=contiguous,
            stride={row: tensors[row].stride() for row, run in enumerate(contiguous) if not run},
            storage_ptr=storage_ptr,
            storage_nbytes=storage_nbytes,
            references=references,
        )

    def capture(self, model: torch.nn.Module) -> PreviousCapture | None:
        """What hangs under the same names now; itself if nothing is elsewhere. ``None``: something
        else has changed."""
        known = self.references.tensors(model)
        if known is not None and self._is_current(known) and self._has_derived():
            return self
        registered = self.references.begin_walk()
        modules, keys, absent, _, tensors = _held(model, self.derived.paths, self.limit)
        if keys != self.keys or absent != self.absent:
            return None
        if self._is_current(tensors) and list(map(id, tensors)) == self.ids:
            self.references.learn(model, modules, tensors, registered)
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

    def _has_derived(self) -> bool:
        """Whether derived weights hang where they hung, and none elsewhere."""
        ids, first = list(map(id, self.derived.tensors())), len(self.ids) - len(self.present)
        if [ids[index] for index in self.present] != self.ids[first:]:
            return False
        others = set(range(len(ids))).difference(self.present)
        return not others or {ids[index] for index in others} <= {id(None), *self.ids[:first]}

    def rebound(self) -> list[int]:
        """Paths at which another tensor hangs now, or none; asks about derived weights alone."""
        tensors = self.derived.tensors()
        found = []
        for row, index in enumerate(self.present, start=len(self.ids) - len(self.present)):
            tensor = tensors[index]
            if (
                tensor is None
                or id(tensor) != self.ids[row]
                or tensor.data_ptr() != self.data_ptr[row]
                or tensor.shape != self.shape[row]
            ):
                found.append(index)
        return found

    def _is_current(self, tensors: list[torch.Tensor]) -> bool:
        """Whether every tensor is where it was, as it was; in one pass, for the caches' sake."""
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
        return self._has_strides(tensors)

    def _has_strides(self, tensors: list[torch.Tensor]) -> bool:
        return all(tensors[row].stride() == stride for row, stride in self.stride.items())


def _held(
    model: torch.nn.Module, paths: tuple[AttributePath, ...], limit: int | None
) -> tuple[list[torch.nn.Module], list[str], list[int], list[int], list[torch.Tensor]]:
    """The modules, all names, which of them and of the paths hold no tensor of their own, which
    paths do, and the tensors, in the order of :func:`named_tensors`. One pass, no names with dots:
    modules and their dictionaries are not in the processor's caches. Where no module has several
    names it is enough that the walk ends behind ``limit`` of them."""
    modules: list[torch.nn.Module] = []
    keys: list[str] = []
    held: list[Any] = []
    names_of_buffers: list[str] = []
    buffers: list[Any] = []
    seen: set[int] = set()
    stack: list[torch.nn.Module | None] = [model]
    while stack and (limit is None or len(modules) <= limit):
        module = stack.pop()
        if module is None:
            continue
        modules.append(module)
        inside = module.__dict__
        if parameters := inside["_parameters"]:
            keys.extend(parameters)
            held.extend(parameters.values())
        if inside["_buffers"]:
            names_of_buffers.extend(inside["_buffers"])
            buffers.extend(inside["_buffers"].values())
        if children := inside["_modules"]:
            if limit is None:
                if id(module) in seen:
                    continue
                seen.add(id(module))
            keys.extend(children)
            stack.extend(reversed(children.values()))
    held += buffers
    tensors: list[torch.Tensor] = list(filter(_present, held))
    absent: list[int] = []
    present: list[int] = []
    if len(tensors) != len(held):
        absent = [row for row, tensor in enumerate(held) if tensor is None]
    if paths:
        known = set(map(id, tensors))
        for index, (number, _, path) in enumerate(paths):
            tensor = _at(modules[number], path) if number < len(modules) else None
            if tensor is None or id(tensor) in known:
                absent.append(len(held) + index)
            else:
                present.append(index)
                tensors.append(tensor)
    return modules, keys + names_of_buffers, absent, present, tensors
