# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``install``: the hooks in an interpreter that pip cannot reach.

Three things go into its site-packages, and nothing of its own is changed: the ``.pth`` and the
``.start`` that pip would put there, and a directory with a link to this package. The directory is
on the module path behind everything else and holds nothing but the link, so no other package of
this environment is found from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = "sglang_weight_exporter"
PTH, START, LINKS = f"{_NAME}.pth", f"{_NAME}.start", f"{_NAME}.path"

#: Runs in the other interpreter, which may be older than ours: plain and without our package.
_QUESTIONS = """
import importlib.util, json, sys, sysconfig
try:
    from importlib.metadata import version
    sglang = version("sglang")
except Exception:
    sglang = None
needed = {"msgspec": "msgspec", "prometheus_client": "prometheus-client", "uvicorn": "uvicorn",
          "pynvml": "nvidia-ml-py"}
print(json.dumps({
    "site": sysconfig.get_path("purelib"),
    "prefix": sys.prefix,
    "virtual": sys.prefix != sys.base_prefix,
    "version": list(sys.version_info[:3]),
    "sglang": sglang,
    "missing": [name for module, name in needed.items() if not importlib.util.find_spec(module)],
    "traces": importlib.util.find_spec("opentelemetry") is not None
        and importlib.util.find_spec("opentelemetry.sdk") is not None,
}))
"""


#: How long an interpreter may take to start on a disk that is slow.
_PATIENCE_SECONDS = 120.0


class InstallError(Exception):
    """Nothing was done, or not all of it; the message says why and what to do."""


