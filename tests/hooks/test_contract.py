# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The table of hook targets against the sources of real SGLang releases, the oldest and the
newest included; and ``docs/compatibility.md``, which is what they say together.

Nothing of SGLang is imported: 33 releases do not fit into one environment.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from releases import RELEASES, Definition, Release, fetch

from sglang_weight_exporter.hooks.targets import (
    EPLB_MANAGER,
    EXPORTER,
    RUNNER,
    SCHEDULER,
    SCHEDULER_COMPONENT,
    SCHEDULER_MIXIN,
    TARGETS,
    UPDATER,
    Target,
    version_key,
)
from sglang_weight_exporter.hooks.translator import Translator

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"

#: Where SGLang keeps what touches weights and pools.
OWNERS = (
    (RUNNER, "ModelRunner"),
    (UPDATER, "WeightUpdater"),
    (EXPORTER, "WeightExporter"),
    (SCHEDULER, "Scheduler"),
    (SCHEDULER_MIXIN, "SchedulerUpdateWeightsMixin"),
    (SCHEDULER_COMPONENT, "SchedulerWeightUpdaterManager"),
    (EPLB_MANAGER, "EPLBManager"),
    ("sglang.srt.elastic_ep.expert_backup_client", "ExpertBackupClient"),
)

#: A public method of those that is called so touches weights or pools, or must be known not to.
SUSPICIOUS = re.compile(
    r"(?!_)(?!init_(?!weights|memory_pool\b|lora_adapter))"
    r".*(weight|memory_occupation|lora_adapter|load_model|expert_location|memory_pool|kv_pool|flush|"
    r"pause_gen|continue_gen|abort_request).*"
)

#: Why a suspicious method needs no hook of its own.
NO_HOOK = {
    # A request of the scheduler that ends in a hooked method of the runner.
    "Scheduler.get_weights_by_name": "ends in get_weights_by_name",
    "Scheduler.save_remote_model": "ends in save_remote_model",
    "Scheduler.save_sharded_model": "ends in save_sharded_model",
    "Scheduler.send_weights_to_remote_instance": "ends in send_weights_to_remote_instance",
    "Scheduler.load_lora_adapter": "ends in load_lora_adapter",
    "Scheduler.load_lora_adapter_from_tensors": "ends in load_lora_adapter_from_tensors",
    "Scheduler.unload_lora_adapter": "ends in unload_lora_adapter",
    "Scheduler.init_weights_update_group": "ends in init_weights_update_group",
    "SchedulerUpdateWeightsMixin.get_weights_by_name": "ends in get_weights_by_name",
    "SchedulerUpdateWeightsMixin.save_remote_model": "ends in save_remote_model",
    "SchedulerUpdateWeightsMixin.save_sharded_model": "ends in save_sharded_model",
    "SchedulerUpdateWeightsMixin.check_weights": "ends in check_weights",
    "SchedulerUpdateWeightsMixin.init_weights_update_group": "ends in the runner's",
    "SchedulerUpdateWeightsMixin.destroy_weights_update_group": "ends in the runner's",
    "SchedulerWeightUpdaterManager.get_weights_by_name": "ends in get_weights_by_name",
    "SchedulerWeightUpdaterManager.save_remote_model": "ends in save_remote_model",
    "SchedulerWeightUpdaterManager.save_sharded_model": "ends in save_sharded_model",
    "SchedulerWeightUpdaterManager.check_weights": "ends in check_weights",
    "SchedulerWeightUpdaterManager.init_weights_update_group": "ends in the runner's",
    "SchedulerWeightUpdaterManager.destroy_weights_update_group": "ends in the runner's",
    # Part of a request that is hooked as a whole.
    "SchedulerUpdateWeightsMixin.flush_cache_after_weight_update": "inside a request",
    "SchedulerWeightUpdaterManager.flush_cache_after_weight_update": "inside a request",
    "SchedulerWeightUpdaterManager.record_weight_version_after_update": "inside a request",
    "Scheduler.handle_update_weight_version": "ends in record_weight_version_change",
    # The cache.
    "Scheduler.flush_cache_wrapped": "ends in flush_cache",
    # Parts of construction and allocation, which are hooked.
    "ModelRunner.init_memory_pool": "hooked",
    "ModelRunner.start_startup_weight_load": "reads ahead and writes nothing",
    "ModelRunner.maybe_apply_post_load_model_transforms": "inside __init__",
    "ModelRunner.maybe_init_expert_location_metadata": "inside __init__",
    "ModelRunner.account_preloaded_weights": "a number, no tensor",
    "ModelRunner.preloaded_weights_bytes": "a number, no tensor",
    "ModelRunner.maybe_init_remote_instance_transfer_engine": "a connection, no tensor",
    "ModelRunner.prealloc_symmetric_memory_pool": "scratch memory of collectives",
    "Scheduler.init_weight_updater": "an object, no tensor",
    # Connections for sending; what is sent is hooked.
    "ModelRunner.init_weights_send_group_for_remote_instance": "a connection, no tensor",
    "WeightExporter.init_weights_send_group_for_remote_instance": "a connection, no tensor",
    "Scheduler.init_weights_send_group_for_remote_instance": "a connection, no tensor",
}

