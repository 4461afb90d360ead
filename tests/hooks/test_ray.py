# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks in Ray: SGLang's SchedulerActor, in worker processes in which SGLang loads no plugins.

Ray starts those processes, so nothing but Python itself can put the hooks there. All ranks of a
host are children of one raylet, whatever engine they belong to.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import tiny_model
from engines import PREFIX, Installation, kill
from waiting import eventually, forget, watch

from sglang_weight_exporter.records.snapshot import Role, Snapshot

pytestmark = pytest.mark.release("launches")


@dataclass(frozen=True)
class Seen:
    """What ``ray_engines.py`` saw: first two ranks of one engine, then one of another."""

    processes: list[dict[str, Any]]
    loaded: list[Snapshot]
    success: bool
    updated: list[Snapshot]
    killed: list[Snapshot]

    def ranks(self, step: str) -> list[Snapshot]:
        """In the order in which they were made; AssertionError unless each made its own."""
        by_pid = {snapshot.pid: snapshot for snapshot in getattr(self, step)}
        return [by_pid[process["pid"]] for process in self.processes if process["pid"] in by_pid]


def run(installation: Installation, directory: Path, **variables: str) -> dict[str, Any]:
    """Run ``ray_engines.py`` to its end, and end whatever Ray leaves."""
    first, second = (tiny_model.write(directory / name, seed) for seed, name in enumerate("ab"))
    out, log = directory / "seen.json", directory / "log"
    environment = installation.environment(
        **{
            PREFIX + "RUNTIME_DIR": str(directory / "runtime"),
            PREFIX + "SERVE": "off",
            # Ranks on one NUMA node need their cores named.
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray would write one into the user's home.
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        },
        **variables,
    )
    script = Path(__file__).with_name("ray_engines.py")
    started: set[psutil.Process] = set()
    # Sockets lie in it, so its path must be short.
    ray_directory = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")
    with ray_directory as temporary, watch(log).open("wb") as output:
        main = psutil.Popen(
            [installation.python, script, out, temporary, first, second],
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:

            def ended() -> bool:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.update(main.children(recursive=True))
                return main.poll() is not None

            eventually(ended, every=0.5, what=f"the end of {script.name}")
        finally:
            kill([main, *started])
            main.wait()
            forget(log)
    assert main.returncode == 0, log.read_text(errors="replace")[-6000:]
    seen: dict[str, Any] = json.loads(out.read_text())
    return seen


@pytest.fixture(scope="module")
def seen(newest: Installation) -> Seen:
    if not list(newest.python.parent.parent.glob("lib/python3.*/site-packages/ray")):
        reason = "needs the package ray beside SGLang; `make test` installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # A raylet gives up when one of its helpers takes 20 seconds to start, which others' load does.
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            result = run(newest, Path(directory))
        if "no ray" not in result:
            return msgspec.convert(result, Seen)
    pytest.skip(result["no ray"])


def target(snapshot: Snapshot) -> Role:
    (role,) = snapshot.roles
    return role


def test_every_actor_is_a_rank(seen: Seen) -> None:
    assert [process["plugins"] for process in seen.processes] == [False] * 3
    with tempfile.TemporaryDirectory() as directory:
        header = tiny_model.safetensors_header(tiny_model.write(Path(directory) / "a"))
    assert len(seen.loaded) == len(seen.processes) == 3
    for snapshot in seen.ranks("loaded"):
        parameters = [part for part in target(snapshot).weights or () if part.kind == "parameter"]
        assert sum(part.nbytes for part in parameters) == sum(size for _, size in header.values())
        assert target(snapshot).loaded_at is not None
        assert snapshot.hook_errors == {}
        states = {hook.target: hook.status for hook in snapshot.hooks}
        assert "failed" not in states.values()
        assert states["load_model"] == states["update_weights_from_disk"] == "installed"


def test_engines_under_one_raylet_are_told_apart(seen: Seen) -> None:
    assert len({process["parent"] for process in seen.processes}) == 1
    first, second, other = seen.ranks("loaded")
    assert [rank.ranks.dp for rank in (first, second, other)] == [0, 1, 0]
    assert first.engine.name == second.engine.name
    assert first.engine.instance == second.engine.instance
    assert other.engine.name != first.engine.name
    assert other.engine.instance != first.engine.instance


def test_an_update_is_counted_where_it_was(seen: Seen) -> None:
    assert seen.success
    counts = [target(rank).updates["disk"].updates for rank in seen.ranks("updated")]
    assert counts == [0, 1, 0]


def test_a_killed_actor_is_gone(seen: Seen) -> None:
    assert seen.ranks("killed") == seen.ranks("updated")[1:]
    assert len(seen.killed) == 2
