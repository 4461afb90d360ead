# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say exists, exists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.settings import PREFIX, Settings

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
DOCUMENTS = [
    *sorted(PROJECT.glob("*.md")),
    *(
        path
        for room in ("docs", "deploy", "demo")
        for path in sorted((PROJECT / room).rglob("*.md"))
    ),
]


def test_reference_pages_say_what_the_code_says() -> None:
    generate = [sys.executable, str(PROJECT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(generate, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_lean_is_what_panels_and_rules_ask_for() -> None:
    text = (PROJECT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = text.split("## Who asks for what")[1].split("*identity*")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    metrics = {row[0].strip("`"): row[1:] for row in rows if row[:1] and row[0].startswith("`")}
    assert len(metrics) == len(INSTRUMENTS)
    asked = {name for name, row in metrics.items() if any(row[1:])}
    assert asked == {name for name, row in metrics.items() if ", in " not in row[0]}


def outside_of_code(page: Path) -> str:
    """A document's text; what is in fences and backquotes is no heading and no link."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*\]\([^`\n]*`", "", text)


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of the headings: a second one of the same words gets -1, and so on."""
    found: dict[str, int] = {}
    anchors = set()
    for title in re.findall(r"^#+ (.+)$", outside_of_code(page), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = outside_of_code(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    targets += re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert PROJECT in linked.resolve().parents, (
            f"{page.name} links out of the project: {target}"
        )
        if anchor and linked.suffix == ".md":
            assert anchor in anchors_of(linked), f"{page.name} links to {target}"


def test_the_changelog_is_by_release() -> None:
    """Unreleased first, then releases with their day, the newest first, which is this version."""
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    dated = []
    for release in releases:
        found = re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", release)
        assert found, release
        *version, day = found.groups()
        dated.append((tuple(map(int, version)), date.fromisoformat(day)))
    versions = [version for version, _ in dated]
    assert versions == sorted(set(versions), reverse=True)
    assert [day for _, day in dated] == sorted((day for _, day in dated), reverse=True)
    assert __version__ == ".".join(map(str, versions[0]))
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_suites_and_parts_of_the_release_are_where_they_are_described() -> None:
    """`build/timed.sh` takes the budgets from there."""
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    (parts,) = re.findall(r"^PARTS := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    suites = re.findall(r"\$\(call timed,([a-z]+)\)", makefile)
    page = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \| \d+ s \|", page, re.MULTILINE)
    named = re.findall(r"[a-z]+", re.sub(r"\$\(\w+ \$\(.*?\),(\w+)\)", r"\1", parts))
    assert described == [*suites, *named]
    tests = (path.read_text() for path in (PROJECT / "tests").rglob("test_*.py"))
    marked = {part for text in tests for part in re.findall(r'mark\.release\("(\w+)"\)', text)}
    assert marked <= set(named)


def test_each_dependency_has_its_reason_in_the_document() -> None:
    """What they bring along, and the licences, are compared with a resolved environment in the part
    `distribution` of the release."""
    document = (PROJECT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    direct = document.partition("## What they bring\n")[0]
    rows = re.findall(r"^\| ([a-z0-9-]+) \| .+ \| .+ \|$", direct, re.MULTILINE)
    asked = metadata.requires("sglang-weight-exporter")
    assert asked is not None
    names = {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in asked}
    assert set(rows) - {"package"} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_metrics_have_their_real_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    settings = {PREFIX + setting.name.upper() for setting in fields(Settings)}
    for name in re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", text):
        assert name in settings, f"{page.name} names {name}"
    families = {instrument.name for instrument in INSTRUMENTS}
    # What is recorded has a name of its own: `engine:sglang_...:max`.
    metrics = r"(?<!:)\bsglang_(?:weight|kv|lora|gpu)_[a-z_]*(?:bytes|seconds|total|tensors)\b"
    for name in re.findall(metrics, text):
        assert name.removesuffix("_total") in families, f"{page.name} names {name}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(PROJECT)))
def test_commands_and_flags_exist(page: Path) -> None:
    """Of this program and of the Makefile, wherever a document writes them as code."""
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"^ *```.*?\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M))
    makefile = (PROJECT / "Makefile").read_text()
    for piece in code:
        for line in piece.splitlines():
            for target in re.findall(r"(?:^|\$ |&& )make ([a-z][\w-]*)(?![\w=])", line):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
            for command, rest in re.findall(r"\bsglang-weight-exporter ([a-z]+)\b([^|&#]*)", line):
                said = help_of(command)
                for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", rest.partition(" -- ")[0]):
                    assert flag in said, f"{command} {flag}"


@cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", command, "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
