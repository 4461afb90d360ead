# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which hooks are on their targets, and why the others are not."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang_weight_exporter.hooks.targets import Target, version_key

if TYPE_CHECKING:
    from sglang_weight_exporter.records.engine import HookState

logger = logging.getLogger("sglang_weight_exporter")


class HookStates:
    """The hooks of one process."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._by_name: dict[str, list[Target]] = {}
        for target in targets:
            self._by_name.setdefault(target.name, []).append(target)
        self._failures: dict[Target, str] = {}
        self._installed: set[Target] = set()
        self._states: tuple[HookState, ...] | None = None
        self._logged: set[str] = set()

    def changed(self) -> None:
        """A module was imported: states are looked up again."""
        self._states = None

    def installed(self, target: Target) -> None:
        """The target is wrapped."""
        self._installed.add(target)
        self._states = None

    def failed(self, target: Target, reason: str) -> None:
        """It is there, and not what is known, or could not be wrapped."""
        self._failures[target] = reason
        self._states = None

    def all(self, sglang_version: str) -> tuple[HookState, ...]:
        """One state a target name, in the table's order."""
        if self._states is None:
            from sglang_weight_exporter.records.engine import HookState

            self._states = tuple(
                HookState(target=name, **self._state(targets, sglang_version))
                for name, targets in self._by_name.items()
            )
        return self._states

    def log_missing(self, modules: set[str]) -> None:
        """Say in one line what is not seen because this release has changed these modules."""
        from sglang_weight_exporter.runners.sglang_version import sglang_version

        version = sglang_version()
        missing: dict[str, str] = {}
        for name, targets in self._by_name.items():
            if name not in self._logged and any(target.module in modules for target in targets):
                state = self._state(targets, version)
                if state["status"] == "failed":
                    missing[name] = state["reason"]
        if missing:
            self._logged |= missing.keys()
            logger.warning(
                "sglang_weight_exporter: this SGLang differs from the releases that are known, so "
                "these calls are not seen, or not all of them: %s. SGLang is not affected; metrics "
                "miss what they do. A newer sglang-weight-exporter may know this release.",
                "; ".join(f"{name} ({reason})" for name, reason in missing.items()),
            )

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
            place = f"{expected[0].module}.{expected[0].attribute}"
            return {"status": "failed", "reason": f"{place} is gone in SGLang {sglang_version}"}
        return {"status": "absent", "reason": f"SGLang {sglang_version} has none"}


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
