# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the targets in SGLang's modules as they are imported, and wraps them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from sglang_weight_exporter.hooks.states import HookStates
from sglang_weight_exporter.hooks.targets import TARGETS, Target
from sglang_weight_exporter.hooks.wrapped_call import Around, Call, Outcome

if TYPE_CHECKING:
    from sglang_weight_exporter.hooks.translator import Translator

logger = logging.getLogger("sglang_weight_exporter")


class Installation:
    """The hooks of one process, and what went wrong with them.

    ``make_translator`` is called with the first call of SGLang's that is seen. A forked child has
    its parent's memory and none of its weights: hooks that were in use do nothing there, and touch
    no lock, because another thread of the parent may have held it.
    """

    def __init__(
        self, targets: Iterable[Target], make_translator: Callable[[Installation], Translator]
    ) -> None:
        self.errors: dict[str, int] = {}
        self._targets = tuple(targets)
        self.states = HookStates(self._targets)
        self._make_translator = make_translator
        self._translator: Translator | None = None
        #: There is none, or it is another process's: hooks do nothing.
        self._off = False
        self._logged: set[tuple[str, type[BaseException]]] = set()
        self._lock = threading.Lock()
        forked = weakref.WeakMethod(self._forked)
        os.register_at_fork(after_in_child=lambda: (method := forked()) and method())

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._off = self._translator is not None

    def modules(self) -> set[str]:
        """Where the targets are."""
        return {target.module for target in self._targets}

    @property
    def translator(self) -> Translator:
        """Made when it is first needed."""
        if self._translator is None:
            with self._lock:
                if self._translator is None:
                    try:
                        self._translator = self._make_translator(self)
                    except BaseException:
                        self._off = True  # An import that fails is not tried at each call.
                        raise
        return self._translator

    # Targets are wrapped.

    def on_import(self, *modules: ModuleType) -> None:
        """Wrap the targets of modules that have run, and say in one line what is not seen because
        this release has changed it. Never raises. Those that had run before anybody watched come
        together: a function that one of them lacks may be another's."""
        self.states.changed()
        for module in modules:
            self._install_all(module.__name__, module)
        try:
            self.states.log_missing({module.__name__ for module in modules})
        except Exception as error:
            self.report("hooks", error)
        # `python -m` runs a module under one of these names, the second in its spawned children.
        for alias in ("__main__", "__mp_main__"):
            main = sys.modules.get(alias)
            name = getattr(getattr(main, "__spec__", None), "name", None)
            if main is not None and name is not None:
                self._install_all(name, main)

    def _install_all(self, name: str, module: ModuleType) -> None:
        for target in self._targets:
            if target.module == name:
                try:
                    self._install(target, module)
                except Exception as error:
                    self.states.failed(target, f"could not be wrapped ({error!r})")
                    self.report(target.name, error)

    def _install(self, target: Target, module: ModuleType) -> None:
        path, _, name = target.attribute.rpartition(".")
        owner = getattr(module, path, None) if path else module
        original = None if owner is None else inspect.getattr_static(owner, name, None)
        if original is None or original is getattr(object, name, None):
            return  # This release has none, or none of its own.
        static = isinstance(original, staticmethod)
        function = original.__func__ if static else original
        place = f"{target.module}.{target.attribute}"
        if not isinstance(function, FunctionType):
            kind = type(original).__name__
            self.states.failed(target, f"{place} is no function but a {kind} in this release")
            return
        ours = hasattr(function, "__sglang_weight_exporter__")
        sglangs = function.__wrapped__ if ours else function  # type: ignore[attr-defined]
        if inspect.iscoroutinefunction(sglangs) != target.coroutine:
            which = "no coroutine" if target.coroutine else "a coroutine"
            self.states.failed(target, f"{place} is {which} in this release")
            return
        arguments = inspect.signature(sglangs).parameters
        renamed = [argument for argument in target.reads if argument not in arguments]
        if renamed:
            self.states.failed(target, f"{place} has no argument {', '.join(renamed)} any more")
        if not ours:
            wrapper = self._wrap(target, function)
            setattr(owner, name, staticmethod(wrapper) if static else wrapper)
        self.states.installed(target)

    def _wrap(self, target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
        # A generator that is left behind is closed by an interpreter that ends, in which there is
        # nothing left to be done: no thread, no file, not even this module's names.
        ends = sys.is_finalizing
        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                around = self._begin(target, original, args, kwargs)
                try:
                    result = await original(*args, **kwargs)
                except BaseException as error:
                    self._end(target, around, Outcome(error=error))
                    raise
                self._end(target, around, Outcome(result=result))
                return result

        elif inspect.isgeneratorfunction(original):

            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                around = self._begin(target, original, args, kwargs)
                try:
                    result = yield from original(*args, **kwargs)
                except BaseException as error:
                    if not ends():
                        self._end(target, around, Outcome(error=error))
                    raise
                self._end(target, around, Outcome(result=result))
                return result

        else:

            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                around = self._begin(target, original, args, kwargs)
                try:
                    result = original(*args, **kwargs)
                except BaseException as error:
                    self._end(target, around, Outcome(error=error))
                    raise
                self._end(target, around, Outcome(result=result))
                return result

        wrapper.__sglang_weight_exporter__ = target.name  # type: ignore[attr-defined]
        return wrapper

    def _begin(
        self, target: Target, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Around | None:
        if self._off:
            return None
        try:
            translator = self._translator or self.translator
            call = Call(target, original, args, kwargs)
            around: Around | None = getattr(translator, target.meaning)(call)
            if around is not None:
                next(around)
        except StopIteration:
            return None
        except Exception as error:
            self.report(target.name, error)
            return None
        return around

    def _end(self, target: Target, around: Around | None, outcome: Outcome) -> None:
        if around is None or self._off:
            return
        try:
            around.send(outcome)
        except StopIteration:
            pass
        except Exception as error:
            self.report(target.name, error)

    # Calls are observed.

    @contextlib.contextmanager
    def observe(self, target: Target, owner: Any) -> Iterator[None]:
        """The block as one call of a target, for what is announced and not wrapped."""
        around = self._begin(target, _no_call, (owner,), {})
        try:
            yield
        except BaseException as error:
            self._end(target, around, Outcome(error=error))
            raise
        self._end(target, around, Outcome())

    def report(self, where: str, error: BaseException) -> None:
        """Count an exception of ours, and log the first of each kind."""
        kind = (where, type(error))
        with self._lock:
            self.errors[where] = self.errors.get(where, 0) + 1
            known = kind in self._logged
            self._logged.add(kind)
        if not known:
            logger.warning(
                "sglang_weight_exporter: %s went wrong (%r). SGLang is not affected; what could "
                "not be read is missing from the metrics. Further errors of this kind are counted "
                "and not logged.",
                where,
                error,
                exc_info=error,
            )


def _no_call(owner: Any) -> None:
    """Stands for a call that is not SGLang's."""


class ImportHook(Protocol):
    """What reports modules that have run: the bootstrap's finder."""

    callbacks: dict[str, Callable[[ModuleType], object]]
    installation: object


def watch(hook: ImportHook) -> None:
    """Have the targets wrapped: at once where SGLang's modules are there, else on their import."""
    installation = Installation(TARGETS, _make_translator)
    hook.installation = installation
    there = []
    for name in installation.modules():
        hook.callbacks[name] = installation.on_import
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            there.append(module)
    installation.on_import(*there)


def _make_translator(installation: Installation) -> Translator:
    # Late: the data model and torch's share of the work are needed in a rank, and not in the
    # HTTP server, the tokenizer and the detokenizer, which import SGLang too.
    from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
    from sglang_weight_exporter.hooks.translator import Translator
    from sglang_weight_exporter.rank import make_rank
    from sglang_weight_exporter.settings import Settings

    settings, complaints = Settings.from_environ(os.environ)
    for complaint in complaints:
        logger.warning("sglang_weight_exporter: %s", complaint)
    rank = make_rank(
        settings,
        os.environ,
        report=installation.report,
        hooks=installation.states.all,
        errors=lambda: dict(installation.errors),
        fingerprinter=Fingerprinter() if settings.fingerprint else None,
    )
    return Translator(rank)
