# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The image, built without a registry, and its container beside ranks in another root directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import Builder, Container, Image, needs_root_and_debian
from engines import Scrape
from ports import free_port
from ranks import Rank, rows
from waiting import eventually

from sglang_weight_exporter.settings import DEFAULT_PORT, PREFIX

pytestmark = pytest.mark.release("image")

ROOT = Path(__file__).parents[2]
PARTS = ROOT / "deploy" / "kustomize" / "workers" / "parts.yaml"
MOUNT = "/run/sglang-weight-exporter"
ROWS = 600
#: Of no use to a Python program, and of much to somebody who broke into one.
SHELLS = ("bin/sh", "bin/dash", "bin/bash", "usr/bin/perl", "usr/bin/apt", "usr/bin/dpkg")


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    """With two bases: one to build on, and one with Python and neither pip nor a shell."""
    needs_root_and_debian("mmdebstrap", "buildah")
    # Not in pytest's directories, which are kept, and closed to other users.
    directory = Path(tempfile.mkdtemp(prefix="images-"))
    directory.chmod(0o711)
    try:
        build = Builder(directory)
        build.debian("localhost/debian-python", "python3", "python3-pip")
        container = build("from", "--pull-never", "localhost/debian-python")
        root = Path(build("mount", container))
        for name in SHELLS:
            (root / name).unlink(missing_ok=True)
        shutil.rmtree(root / "usr/lib/python3/dist-packages")  # pip
        build("commit", "--quiet", "--rm", container, "localhost/python-alone")
        yield build
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def image(builder: Builder) -> Image:
    bases = {"BASE": "localhost/debian-python", "RUNTIME": "localhost/python-alone"}
    return builder.build(ROOT, "localhost/sglang-weight-exporter", **bases)


@pytest.fixture
def volume() -> Iterator[Path]:
    """As an emptyDir is: it belongs to root, and all may write."""
    directory = Path(tempfile.mkdtemp(prefix="volume-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def live(volume: Path, user: int, here: Connection) -> None:
    """A rank of another user than the test's, in the test's root directory."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    held = Rank(volume / "store")  # It ends with this variable.
    held.load(rows(ROWS))
    here.send("loaded")
    here.recv()  # Until it is killed.


def rank(volume: Path, user: int) -> multiprocessing.process.BaseProcess:
    """Forked, because another user need not be able to read this Python."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=live, args=(volume, user, there), daemon=True)
    process.start()
    there.close()  # So that a rank that fails is seen.
    assert here.recv() == "loaded"
    return process


def sidecar(image: Image, volume: Path, log: Path, user: int) -> tuple[Container, str]:
    """The sidecar as the component describes it, on a port of its own, and where it answers."""
    port = free_port()
    described = part("initContainers", "weight-exporter")
    environment = {each["name"]: each["value"] for each in described["env"]}
    container = Container(
        image,
        log,
        command=described["command"],
        user=f"{user}:{user}",
        environment={**environment, PREFIX + "PORT": str(port), PREFIX + "ADDRESS": "127.0.0.1"},
        mounts={MOUNT: volume},
    )
    return container, f"http://127.0.0.1:{port}/metrics"


def part(kind: str, name: str) -> dict[str, Any]:
    """A container that the Kustomize component adds."""
    template = yaml.safe_load(PARTS.read_text())["template"]
    (found,) = (each for each in template["spec"][kind] if each["name"] == name)
    described: dict[str, Any] = found
    return described


def test_it_is_small_and_says_how_it_is_run(image: Image) -> None:
    config = image.config
    assert config["User"] == "1000:1000"
    assert config["ExposedPorts"] == {f"{DEFAULT_PORT}/tcp": {}}
    package = image.root / "opt" / "sglang-weight-exporter"
    ours = sum(path.lstat().st_size for path in package.rglob("*"))
    assert ours < 50_000_000  # Half of it is grpcio.
    assert not [name for name in SHELLS if (image.root / name).exists()]
    # Neither what it was built from nor what it was built with.
    assert not (image.root / "source").exists()
    assert not [path for path in package.glob("*") if path.name.split("-")[0] in {"pip", "torch"}]


# As the component runs it, as the user of the image, and as one that no file names.
@pytest.mark.parametrize("user", [0, 1000, 54321])
def test_it_serves_ranks_with_which_it_shares_only_the_volume(
    image: Image, volume: Path, tmp_path: Path, user: int
) -> None:
    container, address = sidecar(image, volume, tmp_path / "log", user)
    container.start()
    try:

        def ranks() -> int:
            return len(Scrape.of(address).series("sglang_weight_regions", role="target"))

        eventually(lambda: Scrape.of(address), what=f"{address} answers")
        assert ranks() == 0
        engine = rank(volume, user)
        eventually(lambda: ranks() == 1, what="the rank is served")
        # Another program in the sidecar, as `kubectl exec` starts one.
        command = ["python3", "-m", "sglang_weight_exporter", "table", "--format", "jsonl"]
        beside = replace(container, log=tmp_path / "table", command=command, process=None)
        assert beside.start().wait() == 0, beside.log.read_text()
        names = [json.loads(line)["name"] for line in beside.log.read_text().splitlines()]
        assert len(names) == ROWS

        engine.kill()
        eventually(lambda: ranks() == 0, what="the rank is gone, which only its lock can tell")
        # The first process of a container gets no signal that it has not asked for.
        os.kill(container.pid(), signal.SIGTERM)
        assert container.wait() == 0, container.log.read_text()
    finally:
        container.end()


def test_another_user_s_directory_is_refused_with_a_reason(
    image: Image, volume: Path, tmp_path: Path
) -> None:
    rank(volume, 1000)
    container, _ = sidecar(image, volume, tmp_path / "log", 1001)
    assert container.start().wait() != 0
    said = container.log.read_text()
    assert "belongs to" in said
    assert "Traceback" not in said


def test_the_hooks_that_it_copies_load_where_there_is_no_such_package(
    builder: Builder, image: Image, volume: Path, tmp_path: Path
) -> None:
    described = part("initContainers", "weight-hooks")
    for _ in range(2):  # An init container may run again in the same pod.
        copying = Container(
            image,
            tmp_path / "copying",
            command=described["command"],
            user="0:0",
            mounts={MOUNT: volume},
        )
        assert copying.start().wait() == 0, copying.log.read_text()
    # SGLang's image knows nothing of the package; nor does the base.
    look = "import sys; print(*(type(finder).__name__ for finder in sys.meta_path))"
    engine = {each["name"]: each["value"] for each in part("containers", "engine")["env"]}
    looking = Container(
        builder.unpacked("localhost/debian-python"),
        tmp_path / "looking",
        command=["python3", "-c", look],
        user="0:0",
        environment=engine,
        mounts={MOUNT: volume},
    )
    assert looking.start().wait() == 0, looking.log.read_text()
    assert "PostImportHook" in looking.log.read_text()
