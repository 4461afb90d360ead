# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Arms the hooks in every Python of the environment, and costs nothing where SGLang never comes.

Reached in two ways, in whatever order and number: by ``sglang_weight_exporter.pth`` or ``.start``
when Python starts, and by SGLang's plugin loader (entry point group ``sglang.srt.plugins``, SGLang
0.5.11 and later). Neither imports anything of SGLang: an import hook waits for it.

Only ``os`` and ``sys`` are imported here. ``logging``, ``typing``, ``dataclasses`` or
``importlib.util`` would cost every Python start milliseconds.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own costs its import; type checkers know the name.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Callback = Callable[[ModuleType], object]

PLUGIN_NAME = "sglang_weight_exporter"

#: Nothing of SGLang that we hook is imported before this package, so its import is the moment.
ROOT = "sglang.srt"


def disabled() -> bool:
    """The kill switch, ``SGLANG_WEIGHT_EXPORTER_DISABLED``."""
    word = os.environ.get("SGLANG_WEIGHT_EXPORTER_DISABLED", "").strip().lower()
    return word in ("1", "true", "yes", "on")


def left_out_by_user() -> bool:
    """Whether SGLang's own allow-list of plugins, ``SGLANG_PLUGINS``, is set without us."""
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    return bool(allowed) and PLUGIN_NAME not in [name.strip() for name in allowed.split(",")]


class PostImportHook:
    """A finder in ``sys.meta_path`` that finds nothing itself and calls back after imports.

    Being there is also the mark that makes arming idempotent.
    """

    def __init__(self) -> None:
        #: Module name → called with the module once it has run.
        self.callbacks: dict[str, Callback] = {}
        #: What waits for them, once SGLang has come; the hooks' own, to be found here again.
        self.installation: object = None
        self._searching: set[str] = set()
        self._root_seen = False

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name == ROOT:
            self.on_root()
            return None
        callback = self.callbacks.get(name)
        if callback is None or name in self._searching:
            return None
        self._searching.add(name)
        try:
            return self._spec(name, path, target, callback)
        except Exception:
            return None  # Python's own search goes on without us, and reports what is wrong.
        finally:
            self._searching.discard(name)

    def _spec(
        self,
        name: str,
        path: "Sequence[str] | None",
        target: "ModuleType | None",
        callback: "Callback",
    ) -> "ModuleSpec | None":
        spec: ModuleSpec | None = None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if find is not None and not isinstance(finder, PostImportHook):
                spec = find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if loader is None or isinstance(loader, type):
            return spec  # A namespace package or a built-in module: nothing runs that we wait for.
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            if getattr(module, "__spec__", None) is spec:
                loader.__dict__.pop("exec_module", None)
                callback(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def on_root(self) -> None:
        """SGLang is being imported: read the table of targets and wait for their modules."""
        if self._root_seen or disabled() or left_out_by_user():
            return
        self._root_seen = True
        try:
            from sglang_weight_exporter.hooks.install import watch

            watch(self)
        except Exception as error:
            # A half-removed package, most likely. SGLang must start all the same.
            sys.stderr.write("sglang_weight_exporter: not active ({!r}).\n".format(error))  # noqa: UP032


def arm() -> "PostImportHook | None":
    """Wait for SGLang in this process; called again, it does nothing more."""
    if disabled():
        return None
    for finder in sys.meta_path:
        if isinstance(finder, PostImportHook):
            return finder
    hook = PostImportHook()
    sys.meta_path.insert(0, hook)
    return hook


def plugin() -> None:
    """Entry point ``sglang.srt.plugins``: SGLang calls it early in each of its processes."""
    hook = arm()
    if hook is not None:
        hook.on_root()
