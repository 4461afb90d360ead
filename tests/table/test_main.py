# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: what they import, make and print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from published import ROWS, Command, PublishedRank

from sglang_weight_exporter import cli

#: A command is a module that adds arguments.
COMMANDS = {
    path.stem
    for path in Path(cli.__file__).parent.glob("*.py")
    if "\ndef add_arguments(" in path.read_text(encoding="utf-8")
}
#: What turns the title of a terminal, the colour of its text or the order of its letters.
HOSTILE = "w\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202etxt"


def imported(*arguments: str) -> set[str]:
    """Modules that a command line imports."""
    program = (
        "import sys\nfrom sglang_weight_exporter.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def test_help_imports_no_command_and_no_library() -> None:
    modules = imported("--help")
    assert not modules & {"msgspec", "uvicorn", "asyncio", "numpy", "http.client", "pynvml"}
    assert not {name for name in modules if name.startswith("sglang_weight_exporter.cli.")} - {
        "sglang_weight_exporter.cli.terminal"
    }


def test_a_command_imports_no_other() -> None:
    modules = imported("dashboard", "--rules")
    assert "sglang_weight_exporter.cli.dashboard" in modules
    assert not modules & {f"sglang_weight_exporter.cli.{name}" for name in ("table", "serve")}


def test_help_lists_every_command_and_each_explains_itself(command: Command) -> None:
    listed = command("--help").stdout.decode()
    assert set(re.findall(r"^    (\w+)\s", listed, re.MULTILINE)) == COMMANDS
    for name in COMMANDS:
        done = command(name, "--help")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) > 20


@pytest.mark.parametrize("arguments", [("status",), ("table",), ("snapshot",), ("advise",)])
def test_a_directory_that_is_mistyped_is_not_made(
    command: Command, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    mistyped = tmp_path / "no" / "such"
    done = command(*arguments, "--runtime-dir", mistyped)
    assert done.returncode != 0
    assert str(mistyped) in (done.stdout + done.stderr).decode()
    assert not mistyped.parent.exists()


@pytest.mark.parametrize("arguments", [("table",), ("table", "--by", "layer"), ("status",)])
def test_names_cannot_command_a_terminal(
    rank: PublishedRank, command: Command, arguments: tuple[str, ...]
) -> None:
    rank.engine = msgspec.structs.replace(rank.engine, model_name=HOSTILE)
    rank.publish([ROWS[0]._replace(name=HOSTILE)], weight_version=HOSTILE)
    done = command(*arguments)
    assert done.returncode in {0, 1}, done.stderr
    printed = done.stdout.decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)
    assert r"w\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202etxt" in printed


def test_a_name_cannot_begin_a_line(rank: PublishedRank, command: Command) -> None:
    forged = "w\n! engine 30000: hook f failed"
    rank.engine = msgspec.structs.replace(rank.engine, model_name=forged)
    rank.publish([ROWS[0]._replace(name=forged)], weight_version=forged)
    for arguments in (("table",), ("status",)):
        lines = command(*arguments).stdout.decode().splitlines()
        assert not [line for line in lines if line.startswith("! engine 30000: hook")]


def test_what_is_asked_for_by_a_program_is_untouched(rank: PublishedRank, command: Command) -> None:
    rank.publish([ROWS[0]._replace(name=HOSTILE)])
    (table,) = msgspec.json.decode(command("table", "--format", "json").stdout)["tables"]
    assert table["tensors"][0]["name"] == HOSTILE


def test_a_terminal_that_knows_no_unicode_gets_escapes(
    rank: PublishedRank, command: Command
) -> None:
    rank.publish([ROWS[0]._replace(name="é→")])
    done = command("table", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert rb"\xe9\u2192" in done.stdout
    assert done.stdout.isascii()
