# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own sources, release by release: downloaded as wheels, parsed, never imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: One of each minor step from the first supported release on, its last post-release; from 0.5.16
#: on every release.
RELEASES = (
    "0.4.1",
    "0.4.2.post4",
    "0.4.3.post4",
    "0.4.4.post4",
    "0.4.5.post3",
    "0.4.6.post5",
    "0.4.7.post1",
    "0.4.8.post1",
    "0.4.9.post6",
    "0.4.10.post2",
    "0.5.1.post3",
    "0.5.2",
    "0.5.3.post3",
    "0.5.4.post3",
    "0.5.5.post3",
    "0.5.6.post2",
    "0.5.7",
    "0.5.8.post1",
    "0.5.9",
    "0.5.10.post1",
    "0.5.11",
    "0.5.12.post1",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
)

#: Releases differ between Python versions in nothing that is parsed here.
PYTHON = "3.11"


def cache_directory() -> Path:
    """Where sources stay between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-weight-exporter" / "wheels"


def fetch(version: str) -> Path:
    """A zip file with the engine's Python sources of a release; downloaded when it is not cached.

    Raises `CalledProcessError` with pip's output when pip cannot download the wheel.
    """
    sources = cache_directory() / f"sglang-{version}.zip"
    if sources.exists():
        return sources
    sources.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sources.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", PYTHON, "--dest", directory]
        subprocess.run([*command, f"sglang=={version}"], check=True, capture_output=True, text=True)
        (wheel,) = Path(directory).glob("*.whl")
        kept = Path(directory) / sources.name
        with (
            zipfile.ZipFile(wheel) as full,
            zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as small,
        ):
            for name in full.namelist():
                if name.startswith("sglang/srt/") and name.endswith(".py"):
                    small.writestr(name, full.read(name))
        kept.rename(sources)  # At once: another run may look for it.
    return sources


@dataclass(frozen=True)
class Definition:
    """A function as the source has it."""

    #: Module and qualified name of where it is defined, which may be a base class.
    module: str
    name: str
    arguments: frozenset[str]
    coroutine: bool


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _definition(module: str, name: str, statement: Function) -> Definition:
    coroutine = isinstance(statement, ast.AsyncFunctionDef)
    return Definition(module, name, _arguments(statement), coroutine)


class Release:
    """One release's sources."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._trees: dict[str, ast.Module | None] = {}

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(fetch(self.version))

    @cached_property
    def _files(self) -> frozenset[str]:
        return frozenset(self._archive.namelist())

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = module.replace(".", "/")
            found = {f"{path}.py", f"{path}/__init__.py"} & self._files
            self._trees[module] = ast.parse(self._archive.read(found.pop())) if found else None
        return self._trees[module]

    def function(self, module: str, attribute: str) -> Definition | None:
        """``Class.method``, inherited ones too, or ``function``, imported ones too; None where
        there is none."""
        path, _, name = attribute.rpartition(".")
        if path:
            return self._method(module, path, name)
        tree = self._tree(module)
        for statement in _statements(tree.body if tree else []):
            if isinstance(statement, Function) and statement.name == name:
                return _definition(module, name, statement)
        origin, name = self._origin(module, attribute)
        if origin == module:
            return None
        if self._tree(origin) is None:  # Outside of the engine, and not in the archive.
            return Definition(origin, name, frozenset(), coroutine=False)
        return self.function(origin, name)

    def methods(self, module: str, class_name: str) -> Iterator[str]:
        """Names of the methods that a class itself defines."""
        found = self._class(module, class_name)
        for statement in _statements(found.body if found else []):
            if isinstance(statement, Function):
                yield statement.name

    def _class(self, module: str, name: str) -> ast.ClassDef | None:
        tree = self._tree(module)
        for statement in _statements(tree.body if tree else []):
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return statement
        return None

    def _method(self, module: str, class_name: str, name: str) -> Definition | None:
        found = self._class(module, class_name)
        if found is None:
            return None
        for statement in _statements(found.body):
            if isinstance(statement, Function) and statement.name == name:
                return _definition(module, f"{class_name}.{name}", statement)
        for base in found.bases:
            if isinstance(base, ast.Name):
                inherited = self._method(*self._origin(module, base.id), name)
                if inherited is not None:
                    return inherited
        return None

    def _origin(self, module: str, name: str) -> tuple[str, str]:
        """Where a module's name comes from, followed to the module that defines it."""
        tree = self._tree(module)
        for statement in _statements(tree.body if tree else []):
            if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._origin(statement.module, alias.name)
        return module, name


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, also those under ``if`` and ``try``."""
    for statement in body:
        yield statement
        for nested in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                yield from _statements(getattr(statement, nested, []))


def _arguments(function: Function) -> frozenset[str]:
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return frozenset(argument.arg for argument in every)
