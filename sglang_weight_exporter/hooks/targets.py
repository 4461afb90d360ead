# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The one table of hook targets: what is wrapped, where it is found, what it means.

A release that moved something needs one more line here. What an entry finds is hooked, whatever
the version says; ``since`` and ``until`` only tell a target that a release never had (fine) from
one that it should have (a gap, and ``status`` says so). They name sampled releases, all of which
the contract test reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_weight_exporter.records.updates import Source

RUNNER = "sglang.srt.model_executor.model_runner"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
EXPORTER = "sglang.srt.model_executor.model_runner_components.weight_exporter"
SCHEDULER = "sglang.srt.managers.scheduler"
SCHEDULER_MIXIN = "sglang.srt.managers.scheduler_update_weights_mixin"
SCHEDULER_COMPONENT = "sglang.srt.managers.scheduler_components.weight_updater"
EPLB_MANAGER = "sglang.srt.eplb.eplb_manager"
OLD_EPLB_MANAGER = "sglang.srt.managers.eplb_manager"
EXPERT_BACKUP = "sglang.srt.elastic_ep.expert_backup_client"
LOADER = "sglang.srt.model_loader.loader"
OLD_ENCODER = "sglang.srt.disaggregation.encode_server"
ENCODER = "sglang.srt.disaggregation.encoder.server"
ENCODER_RUNTIME = "sglang.srt.disaggregation.encoder.runtime"
WEIGHT_CACHE_DAEMON = "sglang.srt.weight_cache.daemon"
IPC_LOADER = "sglang.srt.weight_cache.ipc_loader"


@dataclass(frozen=True)
class Target:
    """One callable of SGLang."""

    #: What ``status`` and ``sglang_weight_exporter_hooks{target}`` call it. Several entries of
    #: one name are several places where releases keep the same thing.
    name: str
    module: str
    #: ``Class.method`` or ``function``.
    attribute: str
    #: The method of :class:`~sglang_weight_exporter.hooks.translator.Translator` that reads it.
    meaning: str
    since: str
    #: ``None``: still there in the newest release that was read.
    until: str | None = None
    #: Arguments that the method reads, by their name in SGLang's signature.
    reads: tuple[str, ...] = ()
    source: Source | None = None
    #: A coroutine, as SGLang has it. Of another target a coroutine would not be what it was.
    coroutine: bool = False