#: Columns of the table in docs/compatibility.md: a way to change, move or read weights, and the
#: hooks on it. A release that has one of several hooks has the way.
WAYS: dict[str, tuple[str, ...]] = {
    "load": ("scheduler.__init__", "__init__", "load_model", "get_model_loader"),
    "overlapped load": ("finalize_startup_weight_load",),
    "encoder": ("encoder", "encoder.run_dp_worker"),
    "weight cache": ("weight_cache.export", "weight_cache.map"),
    "KV pool": ("kv_pool",),
    "KV resize": ("post_capture_resize_kv_pool",),
    "disk": ("update_weights_from_disk", "scheduler.update_weights_from_disk"),
    "tensor": ("update_weights_from_tensor", "scheduler.update_weights_from_tensor"),
    "distributed": (
        "update_weights_from_distributed",
        "receive_weights_from_distributed",
        "load_weights_from_distributed",
        "scheduler.update_weights_from_distributed",
    ),
    "IPC": ("update_weights_from_ipc", "scheduler.update_weights_from_ipc"),
    "bytes of a checkpoint": ("checkpoint_files",),
    "post-processing apart": ("restore_weights", "postprocess_weights"),
    "session, P2P": (
        "begin_weight_update",
        "end_weight_update",
        "scheduler.begin_weight_update",
        "scheduler.end_weight_update",
    ),
    "experts move": ("rebalance", "update_expert_location", "expert_backup"),
    "reset_tensors": ("check_weights",),
    "`verify`": ("scheduler.set_internal_state",),
    "LoRA": ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"),
    "release, resume": (
        "scheduler.release_memory_occupation",
        "scheduler.resume_memory_occupation",
    ),
    "flush": ("scheduler.flush_cache",),
    "pause, abort": (
        "scheduler.pause_generation",
        "scheduler.continue_generation",
        "scheduler.abort_request",
    ),
    "update groups": ("init_weights_update_group", "destroy_weights_update_group"),
    "read, save, send": (
        "get_weights_by_name",
        "save_remote_model",
        "save_sharded_model",
        "send_weights_to_remote_instance",
    ),
    "version": ("record_weight_version_change",),
    "end by an exception": ("scheduler.exception", "scheduler.run_event_loop"),
}


@pytest.fixture(scope="session", autouse=True)
def sources() -> None:
    """All releases, fetched side by side."""
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(fetch, RELEASES):
            pass


@cache
def release(version: str) -> Release:
    return Release(version)


def expected(target: Target, version: str) -> bool:
    """Whether the table says that a release has the target."""
    until = target.until or RELEASES[-1]
    return version_key(target.since) <= version_key(version) <= version_key(until)


