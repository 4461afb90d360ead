# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A module of the SGLang that is installed, run from its source without what it imports of SGLang.

So a test has SGLang's own order of calls without a model, a GPU or ten seconds of imports.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock


class _WithoutSGLang(ast.NodeTransformer):
    """Leaves out what is imported from SGLang, also inside functions, and keeps the names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module is None or not node.module.startswith("sglang"):
            return node
        self.names += [alias.asname or alias.name for alias in node.names]
        return ast.copy_location(ast.Pass(), node)


class Source:
    """``name``: a module's, in the package below ``site_packages``."""

    def __init__(self, site_packages: Path, name: str) -> None:
        self.name = name
        path = site_packages.joinpath(*name.split(".")).with_suffix(".py")
        without = _WithoutSGLang()
        tree = ast.fix_missing_locations(without.visit(ast.parse(path.read_text())))
        self._code: CodeType = compile(tree, str(path), "exec")
        self._names = without.names

    def run(self, **names: Any) -> ModuleType:
        """A new module. ``names``: what stands for things that it imports from SGLang; of a
        structure (``…Output``) its fields are kept, and of all else nothing is expected."""
        module = ModuleType(self.name)
        nothing = MagicMock()  # Each is a class of its own, which takes time.
        for name in self._names:
            setattr(module, name, SimpleNamespace if name.endswith("Output") else nothing)
        vars(module).update(names)
        before = sys.modules.get(self.name)
        sys.modules[self.name] = module  # Data classes ask for their module.
        try:
            exec(self._code, vars(module))
        finally:
            if before is None:
                del sys.modules[self.name]
            else:
                sys.modules[self.name] = before
        return module
