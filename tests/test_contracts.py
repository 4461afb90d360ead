# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The import contracts of pyproject.toml hold, and each of them can fail; no file and no function
is longer than can be read at once."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sglang_weight_exporter"

#: The contract that fails, the module that gets an import, and the import.
PLANTED = [
    ("In the engine data flows one way", "capture/object_tensors.py", f"{PACKAGE}.runners.pools"),
    ("In the engine data flows one way", "ledger/updates.py", f"{PACKAGE}.publisher.publisher"),
    ("In the engine data flows one way", "store/files.py", f"{PACKAGE}.capture.object_tensors"),
    ("Beside the engine data flows one way", "store/reader.py", f"{PACKAGE}.export.views"),
    ("Beside the engine data flows one way", "export/views.py", f"{PACKAGE}.cli.flags"),
    ("The bootstrap imports os and sys", "bootstrap.py", "logging"),
    ("The bootstrap imports os and sys", "bootstrap.py", f"{PACKAGE}.rank"),
    ("The ledger is pure", "ledger/updates.py", "torch"),
    ("The ledger is pure", "ledger/updates.py", f"{PACKAGE}.store.files"),
    ("Capturing writes nothing", "runners/inspector.py", f"{PACKAGE}.store.rank"),
    ("Publishing and storing know no tensor", "publisher/publisher.py", "torch"),
    ("Publishing and storing know no tensor", "store/rank.py", "prometheus_client"),
    ("The engine process imports no exporter", "hooks/translator.py", f"{PACKAGE}.export.views"),
    ("The engine process imports no exporter", "rank.py", "opentelemetry"),
    ("The exporter process needs neither", "export/views.py", "torch"),
    ("The exporter process needs neither", "export/process.py", f"{PACKAGE}.runners.identity"),
    ("Commands need neither", "cli/status.py", f"{PACKAGE}.capture.object_tensors"),
    ("The data model imports no room", "records/weights.py", f"{PACKAGE}.store.files"),
    ("A fingerprint's definition", "fingerprint/definition.py", "torch"),
    ("A fingerprint's definition", "fingerprint/__init__.py", f"{PACKAGE}.fingerprint.tensors"),
]

#: Lines that a file and a function may have, and what may have more.
LONGEST_FILE, LONGEST_FUNCTION = 450, 60
LONG = {
    "export/otlp/spans.py:event_spans": "the attributes of one span, in their order",
    "weight_table_events.py:decode_table": "one pass over a table's chunks",
}

#: Imports that do not run when the module is imported.
LATE = {
    "for type checking": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n",
    "in a function": "def late() -> None:\n    import {}\n",
}


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=checkout,
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__py*"))
    return tmp_path


def test_the_contracts_hold(checkout: Path) -> None:
    ran = lint(checkout)
    assert ran.returncode == 0, ran.stdout
    assert "0 broken" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("contract", "module", "planted"), PLANTED)
def test_a_planted_import_is_found(
    checkout: Path, contract: str, module: str, planted: str
) -> None:
    path = checkout / PACKAGE / module
    path.write_text(f"{path.read_text()}\nimport {planted}  # noqa\n")
    ran = lint(checkout)
    assert ran.returncode == 1, ran.stdout
    lines = [line for line in ran.stdout.splitlines() if line.startswith(contract)]
    assert "BROKEN" in lines[0]


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_an_import_that_runs_late_or_never_is_found(checkout: Path, late: str) -> None:
    path = checkout / PACKAGE / "capture" / "object_tensors.py"
    path.write_text(f"{path.read_text()}\n{late.format(f'{PACKAGE}.hooks.translator')}")
    ran = lint(checkout)
    assert ran.returncode == 1, ran.stdout


def test_a_new_room_is_in_no_order_until_somebody_puts_it_there(checkout: Path) -> None:
    (checkout / PACKAGE / "attic.py").write_text("")
    ran = lint(checkout)
    assert ran.returncode == 1, ran.stdout
    assert "attic" in ran.stdout


def test_no_file_and_no_function_is_too_long() -> None:
    """Those in :data:`LONG` are, each for a reason."""
    found = set()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        name, text = path.relative_to(ROOT / PACKAGE).as_posix(), path.read_text()
        if text.count("\n") > LONGEST_FILE:
            found.add(name)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION:
                found.add(f"{name}:{node.name}")
    assert found - LONG.keys() == set()


def test_capture_names_no_module_of_sglangs() -> None:
    """What knows SGLang's classes is in ``runners``."""
    for path in (ROOT / PACKAGE / "capture").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("sglang."), f"{path.name}:{node.lineno}"
