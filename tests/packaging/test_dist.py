# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a release consists of: `make dist`, run in two copies of this checkout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.release("distribution")

PROJECT = Path(__file__).parents[2]
COMMITTED_AT = 1_700_000_000


def run(*command: str, directory: Path, **variables: str) -> str:
    """Standard output; AssertionError with all that was printed if the command fails."""
    unset = ("SOURCE_DATE_EPOCH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        command, cwd=directory, env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def made_in_a_copy(directory: Path, *, modified_at: int, umask: int) -> Path:
    """`make dist` in a copy of this checkout, as it is now, with one commit."""
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", directory=PROJECT)
    previous = os.umask(umask)
    try:
        for name in filter(None, listed.split("\0")):
            if (PROJECT / name).is_file():
                copy = directory / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PROJECT / name, copy)
                copy.chmod((0o777 if os.access(PROJECT / name, os.X_OK) else 0o666) & ~umask)
                os.utime(copy, (modified_at, modified_at))
        date = {f"GIT_{who}_DATE": f"{COMMITTED_AT} +0000" for who in ("AUTHOR", "COMMITTER")}
        somebody = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        run("git", "init", "-q", directory=directory)
        run("git", "add", "-A", directory=directory)
        run("git", *somebody, "commit", "-qm", "Everything", directory=directory, **date)
        run("make", "dist", directory=directory)
    finally:
        os.umask(previous)
    return directory


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("copies")
    return (
        made_in_a_copy(directory / "first", modified_at=1_500_000_000, umask=0o022),
        made_in_a_copy(directory / "second" / "deeper", modified_at=1_600_000_000, umask=0o077),
    )


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def test_the_same_sources_give_the_same_files(copies: tuple[Path, Path]) -> None:
    for pattern in ("*.whl", "*.tar.gz"):
        first, second = (only(copy / "dist", pattern) for copy in copies)
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes(), pattern
    # The commit's time, to the two seconds that a zip file can say.
    with zipfile.ZipFile(only(copies[0] / "dist", "*.whl")) as wheel:
        assert {entry.date_time for entry in wheel.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_checksums_are_those_of_all_files(copies: tuple[Path, Path]) -> None:
    dist = copies[0] / "dist"
    lines = (dist / "SHA256SUMS").read_text().splitlines()
    said = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert said == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("*.whl", "*.tar.gz", "*.cdx.json")
        for path in dist.glob(pattern)
    }
    assert len(said) == 3


