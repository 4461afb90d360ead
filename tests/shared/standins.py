# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for SGLang's model runner, scheduler and expert balancer, and the hooks on them.

What they stand for needs several GPUs, a draft model, RDMA or a failure at one exact place. Each
keeps the names, the arguments and the order of calls of the release it is named after; that real
releases have those is what the contract test shows. What runs on a CPU is tested with real
engines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.hooks.install import Installation
from sglang_weight_exporter.hooks.targets import (
    EPLB_MANAGER,
    RUNNER,
    SCHEDULER,
    SCHEDULER_COMPONENT,
    TARGETS,
    UPDATER,
)
from sglang_weight_exporter.hooks.translator import Translator
from sglang_weight_exporter.ledger import IDLE_SECONDS
from sglang_weight_exporter.rank import make_rank
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update, UpdateInProgress
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

Answer = Callable[..., Any]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Rank:
    """A process with the hooks on, as the exporter process sees it."""

    def __init__(
        self,
        directory: Path,
        *,
        known: bool = True,
        reader_wait_seconds: float = 0.0,
        fingerprinter: Any = None,
    ) -> None:
        """``known``: off, SGLang's modules are still to be imported."""
        self.reader_wait_seconds = reader_wait_seconds
        self.fingerprinter = fingerprinter
        self.clock = Clock()
        self.directory = directory
        self.allocations = Segments.none()
        #: SGLang's workers keep their runners.
        self.workers: list[Any] = []
        self.installation = Installation(TARGETS, self._translator)
        if not known:
            return
        self.runners = self.hook(RUNNER, ModelRunner)
        self.updaters = self.hook(UPDATER, WeightUpdater)
        self.components = self.hook(SCHEDULER_COMPONENT, SchedulerWeightUpdaterManager)
        self.balancers = self.hook(EPLB_MANAGER, EPLBManager)

    def _translator(self, installation: Installation) -> Translator:
        settings = Settings(
            runtime_dir=self.directory,
            serve=False,
            reader_wait_seconds=self.reader_wait_seconds,
        )
        rank = make_rank(
            settings,
            os.environ,
            report=installation.report,
            hooks=installation.states.all,
            errors=lambda: dict(installation.errors),
            clock=self.clock,
            allocations=lambda device: self.allocations,
            fingerprinter=self.fingerprinter,
        )
        return Translator(rank)

    def hook(self, place: str, thing: Any) -> Any:
        """A copy of a class or function, wrapped as if SGLang's module had just been imported."""
        module = ModuleType(place)
        if isinstance(thing, type):
            functions = {key: value for key, value in vars(thing).items() if callable(value)}
            thing = type(thing.__name__, (thing,), functions)
        setattr(module, thing.__name__, thing)
        self.installation.on_import(module)
        return getattr(module, thing.__name__)

    def runner(self, *, is_draft_worker: bool = False, **attributes: Any) -> Any:
        """A loaded model runner; ``attributes`` replace those that it sets itself."""
        runner = self.runners(is_draft_worker=is_draft_worker, **attributes)
        runner.weight_updater = self.updaters(runner)
        self.workers.append(runner)
        return runner

    def scheduler(self, *runners: Any, flushes: bool = True, refuses: str = "") -> Any:
        return self.components(*runners, flushes=flushes, refuses=refuses)

    def snapshot(self) -> Snapshot:
        ((_, snapshot),) = SnapshotReader(RuntimeDir.open(self.directory, os.environ)).read()
        assert snapshot.hook_errors == {}
        return snapshot

    def role(self, name: str = "target") -> Role:
        (role,) = (role for role in self.snapshot().roles if role.name == name)
        return role

    def last_update(self, name: str = "target") -> Update:
        update = self.role(name).last_update
        assert update is not None, "nothing was loaded or updated"
        return update

    def in_progress(self, name: str = "target") -> UpdateInProgress:
        progress = self.role(name).in_progress
        assert progress is not None, "no update is in progress"
        return progress

    def weights(self, name: str = "target") -> tuple[WeightUsage, ...]:
        weights = self.role(name).weights
        assert weights is not None, "the weights could not be read"
        return weights

    def totals(self, name: str = "target") -> dict[str, tuple[int, int, int]]:
        """Source → updates, failures and calls, where any is not 0."""
        found = {
            source: (counts.updates, counts.failures, counts.calls)
            for source, counts in self.role(name).updates.items()
        }
        return {source: numbers for source, numbers in found.items() if any(numbers)}

    def events(self) -> list[Event]:
        ((directory, _),) = SnapshotReader(RuntimeDir.open(self.directory, os.environ)).read()
        waiting = directory.events
        return [
            waiting.event(path) for path in waiting.waiting() if waiting.black_box(path) is None
        ]


