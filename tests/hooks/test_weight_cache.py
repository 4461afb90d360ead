# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that a real weight-cache daemon holds and a real rank maps: they count once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tiny_model
from engines import PREFIX, Installation, kill
from waiting import eventually

from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

pytestmark = pytest.mark.release("launches")

SCRIPT = Path(__file__).with_name("weight_cache.py")


@pytest.fixture(scope="module")
def snapshots(
    newest: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Snapshot]]:
    """By role, once both are loaded."""
    directory = tmp_path_factory.mktemp("weight-cache")
    model = tiny_model.write(directory / "model")
    environment = newest.environment(
        **{PREFIX + "RUNTIME_DIR": str(directory / "runtime"), PREFIX + "SERVE": "off"},
        SGLANG_WEIGHT_CACHE_SOCKET_TEMPLATE=str(directory / "{device_uuid}.sock"),
        SGLANG_WEIGHT_CACHE_READY_TEMPLATE=str(directory / "{device_uuid}.ready"),
    )
    processes = {}
    for part in ("daemon", "engine"):
        with (directory / part).open("wb") as log:
            processes[part] = subprocess.Popen(
                [newest.python, SCRIPT, part, model, directory / "none.ready"],
                env=environment,
                cwd=directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def loaded() -> dict[str, Snapshot]:
        for part, process in processes.items():
            if process.poll() is not None:
                raise RuntimeError((directory / part).read_text(errors="replace")[-6000:])
        found = SnapshotReader(RuntimeDir.open(directory / "runtime", os.environ)).read()
        roles = {role.name: snapshot for _, snapshot in found for role in snapshot.roles}
        assert roles.keys() == {"weight_cache", "target"}
        assert roles["target"].roles[0].kv_pools, "the engine has no KV pool yet"
        return roles

    try:
        yield eventually(loaded, what="a daemon and an engine")
    finally:
        kill([psutil.Process(process.pid) for process in processes.values()])
        for process in processes.values():
            process.wait()


def test_mapped_weights_count_at_the_daemon_alone(snapshots: dict[str, Snapshot]) -> None:
    header = tiny_model.safetensors_header(Path(snapshots["target"].engine.model_path))
    checkpoint = sum(nbytes for _, nbytes in header.values())
    counted = {
        name: [part for part in snapshot.roles[0].weights or () if part.kind == "parameter"]
        for name, snapshot in snapshots.items()
    }
    assert [(part.nbytes, part.shared) for part in counted["weight_cache"]] == [(checkpoint, 0)]
    assert [(part.nbytes, part.shared) for part in counted["target"]] == [(0, checkpoint)]
    assert counted["target"][0].tensors == counted["weight_cache"][0].tensors


def test_a_daemon_goes_by_a_name_that_no_engine_has(snapshots: dict[str, Snapshot]) -> None:
    assert snapshots["weight_cache"].engine.name == "weight-cache"
    assert snapshots["target"].engine.name == "30000"
    assert snapshots["weight_cache"].engine.instance != snapshots["target"].engine.instance


def test_nothing_of_ours_went_wrong(snapshots: dict[str, Snapshot]) -> None:
    for snapshot in snapshots.values():
        assert snapshot.hook_errors == {}
        assert [hook for hook in snapshot.hooks if hook.status == "failed"] == []