@dataclass(frozen=True)
class Interpreter:
    """Another Python, by its own account."""

    python: str
    site: Path
    prefix: str
    virtual: bool
    version: tuple[int, int, int]
    sglang: str | None
    missing: tuple[str, ...]
    traces: bool

    @classmethod
    def ask(cls, python: str) -> Interpreter:
        """Start it, isolated from this environment. Raises :class:`InstallError`."""
        if os.sep in python:  # Not resolved: a virtual environment's is a link to another one.
            python = str(Path(python).absolute())
        try:
            answer = subprocess.run(
                [python, "-I", "-c", _QUESTIONS],
                env={**os.environ, "SGLANG_WEIGHT_EXPORTER_DISABLED": "1"},
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout
            facts: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise InstallError(
                f"{python} could not be started as a Python ({error}), so nothing was changed. "
                f"Give the path of an interpreter, such as /opt/venv/bin/python."
            ) from error
        return cls(
            python=python,
            site=Path(facts["site"]),
            prefix=facts["prefix"],
            virtual=facts["virtual"],
            version=tuple(facts["version"]),
            sglang=facts["sglang"],
            missing=tuple(facts["missing"]),
            traces=facts["traces"],
        )

    def describe(self) -> str:
        number = ".".join(map(str, self.version))
        where = "a virtual environment" if self.virtual else "not a virtual environment"
        return f"Python {number} in {self.prefix} ({where})"

    @property
    def has_package(self) -> bool:
        """Whether pip has installed the package itself there."""
        return (self.site / _NAME).exists() or any(self.site.glob(f"{_NAME}-*.dist-info"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Put the hooks into the site-packages of another interpreter, where pip cannot be used: "
        "two files that Python reads when it starts, and a link to this package, which has to "
        "stay where it is. Where pip works, `PYTHON -m pip install sglang-weight-exporter` is "
        "better."
    )
    add_interpreter(parser, install)


def add_interpreter(parser: argparse.ArgumentParser, change: Callable[[Interpreter], None]) -> None:
    """``--python``, and a command that changes it."""
    parser.add_argument(
        "--python", required=True, metavar="PATH", help="the interpreter that runs SGLang"
    )

    def run(arguments: argparse.Namespace) -> int:
        try:
            change(Interpreter.ask(arguments.python))
        except InstallError as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    parser.set_defaults(run=run)


def install(interpreter: Interpreter) -> None:
    """Put the files there and see whether they work. Raises :class:`InstallError`."""
    site = interpreter.site
    print(f"{interpreter.describe()}, site-packages {site}")
    if interpreter.has_package:
        raise InstallError(
            f"The package itself is installed in {site} already, so nothing was changed: its hooks "
            f"are there."
        )
    if interpreter.version < (3, 10):
        raise InstallError("The package needs Python 3.10 or later, so nothing was changed.")
    if interpreter.missing:
        raise InstallError(
            f"That interpreter lacks {', '.join(interpreter.missing)}, which the package needs "
            f"and SGLang brings along, so nothing was changed. Install them there, or name the "
            f"interpreter that runs SGLang."
        )
    made = []
    try:
        links = site / LINKS
        links.mkdir(parents=True, exist_ok=True)
        made.append(links)
        link = links / _NAME
        link.unlink(missing_ok=True)
        link.symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
        for name, content in _start_files().items():
            path = site / name
            path.write_text(content, encoding="utf-8")
            made.append(path)
    except OSError as error:
        remove(made)
        raise InstallError(refused(interpreter, error)) from error
    problem = _verify(interpreter)
    if problem:
        remove(made)
        raise InstallError(
            f"The files were put there and did not work, so they were taken out again: {problem}"
        )
    for path in made:
        print(f"  wrote {path}")
    print(f"  linked to {Path(__file__).resolve().parents[1]}, which has to stay there")
    if interpreter.sglang is None:
        print("SGLang is not installed there. Once it is, it will be hooked.")
    else:
        print(f"SGLang {interpreter.sglang} is hooked from its next start on.")
    if not interpreter.traces:
        print(
            "OpenTelemetry's SDK is not installed there, so spans cannot be exported. "
            "The metrics endpoint needs none."
        )


def _start_files() -> dict[str, str]:
    package = Path(__file__).resolve().parents[1]
    files = {}
    for name in (PTH, START):
        # A wheel has put them beside the package; a checkout keeps them in `autoload`.
        beside = package.parent / name
        path = beside if beside.exists() else package.parent / "autoload" / name
        if not path.exists():
            raise InstallError(
                f"{beside} is missing, so nothing was changed: this installation of "
                f"sglang-weight-exporter is damaged. Install it again."
            )
        files[name] = path.read_text(encoding="utf-8")
    # First the path, relative to site-packages, then the line that imports from it.
    files[PTH] = f"{LINKS}\n{files[PTH]}"
    return files


def _verify(interpreter: Interpreter) -> str:
    """Start it as an engine would, and an exporter that is asked for metrics; what is wrong, or
    nothing."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}
        and not name.startswith(("SGLANG_WEIGHT_EXPORTER_", "OTEL_"))
    }
    check = (
        "import sys; assert any(type(finder).__name__ == 'PostImportHook' "
        "for finder in sys.meta_path), 'the start-up files had no effect'"
    )
    try:
        ran = subprocess.run(
            [interpreter.python, "-c", check],
            env=environ,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
        )
        if ran.returncode != 0:
            return ran.stderr.strip().rpartition("\n")[2]
        with tempfile.TemporaryDirectory(prefix="sglang-weight-exporter-install-") as directory:
            return _serve_once(interpreter, environ, directory)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def _serve_once(interpreter: Interpreter, environ: dict[str, str], directory: str) -> str:
    """Start an exporter process there and read one scrape; what is wrong, or nothing. Raises
    ``OSError``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--runtime-dir", directory, "--address", "127.0.0.1", "--port", str(port)]
    log = Path(directory, "log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [interpreter.python, "-m", _NAME, "serve", *flags],
            env=environ,
            cwd="/",
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                    if b"sglang_weight_exporter_ranks 0" in page.read():
                        return ""
            except OSError:
                time.sleep(0.1)
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        return f"an exporter process serves no metrics there ({said or 'it said nothing'})"
    finally:
        process.kill()
        process.wait()


def remove(paths: list[Path], *, strict: bool = False) -> None:
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                (path / _NAME).unlink(missing_ok=True)  # The link, never what it points to.
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            if strict:
                raise


def refused(interpreter: Interpreter, error: OSError) -> str:
    return (
        f"{error.filename or interpreter.site} cannot be changed ({error.strerror}), so nothing "
        f"was. Run this as the user who owns {interpreter.site}, or start the engine with "
        f"`sglang-weight-exporter run -- …`, which needs no write access."
    )
