# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The wheel beside SGLang: installing it changes no version of what is installed already."""

from __future__ import annotations

import re
import subprocess
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

#: SGLang's releases with their extra, where an engine needs one, and the day after each: with the
#: versions of then, as in an environment that nobody has touched since, and with those of today.
RELEASES = (
    ("0.4.6.post5[srt]", "2025-06-01"),
    ("0.5.4.post3", "2025-11-10"),
    ("0.5.6.post2", "2025-12-15"),
    ("0.5.9", "2026-03-01"),
    ("0.5.9[tracing]", "2026-03-01"),
    ("0.5.17", ""),
    ("0.5.23", ""),
    ("0.5.23[tracing]", ""),
)


#: What may come, beside OpenTelemetry's own packages: itself, and what their messages are made of.
NEW = {"sglang-weight-exporter", "protobuf"}


def uv(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    program = subprocess.check_output(["build/environment.sh", "uv"], cwd=PROJECT, text=True)
    return subprocess.run(
        [program.strip(), "pip", *map(str, arguments)],
        cwd=PROJECT,
        input=text,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = subprocess.check_output(["build/environment.sh", "uv"], cwd=PROJECT, text=True)
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [program.strip(), "build", "-q", "--wheel", "-o", directory, "."], cwd=PROJECT, check=True
    )
    (found,) = directory.glob("*.whl")
    return found


def environment(directory: Path, release: str, until: str) -> Path:
    """An interpreter that has what this release resolves to, as far as an installer can tell."""
    name, _, extra = release.partition("[")
    resolved = uv(
        *("compile", "-", "--no-annotate", "--no-header", "--python-version", "3.11"),
        *("--python-platform", "x86_64-manylinux_2_35", "--prerelease", "if-necessary"),
        *(("--exclude-newer", until) if until else ()),
        text=f"sglang{f'[{extra}' if extra else ''}=={name}\n",
    )
    assert resolved.returncode == 0, resolved.stderr
    venv.create(directory, symlinks=True)
    (site,) = directory.glob("lib/python3.*/site-packages")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", resolved.stdout, re.M))
    assert pins["sglang"] == name
    for package, version in pins.items():
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("uv\n")
    return directory / "bin" / "python"


@pytest.mark.release("distribution")
@pytest.mark.parametrize(("release", "until"), RELEASES)
def test_no_installed_version_changes(
    release: str, until: str, wheel: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "environment", release, until)
    told = uv("install", "--dry-run", "-p", python, wheel)
    assert told.returncode == 0, told.stderr
    assert re.search(r"^ \+ sglang-weight-exporter @", told.stderr, re.M), told.stderr
    assert not re.findall(r"^ [-~] .*$", told.stderr, re.M), told.stderr
    new = set(re.findall(r"^ \+ ([\w.-]+) ?[=@]", told.stderr, re.M))
    assert {name for name in new if not name.startswith("opentelemetry-")} <= NEW