class WeightCacheDaemon:
    """Of 0.5.19 and later, after its load: memory that is exported by CUDA IPC needs a GPU."""

    def __init__(self) -> None:
        self.server_args = SimpleNamespace(port=30000, model_path="tiny", dp_size=1)
        self.gpu_id, self.tp_rank, self.pp_rank = 0, 1, 0
        self.model_path = "tiny"
        self.model = model()

    def _export_state(self) -> None:
        pass


class IpcModelLoader:
    """Of 0.5.17 and later; maps what a daemon exports."""

    def __init__(self, shared: torch.nn.Module) -> None:
        self.shared = shared

    def _load_zero_copy_mode(
        self, model_config: Any, device_config: Any, entries: Any, quant_config: Any
    ) -> torch.nn.Module:
        return self.shared


def get_model_loader(load_config: Any = None, model_config: Any = None) -> None:
    """Where every load begins."""


def model(rows: int = 4) -> torch.nn.Module:
    made = torch.nn.Module()
    made.embed_tokens = torch.nn.Embedding(8, rows, dtype=torch.float32)
    made.proj = torch.nn.Linear(rows, rows, bias=False, dtype=torch.float32)
    return made


class ModelRunner:
    """Of 0.5.21 and later, whose updates are on a component."""

    def __init__(self, *, is_draft_worker: bool = False, **attributes: Any) -> None:
        self.server_args = SimpleNamespace(port=30000, model_path="tiny", dp_size=1)
        self.model_config = SimpleNamespace(model_path="tiny", quantization=None)
        self.device, self.gpu_id = "cpu", 0
        self.is_draft_worker = is_draft_worker
        self.startup_weight_load: Any = None
        self.token_to_kv_pool: Any = None
        self.model = model()
        vars(self).update(attributes)
        self.load_model()

    def load_model(self) -> None:
        pass

    def finalize_startup_weight_load(self) -> None:
        self.startup_weight_load = None

    def alloc_memory_pool(self, memory_pool_config: Any = None) -> None:
        self.token_to_kv_pool = SimpleNamespace()

    def check_weights(self, action: str, *, role: str = "target") -> None:
        if action == "compare":
            raise ValueError("tensors differ")


def succeed(*arguments: Any, **keywords: Any) -> tuple[bool, str]:
    return True, "Success"


def answer(*result: Any) -> Answer:
    return lambda *arguments, **keywords: result


def fail(error: BaseException) -> Answer:
    def raise_it(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return raise_it


class Scheduler:
    """Until 0.5.20: makes runners when it is made itself."""

    def __init__(self, make: Callable[[], None], *, dp_rank: int | None = None) -> None:
        self.forward_ct = 0
        self.tree_cache = SimpleNamespace(evictable_size=int, protected_size=int)
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(reqs=[])
        make()

    def set_internal_state(self, recv_req: Any) -> Any:
        """Refuses whatever it does not know, and does nothing."""
        for key in recv_req.server_args:
            logging.getLogger(SCHEDULER).warning(f"Updating {key} is not supported.")
            break
        return SimpleNamespace(updated=False)


class WeightUpdater:
    """Of 0.5.21 and later; what each call answers is the runner's ``answers``."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def get_model_runner(self) -> Any:
        return self._runner

    def _answer(self, name: str) -> Any:
        return getattr(self._runner, "answers", {}).get(name, succeed)()

    def update_weights_from_disk(self, model_path: str, load_format: str, **more: Any) -> Any:
        return self._answer("disk")

    def update_weights_from_tensor(self, named_tensors: Any, load_format: Any = None) -> Any:
        return self._answer("tensor")

    def update_weights_from_ipc(self, recv_req: Any) -> Any:
        return self._answer("ipc")

    def init_weights_update_group(
        self, master_address: str, master_port: int, group_name: str
    ) -> tuple[bool, str]:
        return True, "Success"

    def update_weights_from_distributed(self, names: Any, *more: Any) -> Any:
        return self._answer("distributed")

    def receive_weights_from_distributed(self, *, names: Any, **more: Any) -> Any:
        return self._answer("receive")

    def load_weights_from_distributed(self, named_tensors: Any) -> Any:
        return self._answer("distributed")

    def begin_weight_update(self) -> None:
        self._answer("begin")

    def end_weight_update(self, *, run_post_load: bool) -> None:
        self._answer("end")


class Request(SimpleNamespace):
    """A request of the scheduler; ``flush_cache`` is on as SGLang has it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{"flush_cache": True, "weight_version": None, **attributes})


