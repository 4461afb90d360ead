# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a model's tensors hang where they hung, without a walk over its modules.

A large model has more modules than tensors, none of them in the processor's caches, and an update
leaves nearly all of them alone. So the tensors of the last capture are asked for themselves, by
weak references; what else can have happened is known otherwise:

- torch reports each parameter, buffer and module that is registered, also by assignment;
- what was deleted or is ``None`` now, is no longer alive, unless something else holds it: then it
  is found when its turn comes, some of them at each capture.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch.nn.modules import module as torch_module

#: Tensors of which is asked at each capture whether their module holds them: 0.3 ms.
SHARE = 500


class Registrations:
    """How often torch has registered something in any module of the process.

    torch's hooks are the process's, so one of these is made for it and handed on. They go with it.
    """

    def __init__(self) -> None:
        self._next = itertools.count(1).__next__
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        """From now on. Between two loads there are next to none."""
        if self._watching:
            return
        self._watching = True
        this = weakref.ref(self)

        def registered(module: object, name: str, what: object) -> None:
            """``None`` says that what is registered stays what it is."""
            if (registrations := this()) is not None:
                registrations.count = registrations._next()

        for register in (
            torch_module.register_module_parameter_registration_hook,
            torch_module.register_module_buffer_registration_hook,
            torch_module.register_module_module_registration_hook,
        ):
            weakref.finalize(self, register(registered).remove).atexit = False


class References:
    """The tensors of a walk and their modules, without keeping them alive.

    ``registrations``: without them only a walk can say what hangs where.
    """

    def __init__(self, registrations: Registrations | None) -> None:
        self._registrations = registrations
        self._model: Callable[[], torch.nn.Module | None] = lambda: None
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._holders: list[weakref.ref[torch.nn.Module]] = []
        self._names: list[str] = []
        self._registered = -1
        self._turn = 0
        #: Whether a tensor was found to hang elsewhere.
        self._moved = True

    def begin_walk(self) -> int:
        """A walk is about to begin. How much was registered before it."""
        if self._registrations is None:
            return 0
        self._registrations.watch()
        return self._registrations.count

    def learn(
        self,
        model: torch.nn.Module,
        modules: list[torch.nn.Module],
        tensors: list[torch.Tensor],
        registered: int,
    ) -> None:
        """A walk has ended. ``modules``: in its order; ``tensors``: parameters, buffers and then
        others, in their order; ``registered``: registrations before it began. What has a reference
        gets no second one: there are few new objects in an update."""
        if self._registrations is None:
            return
        known = None if self._moved or self._model() is not model else self._alive()
        if known is not None and list(map(id, known)) == list(map(id, tensors)):
            self._registered = registered
            return
        before = self._tensors, self._holders
        self._model = weakref.ref(model)
        self._tensors = list(map(weakref.ref, tensors))
        self._holders, self._names = [], []
        for kind in ("_parameters", "_buffers"):
            for module in modules:
                if held := module.__dict__[kind]:
                    names = [name for name, tensor in held.items() if tensor is not None]
                    self._names += names
                    self._holders += [weakref.ref(module)] * len(names)
        self._registered, self._turn, self._moved = registered, 0, False
        del before  # They were there until now.

    def tensors(self, model: torch.nn.Module) -> list[torch.Tensor] | None:
        """All of them, in their order; ``None``: only a walk can say what hangs there now."""
        registrations = self._registrations
        if registrations is None or self._registered != registrations.count:
            return None
        if self._model() is not model:
            return None
        tensors = self._alive()
        if tensors is None or not self._share_hangs(tensors):
            self._moved = True
            return None
        return tensors

    def _alive(self) -> list[torch.Tensor] | None:
        tensors = [reference() for reference in self._tensors]
        there = [tensor for tensor in tensors if tensor is not None]
        return there if len(there) == len(tensors) else None

    def _share_hangs(self, tensors: list[torch.Tensor]) -> bool:
        """Whether the next share of them hangs under the same names of the same modules."""
        first, after = self._turn, self._turn + SHARE
        self._turn = after if after < len(self._names) else 0
        for holder, name, tensor in zip(
            self._holders[first:after], self._names[first:after], tensors[first:after], strict=False
        ):
            module = holder()
            if module is None:
                return False
            inside = module.__dict__
            if tensor is not inside["_parameters"].get(name, inside["_buffers"].get(name)):
                return False
        return True