def bound(target: Target, version: str) -> Definition | None:
    """What the target is in a release, if it is there with the arguments that its hook reads."""
    definition = release(version).function(target.module, target.attribute)
    if definition is None or not set(target.reads) <= definition.arguments:
        return None
    return definition


def name_of(target: Target) -> str:
    return f"{target.name} as {target.module}.{target.attribute} since {target.since}"


def test_the_range_has_both_ends_and_enough_between() -> None:
    assert RELEASES[0] == "0.4.1"
    assert RELEASES[-1] == "0.5.23"
    assert len(RELEASES) >= 20
    assert sorted(RELEASES, key=version_key) == list(RELEASES)


def test_since_and_until_name_releases_that_are_read() -> None:
    named = {target.since for target in TARGETS} | {target.until for target in TARGETS}
    assert named - {None} <= set(RELEASES)


@pytest.mark.parametrize("version", RELEASES)
def test_every_target_is_where_the_table_says(version: str) -> None:
    missing = [
        name_of(target)
        for target in TARGETS
        if expected(target, version) and bound(target, version) is None
    ]
    assert missing == []


@pytest.mark.parametrize("version", RELEASES)
def test_a_target_is_a_coroutine_where_the_table_says_so(version: str) -> None:
    found = [(target, bound(target, version)) for target in TARGETS if expected(target, version)]
    other = [
        name_of(target)
        for target, definition in found
        if definition is not None and definition.coroutine != target.coroutine
    ]
    assert other == []


@pytest.mark.parametrize("version", RELEASES)
def test_no_target_is_where_the_table_does_not_say(version: str) -> None:
    covered = {
        (target.name, bound(target, version)) for target in TARGETS if expected(target, version)
    }
    # A method that moved into a base class is found under its old place too: the same function,
    # which another entry of the same name has already.
    unforeseen = [
        name_of(target)
        for target in TARGETS
        if not expected(target, version)
        and bound(target, version) is not None
        and (target.name, bound(target, version)) not in covered
    ]
    assert unforeseen == []


@pytest.mark.parametrize("version", RELEASES)
def test_nothing_that_touches_weights_is_unknown(version: str) -> None:
    hooked = {target.attribute for target in TARGETS if bound(target, version)}
    unknown = {
        f"{class_name}.{method}"
        for module, class_name in OWNERS
        for method in release(version).methods(module, class_name)
        if SUSPICIOUS.fullmatch(method)
    }
    assert unknown - hooked - NO_HOOK.keys() == set()


def test_no_hook_is_excused_that_no_release_has() -> None:
    methods = {
        f"{class_name}.{method}"
        for version in RELEASES
        for module, class_name in OWNERS
        for method in release(version).methods(module, class_name)
    }
    assert NO_HOOK.keys() - methods == set()


def test_every_meaning_is_a_method_of_the_translator() -> None:
    assert [target for target in TARGETS if not callable(getattr(Translator, target.meaning))] == []


def test_every_hook_is_in_the_document() -> None:
    assert {name for names in WAYS.values() for name in names} == {
        target.name for target in TARGETS
    }


def table() -> str:
    lines = [
        "| SGLang | " + " | ".join(WAYS) + " |",
        "|---|" + ":-:|" * len(WAYS),
    ]
    for version in reversed(RELEASES):
        cells = []
        for names in WAYS.values():
            here = [target for target in TARGETS if target.name in names and bound(target, version)]
            cells.append("hooked" if here else "-")
        lines.append(f"| {version} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(text: str) -> str:
    """The document with the table as it is now."""
    begin, end = "<!-- generated: begin -->\n", "\n<!-- generated: end -->"
    before, found, rest = text.partition(begin)
    assert found, f"{DOCUMENT} has lost its marker {begin!r}"
    _, found, after = rest.partition(end)
    assert found, f"{DOCUMENT} has lost its marker {end!r}"
    return before + begin + table() + end + after


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text()
    assert document(text) == text, f"PYTHONPATH=tests/shared python {__file__} writes it anew"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
