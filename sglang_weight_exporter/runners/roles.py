# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which model runner of this process is which role, and which rank of which engine it is.

Runners are held weakly: one that was collected is nobody's role any more, and leaves.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang_weight_exporter.capture import devices
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.memory import MemoryBudget
from sglang_weight_exporter.runners import identity


@dataclass(frozen=True, eq=False)
class RunnerRole:
    """One model runner, or what holds a model without one."""

    name: str
    #: torch's name of the runner's device.
    device: str
    _runner: weakref.ref[Any]

    @property
    def runner(self) -> Any:
        """``None`` once it was collected."""
        return self._runner()

    @property
    def saves_memory(self) -> bool:
        """Whether SGLang's memory saver is on: without it, releasing memory does nothing."""
        adapter = getattr(self.runner, "memory_saver_adapter", None)
        enabled = getattr(adapter, "enabled", None)
        if enabled is None:  # Until 0.4.3 only the class says.
            enabled = adapter is not None and "Noop" not in type(adapter).__name__
        return bool(enabled)

    @property
    def saves_graphs(self) -> bool:
        """Whether the memory saver has CUDA graphs too, which SGLang asks a variable."""
        return self.saves_memory and os.environ.get(
            "SGLANG_MEMORY_SAVER_CUDA_GRAPH", ""
        ).lower() in {"1", "true"}

    @property
    def keeps_a_copy(self) -> bool:
        """Whether weights are copied to the host while their memory is released, and come back
        with it. Without that they are garbage until an update. (``enable_cpu_backup`` in
        ``ModelRunner.load_model``; 0.5.23: ``load_model_utils``.)"""
        settings = ["enable_weights_cpu_backup"]
        if getattr(self.runner, "is_draft_worker", False):
            settings.append("enable_draft_weights_cpu_backup")
        return any(identity.server_setting(self.runner, name) is True for name in settings)

    @property
    def model_path(self) -> str:
        """From the configuration of the model; a weight-cache daemon has the path itself."""
        runner = self.runner
        return str(getattr(getattr(runner, "model_config", runner), "model_path", "") or "")

    @property
    def weight_version(self) -> str:
        """That the engine was started with."""
        return str(identity.server_setting(self.runner, "weight_version") or "")

    @property
    def has_placeholders(self) -> bool:
        """Whether a load with overlapping has made the tensors, and their values come later."""
        return getattr(self.runner, "startup_weight_load", None) is not None


class Roles:
    """The roles of one process, in the order of their appearance.

    ``report`` is called with what could not be found out.
    """

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._report = report
        self._roles: list[RunnerRole] = []
        self._devices: dict[str, Device] = {}
        #: OwnedStorages since the first runner.
        self.engine = Engine(name="", instance="")
        self.ranks = Ranks()
        self._dp_rank: int | None = None
        self._free_before_load: float | None = None

    def __iter__(self) -> Iterator[RunnerRole]:
        """Those whose runner is still there; safe from any thread, as it changes nothing."""
        return iter([role for role in self._roles if role.runner is not None])

    def find(self, owner: Any) -> RunnerRole | None:
        """The role of a runner, or of the runner that a component belongs to; ``None`` if it has
        none yet."""
        runner = _runner_of(owner)
        if runner is None:
            return None
        return next((role for role in self if role.runner is runner), None)

    def named(self, name: str) -> RunnerRole | None:
        return next((role for role in self if role.name == name), None)

    def add(self, owner: Any) -> RunnerRole | None:
        """A new role, for a runner that has none; ``None`` if the owner belongs to no runner."""
        runner = _runner_of(owner)
        if runner is None:
            return None
        self.identify(runner)
        first = name = identity.role_of(runner)
        taken = {role.name for role in self}
        if first in taken:  # Perhaps by one that is garbage and was not collected yet.
            gc.collect()
            taken = {role.name for role in self}
        further = 1
        while name in taken:
            name = f"{first}_{further}"
            further += 1
        role = RunnerRole(name, identity.device_of(runner), weakref.ref(runner))
        self._roles = [*self, role]
        self.describe(role.device)
        return role

    def set_dp_rank(self, dp_rank: int | None) -> None:
        """The data-parallel rank, where SGLang passes it to the scheduler and not to the runner."""
        if dp_rank is not None:
            self._dp_rank = int(dp_rank)

    def set_free_memory(self, gibibytes: float | None) -> None:
        """Free memory of the GPU before the load, as SGLang hands it to what makes the pools."""
        if gibibytes is not None:
            self._free_before_load = gibibytes

    @property
    def budget(self) -> MemoryBudget:
        """What the target's KV pool was sized from."""
        target = self.named("target")
        if target is None or target.runner is None:
            return MemoryBudget()
        return identity.budget_of(target.runner, self._free_before_load)

    def identify(self, owner: Any) -> None:
        """Find out which rank of which engine this process is, if it is not known yet: from the
        first runner, or from a scheduler that has none that is known here. With which ranks of
        other hosts it is one engine only the scheduler knows."""
        if not self.engine.instance:
            self.ranks = identity.ranks_of(owner, self._dp_rank)
            self.engine = identity.engine_of(owner)
        if not self.engine.group:
            group = identity.group_of(owner, self.engine)
            self.engine = msgspec.structs.replace(self.engine, group=group)

    def describe(self, device: str) -> Device:
        """Which piece of hardware a torch device is."""
        if device not in self._devices:
            try:
                found = devices.describe(device)
                if device == "cpu":
                    found = msgspec.structs.replace(found, packing=identity.cpu_packing())
                self._devices[device] = found
            except Exception as error:
                self._devices[device] = Device(name=device)
                self._report("device", error)
        return self._devices[device]

    @property
    def devices(self) -> tuple[Device, ...]:
        """All that weights were found on."""
        return tuple(self._devices.values())


def _runner_of(owner: Any) -> Any:
    """The runner itself, or the one that a ``WeightUpdater`` or ``WeightExporter`` belongs to."""
    get_runner = getattr(owner, "get_model_runner", None)
    if get_runner is not None:
        return get_runner()
    return owner if hasattr(owner, "server_args") else None