class SchedulerWeightUpdaterManager:
    """Of 0.5.22, without its sessions' bookkeeping. ``refuses``: with what message, before any
    runner is called."""

    def __init__(self, *runners: Any, flushes: bool = True, refuses: str = "") -> None:
        self.runners = runners
        self.flushes = flushes
        self.refuses = refuses
        #: Where ranks wait for one another.
        self.barrier: Callable[[], None] = lambda: None

    def _fan_out(self, recv_req: Any, call: Callable[[Any], Any]) -> Any:
        success, message = not self.refuses, self.refuses
        for runner in self.runners if success else ():
            success, message = call(runner.weight_updater)
            if not success:
                break
        if success and recv_req.flush_cache and not self.flushes:
            success = False
            message = "Weights were updated, but the cache was not flushed"
        return SimpleNamespace(success=success, message=message)

    def update_weights_from_disk(self, recv_req: Any) -> Any:
        return self._fan_out(
            recv_req, lambda updater: updater.update_weights_from_disk("other", "auto")
        )

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        return self._fan_out(recv_req, lambda updater: updater.update_weights_from_tensor([]))

    def update_weights_from_ipc(self, recv_req: Any) -> Any:
        return self._fan_out(recv_req, lambda updater: updater.update_weights_from_ipc(recv_req))

    def update_weights_from_distributed(self, recv_req: Any) -> Any:
        return self._fan_out(
            recv_req, lambda updater: updater.update_weights_from_distributed([], [], [], "group")
        )

    def begin_weight_update(self, recv_req: Any) -> Any:
        for runner in self.runners:
            runner.weight_updater.begin_weight_update()
        self.barrier()
        return SimpleNamespace(success=True, message="Success")

    def end_weight_update(self, recv_req: Any) -> Any:
        for runner in self.runners:
            runner.weight_updater.end_weight_update(run_post_load=False)
        self.barrier()
        return SimpleNamespace(success=True, message="Success")

    def release_memory_occupation(self, recv_req: Any) -> None:
        self.barrier()

    def resume_memory_occupation(self, recv_req: Any) -> None:
        self.barrier()


class EPLBManager:
    """Of 0.5.16 and later: chunks of layers, a forward pass between two."""

    def __init__(self, move: Callable[[], None], chunks: int) -> None:
        self.move, self.chunks = move, chunks

    def rebalance(self) -> Iterator[None]:
        for _ in range(self.chunks):
            yield
            self.move()


def session(runner: Any, *, loads: int, run_post_load: bool | None = None) -> None:
    runner.weight_updater.begin_weight_update()
    for _ in range(loads):
        runner.weight_updater.update_weights_from_tensor([])
    post_load = loads == 0 if run_post_load is None else run_post_load
    runner.weight_updater.end_weight_update(run_post_load=post_load)


def update_expert_location_with_recovery(*, move: Any) -> None:
    move()


def rebalanced(rank: Rank, move: Any, *, chunks: int = 3) -> None:
    function = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    for _ in rank.balancers(lambda: function(move=move), chunks).rebalance():
        rank.clock.now += 2 * IDLE_SECONDS  # the engine has nothing to do for a while
