# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What every Python of the environment sees of us: next to nothing, and never an error.

A stand-in package plays SGLang where only the order of imports matters: a real one takes ten
seconds to import, and the tests of `hooks` and `e2e` have it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

import sglang_weight_exporter

PACKAGE = Path(sglang_weight_exporter.__file__).parent
AUTOLOAD = Path(__file__).parents[2] / "autoload"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory that Python treats like site-packages, with the package and its `.pth`."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(AUTOLOAD / "sglang_weight_exporter.pth", site)
    return site


@pytest.fixture
def sglang(site: Path) -> Path:
    """A stand-in for SGLang with one hook target."""
    package = site / "sglang" / "srt" / "model_executor"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "model_runner.py").write_text(
        "class ModelRunner:\n    def load_model(self):\n        return 'loaded'\n"
    )
    return site


def python(site: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that reads `site` as site-packages, isolated from ours."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG")}
    program = f"import site, sys; site.addsitedir({str(site)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**environ, **variables},
        cwd="/",  # -c puts the working directory in sys.path, and the checkout has the package
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def answer(result: subprocess.CompletedProcess[str]) -> object:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


MODULES = "import json; print(json.dumps(sorted(sys.modules)))"
WRAPPED = """
import json
from sglang.srt.model_executor.model_runner import ModelRunner
print(json.dumps(hasattr(ModelRunner.load_model, '__sglang_weight_exporter__')))
"""


def test_a_python_without_sglang_imports_two_small_modules_and_prints_nothing(site: Path) -> None:
    with_us = answer(python(site, MODULES))
    without = answer(python(site, MODULES, SGLANG_WEIGHT_EXPORTER_DISABLED="1"))
    assert isinstance(with_us, list)
    assert isinstance(without, list)
    assert set(with_us) - set(without) == {
        "sglang_weight_exporter",
        "sglang_weight_exporter.bootstrap",
    }


@pytest.mark.parametrize("value", ["1", "true", "Yes", " on "])
def test_the_kill_switch_keeps_everything_out(sglang: Path, value: str) -> None:
    code = "import sglang.srt.model_executor.model_runner\n" + MODULES
    found = answer(python(sglang, code, SGLANG_WEIGHT_EXPORTER_DISABLED=value))
    assert isinstance(found, list)
    assert not [name for name in found if name.startswith("sglang_weight_exporter")]


def test_targets_are_hooked_when_their_module_is_imported(sglang: Path) -> None:
    assert answer(python(sglang, WRAPPED)) is True


def test_sglangs_own_list_of_plugins_is_respected(sglang: Path) -> None:
    assert answer(python(sglang, WRAPPED, SGLANG_PLUGINS="another, one_more")) is False
    assert answer(python(sglang, WRAPPED, SGLANG_PLUGINS="another, sglang_weight_exporter")) is True


def test_pth_and_plugin_together_hook_once(sglang: Path) -> None:
    code = """
import json
from sglang_weight_exporter import bootstrap
bootstrap.arm()
import sglang.srt
bootstrap.plugin()
from sglang.srt.model_executor.model_runner import ModelRunner
bootstrap.plugin()
print(json.dumps([
    sum(isinstance(finder, bootstrap.PostImportHook) for finder in sys.meta_path),
    hasattr(ModelRunner.load_model, "__sglang_weight_exporter__"),
    hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"),
]))
"""
    assert answer(python(sglang, code)) == [1, True, False]


def test_the_plugin_alone_hooks_modules_that_are_imported_already(sglang: Path) -> None:
    # `pip install --target` and PYTHONPATH: Python reads no .pth there.
    (sglang / "sglang_weight_exporter.pth").unlink()
    code = """
import json
from sglang.srt.model_executor.model_runner import ModelRunner
before = hasattr(ModelRunner.load_model, "__sglang_weight_exporter__")
from sglang_weight_exporter import bootstrap
bootstrap.plugin()
print(json.dumps([before, hasattr(ModelRunner.load_model, "__sglang_weight_exporter__")]))
"""
    assert answer(python(sglang, code)) == [False, True]


def test_a_hooked_module_looks_as_if_nobody_had_touched_its_import(sglang: Path) -> None:
    code = """
import importlib, inspect, json
import sglang.srt.model_executor.model_runner as module
first = module.ModelRunner
importlib.reload(module)
print(json.dumps([
    type(module.__loader__).__name__,
    "exec_module" in vars(module.__loader__),
    "load_model" in inspect.getsource(module),
    first is not module.ModelRunner,
    hasattr(module.ModelRunner.load_model, "__sglang_weight_exporter__"),
    first.load_model.__name__,
    str(inspect.signature(first.load_model)),
]))
"""
    expected = ["SourceFileLoader", False, True, True, True, "load_model", "(self)"]
    assert answer(python(sglang, code)) == expected


def test_an_error_in_sglangs_module_is_sglangs_own(sglang: Path) -> None:
    module = sglang / "sglang" / "srt" / "model_executor" / "model_runner.py"
    module.write_text("raise RuntimeError('SGLang says so')")
    result = python(sglang, "import sglang.srt.model_executor.model_runner")
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("RuntimeError: SGLang says so")


def test_another_finder_that_wraps_loaders_goes_on_working(sglang: Path) -> None:
    # wrapt's and OpenTelemetry's post-import hooks work like this one.
    code = """
import importlib.util, json
class Other:
    seen = []
    busy = False
    def find_spec(self, name, path=None, target=None):
        if self.busy or not name.startswith("sglang.srt"):
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        self.seen.append(name)
        return spec
sys.meta_path.insert(0, Other())
from sglang.srt.model_executor.model_runner import ModelRunner
print(json.dumps([
    Other.seen[-1], hasattr(ModelRunner.load_model, "__sglang_weight_exporter__")
]))
"""
    assert answer(python(sglang, code)) == ["sglang.srt.model_executor.model_runner", True]


def test_a_half_removed_package_is_silent_without_sglang(site: Path) -> None:
    shutil.rmtree(site / PACKAGE.name)
    assert answer(python(site, "print(1)")) == 1
    (site / PACKAGE.name).mkdir()
    assert answer(python(site, "print(2)")) == 2
    (site / PACKAGE.name / "bootstrap.py").write_text("raise ValueError")
    assert answer(python(site, "print(3)")) == 3


def test_a_half_removed_package_never_stops_sglang(sglang: Path) -> None:
    shutil.rmtree(sglang / PACKAGE.name / "hooks")
    result = python(sglang, "import sglang.srt.model_executor.model_runner as m; print(m.__name__)")
    assert result.returncode == 0
    assert result.stdout == "sglang.srt.model_executor.model_runner\n"
    assert result.stderr.startswith("sglang_weight_exporter: not active")
    assert len(result.stderr.splitlines()) == 1


def test_sglang_without_our_targets_is_left_alone(sglang: Path) -> None:
    module = sglang / "sglang" / "srt" / "model_executor" / "model_runner.py"
    module.write_text("class ModelRunner:\n    pass\n")
    code = "from sglang.srt.model_executor.model_runner import ModelRunner; print(1)"
    assert answer(python(sglang, code)) == 1