# fmt: off
#: One line a place. Releases moved most of ModelRunner's methods to its components in 0.5.16; the
#: scheduler's went to a mixin in 0.4.10 and to a component in 0.5.13.
TARGETS: tuple[Target, ...] = (
    # The life of a rank and of its model runners. Its data-parallel rank is an argument until 0.5.20; the
    # runner gets it between 0.5.1 and 0.5.11, and keeps it from 0.5.12 on.
    Target("scheduler.__init__", SCHEDULER, "Scheduler.__init__", "start", "0.4.1", "0.5.20", reads=("dp_rank",)),
    Target("scheduler.__init__", SCHEDULER, "Scheduler.__init__", "start", "0.5.21"),
    Target("__init__", RUNNER, "ModelRunner.__init__", "construct", "0.4.1"),
    Target("load_model", RUNNER, "ModelRunner.load_model", "load", "0.4.1"),
    Target("finalize_startup_weight_load", RUNNER, "ModelRunner.finalize_startup_weight_load", "finalize_load", "0.5.18"),
    Target("kv_pool", RUNNER, "ModelRunner.init_memory_pool", "allocate_kv_pool", "0.4.1", "0.5.15.post1"),
    Target("kv_pool", RUNNER, "ModelRunner.alloc_memory_pool", "allocate_kv_pool", "0.5.14"),
    Target("post_capture_resize_kv_pool", RUNNER, "ModelRunner.post_capture_resize_kv_pool", "allocate_kv_pool", "0.5.16"),
    # Models without a model runner: of encoder servers, and of the weight-cache daemon, from which
    # engines map their weights. `python -m` runs the daemon's module under another name, which is
    # found when the first of these modules is imported after it: the loader's, by `load()`.
    Target("get_model_loader", LOADER, "get_model_loader", "begin_load", "0.4.1"),
    Target("encoder", OLD_ENCODER, "MMEncoder.__init__", "load_without_runner", "0.5.7", "0.5.18"),
    Target("encoder", ENCODER, "MMEncoder.__init__", "load_without_runner", "0.5.19"),
    Target("encoder.run_dp_worker", OLD_ENCODER, "run_dp_worker", "start_encoder", "0.5.13.post1", "0.5.18", reads=("dp_rank",), coroutine=True),
    Target("encoder.run_dp_worker", ENCODER_RUNTIME, "run_dp_worker", "start_encoder", "0.5.19", reads=("dp_rank",), coroutine=True),
    Target("weight_cache.export", WEIGHT_CACHE_DAEMON, "WeightCacheDaemon._export_state", "load_without_runner", "0.5.17"),
    Target("weight_cache.map", IPC_LOADER, "IpcModelLoader._load_zero_copy_mode", "map_weights", "0.5.17"),
    # Updates, at the level where tensors change.
    Target("update_weights_from_disk", RUNNER, "ModelRunner.update_weights_from_disk", "update", "0.4.1", "0.5.15.post1", source="disk"),
    Target("update_weights_from_disk", UPDATER, "WeightUpdater.update_weights_from_disk", "update", "0.5.16", source="disk"),
    Target("update_weights_from_tensor", RUNNER, "ModelRunner.update_weights_from_tensor", "update", "0.4.2.post4", "0.5.15.post1", source="tensor"),
    Target("update_weights_from_tensor", UPDATER, "WeightUpdater.update_weights_from_tensor", "update", "0.5.16", source="tensor"),
    Target("update_weights_from_distributed", RUNNER, "ModelRunner.update_weights_from_distributed", "update", "0.4.1", "0.5.15.post1", source="distributed"),
    Target("update_weights_from_distributed", UPDATER, "WeightUpdater.update_weights_from_distributed", "update", "0.5.16", "0.5.20", source="distributed"),
    # Parts of an update, which older releases have inside of one function.
    Target("checkpoint_files", LOADER, "DefaultModelLoader._prepare_weights", "read_files", "0.4.1"),
    Target("restore_weights", LOADER, "DefaultModelLoader.restore_weights_before_loading", "post_process", "0.5.21"),
    Target("postprocess_weights", LOADER, "DefaultModelLoader.postprocess_weights", "post_process", "0.5.20"),
    Target("receive_weights_from_distributed", UPDATER, "WeightUpdater.receive_weights_from_distributed", "receive", "0.5.21", source="distributed"),
    Target("load_weights_from_distributed", UPDATER, "WeightUpdater.load_weights_from_distributed", "update", "0.5.21", source="distributed"),
    Target("update_weights_from_ipc", RUNNER, "ModelRunner.update_weights_from_ipc", "update", "0.5.4.post3", "0.5.15.post1", source="ipc"),
    Target("update_weights_from_ipc", UPDATER, "WeightUpdater.update_weights_from_ipc", "update", "0.5.16", source="ipc"),
    Target("begin_weight_update", UPDATER, "WeightUpdater.begin_weight_update", "begin_session", "0.5.21"),
    Target("end_weight_update", UPDATER, "WeightUpdater.end_weight_update", "end_session", "0.5.21", reads=("run_post_load",)),
    # Requests: where an update ends, and what became of it after the weights were written.
    Target("scheduler.update_weights_from_disk", SCHEDULER, "Scheduler.update_weights_from_disk", "request", "0.4.1", "0.4.9.post6", reads=("recv_req",), source="disk"),
    Target("scheduler.update_weights_from_disk", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.update_weights_from_disk", "request", "0.4.10.post2", "0.5.12.post1", reads=("recv_req",), source="disk"),
    Target("scheduler.update_weights_from_disk", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.update_weights_from_disk", "request", "0.5.13.post1", reads=("recv_req",), source="disk"),
    Target("scheduler.update_weights_from_tensor", SCHEDULER, "Scheduler.update_weights_from_tensor", "request", "0.4.2.post4", "0.4.9.post6", reads=("recv_req",), source="tensor"),
    Target("scheduler.update_weights_from_tensor", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.update_weights_from_tensor", "request", "0.4.10.post2", "0.5.12.post1", reads=("recv_req",), source="tensor"),
    Target("scheduler.update_weights_from_tensor", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.update_weights_from_tensor", "request", "0.5.13.post1", reads=("recv_req",), source="tensor"),
    Target("scheduler.update_weights_from_distributed", SCHEDULER, "Scheduler.update_weights_from_distributed", "request", "0.4.1", "0.4.9.post6", reads=("recv_req",), source="distributed"),
    Target("scheduler.update_weights_from_distributed", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.update_weights_from_distributed", "request", "0.4.10.post2", "0.5.12.post1", reads=("recv_req",), source="distributed"),
    Target("scheduler.update_weights_from_distributed", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.update_weights_from_distributed", "request", "0.5.13.post1", reads=("recv_req",), source="distributed"),
    Target("scheduler.update_weights_from_ipc", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.update_weights_from_ipc", "request", "0.5.4.post3", "0.5.12.post1", reads=("recv_req",), source="ipc"),
    Target("scheduler.update_weights_from_ipc", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.update_weights_from_ipc", "request", "0.5.13.post1", reads=("recv_req",), source="ipc"),
    # Ranks wait for one another at the end of either.
    Target("scheduler.begin_weight_update", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.begin_weight_update", "operate", "0.5.21"),
    Target("scheduler.end_weight_update", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.end_weight_update", "operate", "0.5.21"),
    Target("record_weight_version_change", SCHEDULER, "Scheduler.record_weight_version_change", "change_version", "0.5.19", reads=("new_version",)),
    # The cache that weights leave behind: flushes (also those inside an update and a release), and
    # what is done to running requests before an update.
    Target("scheduler.flush_cache", SCHEDULER, "Scheduler.flush_cache", "flush", "0.4.1"),
    Target("scheduler.pause_generation", SCHEDULER, "Scheduler.pause_generation", "pause", "0.5.6.post2", reads=("recv_req",)),
    Target("scheduler.continue_generation", SCHEDULER, "Scheduler.continue_generation", "continue_generation", "0.5.6.post2"),
    Target("scheduler.abort_request", SCHEDULER, "Scheduler.abort_request", "abort", "0.4.1", reads=("recv_req",)),
    # Memory that is given back and taken again.
    Target("scheduler.release_memory_occupation", SCHEDULER, "Scheduler.release_memory_occupation", "release", "0.4.2.post4", "0.4.2.post4"),
    Target("scheduler.resume_memory_occupation", SCHEDULER, "Scheduler.resume_memory_occupation", "resume", "0.4.2.post4", "0.4.2.post4"),
    Target("scheduler.release_memory_occupation", SCHEDULER, "Scheduler.release_memory_occupation", "release", "0.4.3.post4", "0.4.9.post6", reads=("recv_req",)),
    Target("scheduler.release_memory_occupation", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.release_memory_occupation", "release", "0.4.10.post2", "0.5.12.post1", reads=("recv_req",)),
    Target("scheduler.release_memory_occupation", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.release_memory_occupation", "release", "0.5.13.post1", reads=("recv_req",)),
    Target("scheduler.resume_memory_occupation", SCHEDULER, "Scheduler.resume_memory_occupation", "resume", "0.4.3.post4", "0.4.9.post6", reads=("recv_req",)),
    Target("scheduler.resume_memory_occupation", SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin.resume_memory_occupation", "resume", "0.4.10.post2", "0.5.12.post1", reads=("recv_req",)),
    Target("scheduler.resume_memory_occupation", SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager.resume_memory_occupation", "resume", "0.5.13.post1", reads=("recv_req",)),
    # What surrounds an update.
    Target("init_weights_update_group", RUNNER, "ModelRunner.init_weights_update_group", "group", "0.4.1", "0.5.15.post1", reads=("group_name",)),
    Target("init_weights_update_group", UPDATER, "WeightUpdater.init_weights_update_group", "group", "0.5.16", reads=("group_name",)),
    Target("destroy_weights_update_group", RUNNER, "ModelRunner.destroy_weights_update_group", "group", "0.5.3.post3", "0.5.15.post1", reads=("group_name",)),
    Target("destroy_weights_update_group", UPDATER, "WeightUpdater.destroy_weights_update_group", "group", "0.5.16", reads=("group_name",)),
    Target("get_weights_by_name", RUNNER, "ModelRunner.get_weights_by_name", "read", "0.4.1", "0.5.15.post1"),
    Target("get_weights_by_name", EXPORTER, "WeightExporter.get_weights_by_name", "read", "0.5.16"),
    Target("save_remote_model", RUNNER, "ModelRunner.save_remote_model", "operate", "0.4.4.post4", "0.5.15.post1"),
    Target("save_remote_model", EXPORTER, "WeightExporter.save_remote_model", "operate", "0.5.16"),
    Target("save_sharded_model", RUNNER, "ModelRunner.save_sharded_model", "operate", "0.4.4.post4", "0.5.15.post1"),
    Target("save_sharded_model", EXPORTER, "WeightExporter.save_sharded_model", "operate", "0.5.16"),
    Target("send_weights_to_remote_instance", RUNNER, "ModelRunner.send_weights_to_remote_instance", "operate", "0.5.3.post3", "0.5.15.post1"),
    Target("send_weights_to_remote_instance", EXPORTER, "WeightExporter.send_weights_to_remote_instance", "operate", "0.5.16"),
    Target("check_weights", RUNNER, "ModelRunner.check_weights", "check", "0.5.6.post2", reads=("action",)),
    # Its request asks for nothing that SGLang does where it names what no release knows.
    Target("scheduler.set_internal_state", SCHEDULER, "Scheduler.set_internal_state", "verify", "0.4.3.post4", reads=("recv_req",)),
    Target("load_lora_adapter", RUNNER, "ModelRunner.load_lora_adapter", "lora", "0.4.9.post6"),
    Target("load_lora_adapter_from_tensors", RUNNER, "ModelRunner.load_lora_adapter_from_tensors", "lora", "0.5.8.post1"),
    Target("unload_lora_adapter", RUNNER, "ModelRunner.unload_lora_adapter", "lora", "0.4.9.post6"),
    # What ends a scheduler: its process asks for the text of the exception, logs it, and then
    # signals its parent, which kills it.
    Target("scheduler.exception", SCHEDULER, "get_exception_traceback", "crash", "0.4.1"),
    Target("scheduler.run_event_loop", SCHEDULER, "Scheduler.run_event_loop", "run", "0.5.10.post1"),
    # Experts that move between ranks.
    Target("rebalance", OLD_EPLB_MANAGER, "EPLBManager.rebalance", "rebalance", "0.4.6.post5", "0.4.8.post1"),
    Target("rebalance", EPLB_MANAGER, "EPLBManager.rebalance", "rebalance", "0.4.9.post6"),
    Target("update_expert_location", RUNNER, "ModelRunner.update_expert_location", "move_experts", "0.4.6.post5", "0.5.15.post1"),
    Target("update_expert_location", EPLB_MANAGER, "update_expert_location_with_recovery", "move_experts", "0.5.16"),
    Target("expert_backup", EXPERT_BACKUP, "ExpertBackupClient.update_weights", "move_experts", "0.5.10.post1"),
)
# fmt: on


def version_key(version: str) -> tuple[int, ...]:
    """Orders releases: ``0.5.9 < 0.5.10.dev3 < 0.5.10rc1 < 0.5.10 < 0.5.10.post1``. What is no
    version sorts low."""
    matched = _VERSION.match(version)
    if matched is None:
        return (-1,)
    numbers = [int(part) for part in matched["release"].split(".")]
    stage, number = 0, 0
    if matched["pre"]:
        stage, number = {"a": -3, "b": -2, "rc": -1}[matched["pre"]], int(matched["pre_number"])
    elif matched["post"]:
        stage, number = 1, int(matched["post"])
    elif matched["dev"]:
        stage = -4
    return (*numbers, *(0,) * (4 - len(numbers)), stage, number)


_VERSION = re.compile(
    r"(?P<release>\d+(\.\d+){0,3})"
    r"((?P<pre>a|b|rc)(?P<pre_number>\d+))?(\.post(?P<post>\d+))?(?P<dev>\.dev\d+)?(\+|$)"
)
