# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the targets in SGLang's modules as they are imported, and wraps them."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from sglang_weight_exporter.hooks.targets import TARGETS, Target, version_key
from sglang_weight_exporter.hooks.wrapped_call import Around, Call, Outcome

if TYPE_CHECKING:
    from sglang_weight_exporter.hooks.observer import Observer
    from sglang_weight_exporter.records.engine import HookState

logger = logging.getLogger("sglang_weight_exporter")


def _announced(owner: Any) -> None:
    """Stands for a call that is not SGLang's."""


class Installation:
    """The hooks of one process: which are on their targets, and what went wrong with them."""

    def __init__(
        self, targets: Iterable[Target], make_observer: Callable[[Installation], Observer]
    ) -> None:
        self.errors: dict[str, int] = {}
        self._targets = tuple(targets)
        self._make_observer = make_observer
        self._observer: Observer | None = None
        self._failures: dict[Target, str] = {}
        self._installed: set[Target] = set()
        self._states: tuple[HookState, ...] | None = None
        self._logged: set[tuple[str, type[BaseException]]] = set()
        self._complained: set[str] = set()
        self._lock = threading.Lock()

    def modules(self) -> set[str]:
        return {target.module for target in self._targets}

    def on_import(self, *modules: ModuleType) -> None:
        """Wrap the targets of modules that have run, and say in one line what is not seen because
        this release has changed it. Never raises. Those that had run before anybody watched come
        together: a function that one of them lacks may be another's."""
        self._states = None
        for module in modules:
            self._install_all(module.__name__, module)
        try:
            self._complain({module.__name__ for module in modules})
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
                    self._failures[target] = f"could not be wrapped ({error!r})"
                    self.report(target.name, error)

    def _complain(self, modules: set[str]) -> None:
        named = dict.fromkeys(target.name for target in self._targets if target.module in modules)
        version = _sglang_version()
        missing: dict[str, str] = {}
        for name in named.keys() - self._complained:
            state = self._state([each for each in self._targets if each.name == name], version)
            if state["status"] == "failed":
                missing[name] = state["reason"]
        if missing:
            self._complained |= missing.keys()
            logger.warning(
                "sglang_weight_exporter: this SGLang differs from the releases that are known, so "
                "these calls are not seen, or not all of them: %s. SGLang is not affected; metrics "
                "miss what they do. A newer sglang-weight-exporter may know this release.",
                "; ".join(f"{name} ({reason})" for name, reason in missing.items()),
            )

    def _install(self, target: Target, module: ModuleType) -> None:
        path, _, name = target.attribute.rpartition(".")
        owner = getattr(module, path, None) if path else module
        original = None if owner is None else getattr(owner, name, None)
        if original is None:
            return
        ours = hasattr(original, "__sglang_weight_exporter__")
        function = original.__wrapped__ if ours else original
        place = f"{target.module}.{target.attribute}"
        if inspect.iscoroutinefunction(function) != target.coroutine:
            which = "no coroutine" if target.coroutine else "a coroutine"
            self._failures[target] = f"{place} is {which} in this release"
            return
        arguments = inspect.signature(function).parameters
        renamed = [argument for argument in target.reads if argument not in arguments]
        if renamed:
            self._failures[target] = f"{place} has no argument {', '.join(renamed)} any more"
        if not ours:
            wrapper: Any = self._wrap(target, original)
            static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            setattr(owner, name, staticmethod(wrapper) if static else wrapper)
        self._installed.add(target)

    def _wrap(self, target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
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
        try:
            around: Around = getattr(self._the_observer(), target.meaning)(
                Call(target, original, args, kwargs)
            )
            next(around)
        except StopIteration:
            return None
        except Exception as error:
            self.report(target.name, error)
            return None
        return around

    def _the_observer(self) -> Observer:
        if self._observer is None:
            with self._lock:
                if self._observer is None:
                    self._observer = self._make_observer(self)
        return self._observer

    def _end(self, target: Target, around: Around | None, outcome: Outcome) -> None:
        if around is None:
            return
        try:
            around.send(outcome)
        except StopIteration:
            pass
        except Exception as error:
            self.report(target.name, error)

    @contextlib.contextmanager
    def observe(self, target: Target, owner: Any) -> Iterator[None]:
        """The block as one call of a target, for what is announced and not wrapped."""
        around = self._begin(target, _announced, (owner,), {})
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

    def states(self, sglang_version: str) -> tuple[HookState, ...]:
        """One state a target name, in the table's order; looked up again after each import."""
        if self._states is not None:
            return self._states
        from sglang_weight_exporter.records.engine import HookState

        names = dict.fromkeys(target.name for target in self._targets)
        states = []
        for name in names:
            targets = [target for target in self._targets if target.name == name]
            states.append(HookState(target=name, **self._state(targets, sglang_version)))
        self._states = tuple(states)
        return self._states

    def _state(self, targets: list[Target], sglang_version: str) -> dict[str, Any]:
        # Two entries may find the same callable: one that reads an argument of older releases.
        if any(target in self._installed - self._failures.keys() for target in targets):
            return {"status": "installed"}
        failed = [self._failures[target] for target in targets if target in self._failures]
        if failed:
            return {"status": "failed", "reason": failed[0]}
        waiting = [target for target in targets if _may_be_imported(target.module)]
        if waiting:
            return {"status": "pending", "reason": f"{waiting[0].module} is not imported"}
        version = version_key(sglang_version)
        expected = [
            target
            for target in targets
            if version_key(target.since) <= version
            and (target.until is None or version <= version_key(target.until))
        ]
        if expected:
            target = expected[0]
            return {
                "status": "failed",
                "reason": f"{target.module}.{target.attribute} is gone in SGLang {sglang_version}",
            }
        return {"status": "absent", "reason": f"SGLang {sglang_version} has none"}


def _sglang_version() -> str:
    from sglang_weight_exporter.runners.sglang_version import sglang_version

    return sglang_version()


def _may_be_imported(name: str) -> bool:
    """Whether a module is there and not imported; looks on disk and imports nothing."""
    module = sys.modules.get(name)
    if module is not None:
        return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
    parent, _, _ = name.rpartition(".")
    package = sys.modules.get(parent)
    if package is None:
        return _may_be_imported(parent) if parent else False
    path = getattr(package, "__path__", None)
    return path is not None and importlib.machinery.PathFinder.find_spec(name, path) is not None


class ImportHook(Protocol):
    """What tells of modules that have run: the bootstrap's finder."""

    callbacks: dict[str, Callable[[ModuleType], object]]
    installation: object


def watch(hook: ImportHook) -> None:
    """Have the targets wrapped: at once where SGLang's modules are there, else on their import."""
    installation = Installation(TARGETS, _make_observer)
    hook.installation = installation
    there = []
    for name in installation.modules():
        hook.callbacks[name] = installation.on_import
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            there.append(module)
    installation.on_import(*there)


def _make_observer(installation: Installation) -> Observer:
    # Late: the data model and torch's share of the work are needed in a rank, and not in the
    # HTTP server, the tokenizer and the detokenizer, which import SGLang too.
    from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
    from sglang_weight_exporter.hooks.observer import Observer
    from sglang_weight_exporter.publisher.publisher import Publisher
    from sglang_weight_exporter.rank import Rank
    from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
    from sglang_weight_exporter.runners.roles import Roles
    from sglang_weight_exporter.settings import Settings

    settings, complaints = Settings.from_environ(os.environ)
    for complaint in complaints:
        logger.warning("sglang_weight_exporter: %s", complaint)
    roles = Roles(installation.report)
    return Observer(
        Rank(
            roles=roles,
            inspector=ModelRunnerInspector(
                roles,
                report=installation.report,
                fingerprinter=Fingerprinter() if settings.fingerprint else None,
            ),
            publisher=Publisher(settings, os.environ, report=installation.report),
            hooks=installation.states,
            errors=lambda: dict(installation.errors),
        )
    )