def test_wheel_and_sdist_have_what_belongs_into_them(copies: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(only(copies[0] / "dist", "*.whl")) as wheel:
        names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {
        "sglang_weight_exporter",
        "sglang_weight_exporter.pth",
        "sglang_weight_exporter.start",
    }
    modules = {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "sglang_weight_exporter").rglob("*.py")
    }
    assert names >= modules | {
        "sglang_weight_exporter/py.typed",
        "sglang_weight_exporter/dashboards/sglang-fleet.json",
    }
    archive = only(copies[0] / "dist", "*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
        changelog = sdist.extractfile(f"{archive.name.removesuffix('.tar.gz')}/CHANGELOG.md")
        assert changelog is not None
        releases = re.findall(r"^## \[([\d.]+)\]", changelog.read().decode(), re.MULTILINE)
    assert archive.name == f"sglang_weight_exporter-{releases[0]}.tar.gz"
    assert packed >= modules | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    assert not [name for name in packed if name.startswith(("tests/", ".venv/"))]


# --- what comes with it at run time ---------------------------------------------------------------


def documented(heading: str) -> dict[str, tuple[str, str]]:
    """Package → second and third column of the table below this heading of the document."""
    _, _, below = (PROJECT / "docs" / "dependencies.md").read_text().partition(f"# {heading}\n")
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (.+) \| (.+) \|$", below.partition("\n#")[0], re.M)
    return {name: (second, third) for name, second, third in rows if name != "package"}


def installed(copy: Path) -> dict[str, Distribution]:
    """What the wheel was resolved to, without the wheel itself, by normalised name."""
    site = only(copy / ".venv" / "dist-runtime" / "lib", "python*/site-packages")
    found = {canonicalize_name(each.name): each for each in distributions(path=[str(site)])}
    del found[canonicalize_name("sglang-weight-exporter")]
    return {str(name): each for name, each in found.items()}


def requirements(lines: Iterable[str] | None, *, extras: bool = False) -> set[str]:
    """Names that are asked for without an extra, or only with one."""
    names = [re.match(r"[\w.-]+", line) for line in lines or () if ("extra ==" in line) == extras]
    return {canonicalize_name(name.group()) for name in names if name}


def test_each_runtime_dependency_has_its_reason_in_the_document(copies: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(only(copies[0] / "dist", "*.whl")) as wheel:
        # Its own, and not those of the directory that hooks start from.
        (name,) = (
            name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        )
        asked = re.findall(r"^Requires-Dist: (.+)$", wheel.read(name).decode(), re.M)
    direct, optional = documented("Dependencies"), documented("Extras")
    assert set(direct) == requirements(asked)
    assert set(optional) == requirements(asked, extras=True)
    brought = documented("What they bring")
    packages = installed(copies[0])
    assert set(brought) == set(packages) - set(direct) - set(optional)
    for name, (through, _) in brought.items():
        assert name in requirements(packages[through].requires), f"{name} through {through}"


#: What a licence is called by packages that name none of SPDX's.
FREE_FORMS = {
    "BSD-3-Clause": r"\bBSD",
    "Apache-2.0": r"\bApache",
    "MIT": r"\bMIT\b",
    "MPL-2.0": r"\bMPL|Mozilla Public",
    "PSF-2.0": r"\bPSF|Python Software Foundation",
}


def test_licences_are_those_that_the_packages_declare(copies: tuple[Path, Path]) -> None:
    packages = installed(copies[0])
    said = documented("Dependencies") | documented("Extras") | documented("What they bring")
    for name, (_, licence) in said.items():
        metadata = packages[name].metadata
        expressions = metadata.get_all("License-Expression", [])
        if expressions:
            assert [licence] == expressions, name
        else:
            declared = metadata.get_all("License", []) + [
                each for each in metadata.get_all("Classifier", []) if each.startswith("License ::")
            ]
            assert re.search(FREE_FORMS[licence], "\n".join(declared)), (name, declared)


def test_the_sbom_lists_what_was_resolved(copies: tuple[Path, Path]) -> None:
    sbom = json.loads(only(copies[0] / "dist", "*.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    subject = sbom["metadata"]["component"]
    wheel = only(copies[0] / "dist", "*.whl").name
    assert wheel.startswith(f"{subject['name'].replace('-', '_')}-{subject['version']}-")
    listed = {
        canonicalize_name(component["name"]): component["version"]
        for component in sbom["components"]
    }
    assert listed == {name: each.version for name, each in installed(copies[0]).items()}
    graph = {node["ref"]: set(node.get("dependsOn", ())) for node in sbom["dependencies"]}
    assert len(graph[subject["bom-ref"]]) == len(documented("Dependencies") | documented("Extras"))


def test_no_dependency_has_a_known_vulnerability(copies: tuple[Path, Path]) -> None:
    tool = copies[0] / ".venv" / "dist-tools" / "bin" / "pip-audit"
    packages = installed(copies[0])
    site = only(copies[0] / ".venv" / "dist-runtime" / "lib", "python*/site-packages")
    done = subprocess.run(
        [tool, "--path", site, "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
    )
    if not done.stdout and re.search(r"Connect(ion|Timeout)|ReadTimeout", done.stderr):
        pytest.skip("the vulnerability service cannot be reached, so nothing is known")
    assert done.stdout, done.stderr
    audited = {
        canonicalize_name(each["name"]): each for each in json.loads(done.stdout)["dependencies"]
    }
    # Our own version is published after this.
    audited.pop(canonicalize_name("sglang-weight-exporter"))
    assert set(audited) == set(packages)
    if all("skip_reason" in each for each in audited.values()):
        # A mirror of the index that has packages and no more.
        pytest.skip("the vulnerability service knows none of the packages, so nothing is known")
    found = {name: each.get("vulns", each.get("skip_reason")) for name, each in audited.items()}
    assert not {name: what for name, what in found.items() if what}
