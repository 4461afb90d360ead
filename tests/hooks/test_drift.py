# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A release that moved something says so: in one line of the log, in ``status`` and as a metric.

Modules are stand-ins for releases that do not exist yet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from standins import (
    ModelRunner,
    Rank,
    Request,
    SchedulerWeightUpdaterManager,
    WeightUpdater,
)

from sglang_weight_exporter.hooks.install import Installation, watch
from sglang_weight_exporter.hooks.targets import (
    RUNNER,
    SCHEDULER,
    SCHEDULER_COMPONENT,
    UPDATER,
    version_key,
)


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    released = ModuleType("sglang")
    released.__version__ = "0.5.23"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", released)
    return Rank(tmp_path / "runtime", known=False)


def imported(rank: Rank, name: str, monkeypatch: pytest.MonkeyPatch, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    rank.installation.on_import(module)
    return module


def state(rank: Rank, target: str) -> tuple[str, str]:
    (found,) = (hook for hook in rank.installation.states.all("0.5.23") if hook.target == target)
    return found.status, found.reason


def test_a_target_that_became_a_coroutine(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class ModelRunner:
        async def load_model(self) -> str:
            return "its own result"

    module = imported(rank, RUNNER, monkeypatch, ModelRunner=ModelRunner)
    status, reason = state(rank, "load_model")
    assert status == "failed"
    assert "coroutine" in reason
    assert [record for record in caplog.records if "load_model" in record.getMessage()]
    coroutine = module.ModelRunner().load_model()
    with pytest.raises(StopIteration, match="its own result"):
        coroutine.send(None)


def test_an_argument_that_was_renamed(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Manager(SchedulerWeightUpdaterManager):
        def update_weights_from_disk(self, request: Any) -> Any:
            return self._fan_out(
                request, lambda updater: updater.update_weights_from_disk("other", "auto")
            )

    Manager.__name__ = "SchedulerWeightUpdaterManager"
    imported(rank, SCHEDULER_COMPONENT, monkeypatch, SchedulerWeightUpdaterManager=Manager)
    status, reason = state(rank, "scheduler.update_weights_from_disk")
    assert status == "failed"
    assert "recv_req" in reason
    lines = [record.getMessage() for record in caplog.records if "recv_req" in record.getMessage()]
    assert len(lines) == 1
    rank.runners = rank.hook(RUNNER, ModelRunner)
    rank.updaters = rank.hook(UPDATER, WeightUpdater)
    runner = rank.runner()
    Manager(runner).update_weights_from_disk(Request())
    assert rank.totals() == {"disk": (1, 0, 1)}


def test_a_class_that_is_gone(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    imported(rank, UPDATER, monkeypatch)
    status, reason = state(rank, "begin_weight_update")
    assert status == "failed"
    assert f"{UPDATER}.WeightUpdater.begin_weight_update is gone" in reason
    assert len([record for record in caplog.records if UPDATER in record.getMessage()]) == 1


def test_what_another_module_has_is_not_gone_however_late_the_hooks_come(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As SGLang's plugin loader does it, where no .pth file was read: all of SGLang is there.
    for name, there in (
        (SCHEDULER, type("Scheduler", (), {})),
        (
            SCHEDULER_COMPONENT,
            type("SchedulerWeightUpdaterManager", (SchedulerWeightUpdaterManager,), {}),
        ),
    ):
        module = ModuleType(name)
        setattr(module, there.__name__, there)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Installation, "modules", lambda self: [SCHEDULER, SCHEDULER_COMPONENT])
    watch(SimpleNamespace(callbacks={}, installation=None))
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "update_weights_from_disk is gone" not in said


def test_a_rank_whose_runners_are_not_known_reports_its_hooks(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scheduler:
        def __init__(self, server_args: Any, port_args: Any) -> None:
            self.server_args = server_args

    imported(rank, RUNNER, monkeypatch)  # Without a ModelRunner.
    module = imported(rank, SCHEDULER, monkeypatch, Scheduler=Scheduler)
    module.Scheduler(SimpleNamespace(port=30000, model_path="tiny"), None)
    snapshot = rank.snapshot()
    assert snapshot.roles == ()
    assert snapshot.engine.model_path == "tiny"
    hooks = {hook.target: hook.status for hook in snapshot.hooks}
    assert hooks["__init__"] == "failed"
    assert hooks["scheduler.__init__"] == "installed"


def test_releases_are_ordered_as_they_appear() -> None:
    releases = [
        "0.4.9",
        "0.5.9",
        "0.5.10.dev3",
        "0.5.10rc1",
        "0.5.10rc2",
        "0.5.10",
        "0.5.10.post1",
        "0.5.24rc1",
        "0.5.24",
        "0.6",
    ]
    assert sorted(releases, key=version_key) == releases
    assert version_key("0.5.24rc1+gabc") == version_key("0.5.24rc1")
    assert version_key("") < version_key("0.4.1")
