# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What counts as an update, as a failure and as undefined weights, whatever SGLang's calls are."""

from __future__ import annotations

import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from standins import (
    Answer,
    IpcModelLoader,
    Rank,
    Request,
    Scheduler,
    WeightCacheDaemon,
    answer,
    fail,
    get_model_loader,
    model,
    rebalanced,
    session,
    update_expert_location_with_recovery,
)

from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.hooks.targets import (
    EPLB_MANAGER,
    EXPORTER,
    IPC_LOADER,
    LOADER,
    SCHEDULER,
    WEIGHT_CACHE_DAEMON,
)
from sglang_weight_exporter.ledger import IDLE_SECONDS
from sglang_weight_exporter.store.tables import open_tables


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


# Sessions, from 0.5.21 on.


@pytest.mark.parametrize("handed_over", [["no pair"], [1], 7, [("name", torch.ones(4), "more")]])
def test_tensors_in_another_form_than_sglangs_cost_their_bytes_and_no_count(
    rank: Rank, handed_over: Any
) -> None:
    runner = rank.runner()
    updater = runner.weight_updater
    updater.begin_weight_update()
    updater.update_weights_from_tensor(handed_over)
    updater.end_weight_update(run_post_load=False)
    counts = rank.role().updates["tensor"]
    assert (counts.updates, counts.calls, counts.nbytes) == (1, 1, None)
    assert rank.installation.errors == {}


def test_a_session_is_one_update_of_its_calls(rank: Rank) -> None:
    runner = rank.runner()
    session(runner, loads=3)
    assert rank.totals() == {"tensor": (1, 0, 3)}
    assert rank.role().in_progress is None


def test_a_session_without_a_call_was_written_by_a_peer(rank: Rank) -> None:
    session(rank.runner(), loads=0)
    assert rank.totals() == {"p2p": (1, 0, 1)}


def test_a_draft_that_a_session_did_not_write_is_no_peer_to_peer_update(rank: Rank) -> None:
    target, draft = rank.runner(), rank.runner(is_draft_worker=True)
    for runner in (target, draft):
        runner.weight_updater.begin_weight_update()
    target.weight_updater.update_weights_from_tensor([])
    for runner in (target, draft):
        runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"tensor": (1, 0, 1)}
    assert rank.totals("draft") == {}
    assert rank.role("draft").in_progress is None


def test_the_next_session_ends_what_a_bucket_wrote_outside_of_the_last(rank: Rank) -> None:
    """In a session of the target alone, `selector="all"` writes the draft too."""
    target, draft = rank.runner(), rank.runner(is_draft_worker=True)
    target.weight_updater.begin_weight_update()
    for runner in (target, draft):
        runner.weight_updater.update_weights_from_tensor([])
    target.weight_updater.end_weight_update(run_post_load=False)
    target.weight_updater.begin_weight_update()
    assert rank.totals("draft") == {"tensor": (1, 0, 1)}
    assert rank.role("draft").in_progress is None
    target.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals() == {"tensor": (1, 0, 1), "p2p": (1, 0, 1)}


def test_a_session_whose_only_load_failed_is_no_peer_to_peer_update(rank: Rank) -> None:
    partial = answer(
        False,
        "Failed to update parameter online: x. The full weights of the "
        "ModelRunner are partially updated. Please discard the whole weights.",
    )
    target = rank.runner(answers={"distributed": partial})
    draft = rank.runner(is_draft_worker=True)
    for runner in (target, draft):
        runner.weight_updater.begin_weight_update()
    target.weight_updater.load_weights_from_distributed([])
    for runner in (target, draft):
        runner.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals() == {"distributed": (0, 1, 1)}
    assert rank.totals("draft") == {}
    assert rank.last_update().effect == "undefined"


def test_a_bucket_that_did_not_arrive_for_a_draft_alone_is_no_peers_write(rank: Rank) -> None:
    """The target receives, and the session is the draft's."""
    target = rank.runner(answers={"receive": fail(RuntimeError("connection closed"))})
    draft = rank.runner(is_draft_worker=True)
    draft.weight_updater.begin_weight_update()
    with pytest.raises(RuntimeError, match="connection closed"):
        target.weight_updater.receive_weights_from_distributed(names=["a"])
    draft.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals("draft") == {}
    assert rank.role("draft").in_progress is None


def test_tensors_that_did_not_arrive_change_nothing(rank: Rank) -> None:
    runner = rank.runner(answers={"receive": fail(RuntimeError("connection closed"))})
    runner.weight_updater.begin_weight_update()
    with pytest.raises(RuntimeError, match="connection closed"):
        runner.weight_updater.receive_weights_from_distributed(names=["a"])
    runner.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals()["distributed"][:2] == (0, 1)
    assert rank.last_update().effect == "unchanged"
    assert "connection closed" in rank.last_update().message


def test_half_of_the_buckets_is_undefined(rank: Rank) -> None:
    runner = rank.runner(answers={"receive": fail(RuntimeError("connection closed"))})
    runner.weight_updater.begin_weight_update()
    runner.weight_updater.load_weights_from_distributed([])
    with pytest.raises(RuntimeError):
        runner.weight_updater.receive_weights_from_distributed(names=["a"])
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals()["distributed"][:2] == (0, 1)
    assert rank.last_update().effect == "undefined"


def test_a_session_that_cannot_be_ended_stays_open(rank: Rank) -> None:
    runner = rank.runner(answers={"end": fail(RuntimeError("repacking failed"))})
    with pytest.raises(RuntimeError, match="repacking failed"):
        session(runner, loads=1)
    assert rank.totals() == {"tensor": (0, 1, 1)}
    assert rank.last_update().effect == "undefined"
    assert rank.role().in_progress is not None


def test_a_session_is_in_progress_between_its_calls(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.begin_weight_update()
    assert rank.in_progress().idle_seconds is None
    rank.clock.now += 100 * IDLE_SECONDS
    runner.weight_updater.update_weights_from_tensor([])
    assert rank.in_progress().calls == 1
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"tensor": (1, 0, 1)}


def test_reset_tensors_inside_a_session_does_not_end_it(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.begin_weight_update()
    runner.check_weights("reset_tensors")
    assert rank.role().in_progress is not None
    runner.weight_updater.update_weights_from_tensor([])
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"external": (0, 0, 1), "tensor": (1, 0, 1)}


# Updates of several calls, until 0.5.20: SGLang reports no end.


def test_the_request_that_flushes_the_cache_ends_an_update(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner())
    for flush_cache in (False, False, True):
        scheduler.update_weights_from_tensor(Request(flush_cache=flush_cache))
    assert rank.totals() == {"tensor": (1, 0, 3)}
    assert rank.role().in_progress is None


def test_another_weight_version_begins_another_update(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner())
    for version in ("1", "1", "2"):
        scheduler.update_weights_from_tensor(Request(flush_cache=False, weight_version=version))
    assert rank.totals() == {"tensor": (1, 0, 3)}
    assert rank.in_progress().calls == 1
    assert rank.last_update().weight_version == "1"


def test_a_pause_begins_another_update(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner())
    scheduler.update_weights_from_tensor(Request(flush_cache=False))
    assert rank.in_progress().idle_seconds == IDLE_SECONDS
    rank.clock.now += IDLE_SECONDS + 1
    scheduler.update_weights_from_tensor(Request(flush_cache=False))
    assert rank.totals() == {"tensor": (1, 0, 2)}


def test_generation_that_goes_on_ends_an_update_of_buckets(rank: Rank) -> None:
    """slime before 0.5.21: it pauses, flushes, sends each bucket with `flush_cache: false`, and
    continues."""

    class Scheduler:
        def pause_generation(self, recv_req: Any) -> None: ...

        def continue_generation(self, recv_req: Any) -> None: ...

    generation, scheduler = rank.hook(SCHEDULER, Scheduler)(), rank.scheduler(rank.runner())
    for version in ("1", "2"):
        generation.pause_generation(Request(mode="abort"))
        for _ in range(3):
            scheduler.update_weights_from_tensor(Request(flush_cache=False, weight_version=version))
        assert rank.in_progress().calls == 3
        generation.continue_generation(Request())
        assert rank.role().in_progress is None
        assert rank.last_update().weight_version == version
    assert rank.totals() == {"tensor": (2, 0, 6)}


def test_generation_that_goes_on_ends_no_session(rank: Rank) -> None:
    class Scheduler:
        def continue_generation(self, recv_req: Any) -> None: ...

    generation, runner = rank.hook(SCHEDULER, Scheduler)(), rank.runner()
    runner.weight_updater.begin_weight_update()
    runner.weight_updater.update_weights_from_tensor([])
    generation.continue_generation(Request())
    assert rank.in_progress().calls == 1
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"tensor": (1, 0, 1)}


def test_a_call_longer_than_the_pause_does_not_look_like_its_end(rank: Rank) -> None:
    seen = []

    def slow(*arguments: Any, **keywords: Any) -> tuple[bool, str]:
        seen.append(rank.in_progress())
        return True, "Success"

    scheduler = rank.scheduler(rank.runner(answers={"tensor": slow}))
    for _ in range(2):
        scheduler.update_weights_from_tensor(Request(flush_cache=False))
    assert [progress.calls for progress in seen] == [0, 1]
    # For readers: an end will come, so that no pause is one.
    assert [progress.idle_seconds for progress in seen] == [None, None]
    assert rank.in_progress().idle_seconds == IDLE_SECONDS


def test_another_way_begins_another_update(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner())
    scheduler.update_weights_from_tensor(Request(flush_cache=False))
    scheduler.update_weights_from_disk(Request())
    assert rank.totals() == {"tensor": (1, 0, 1), "disk": (1, 0, 1)}


def test_an_update_changes_no_pool_and_reads_none(rank: Rank) -> None:
    class Pool:
        __module__ = "sglang.srt.mem_cache.memory_pool"

        def __init__(self) -> None:
            self.k_buffer = [torch.zeros(8, 4)]

    runner = rank.runner(token_to_kv_pool=Pool())
    (usage,) = rank.role().kv_pools or ()
    assert usage.nbytes == 8 * 4 * 4
    runner.token_to_kv_pool.k_buffer.append(torch.zeros(8, 4))  # Whoever looks sees it.
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert rank.role().kv_pools == (usage,)


def test_calls_without_a_scheduler_are_updates_from_disk_at_once(rank: Rank) -> None:
    rank.runner().weight_updater.update_weights_from_disk("other", "auto")
    assert rank.totals() == {"disk": (1, 0, 1)}


def test_readers_hold_up_an_update_once_and_not_each_call_of_it(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime", reader_wait_seconds=2.0)
    scheduler = rank.scheduler(rank.runner())
    (reader,) = open_tables(rank.directory)
    waited = []
    with reader.hold():
        for _ in range(5):
            started = time.monotonic()
            scheduler.update_weights_from_tensor(Request(flush_cache=False))
            waited.append(time.monotonic() - started)
    assert waited[0] >= 2.0
    assert sum(waited[1:]) < 4 * 2.0
    assert rank.in_progress().calls == 5


# Several model runners.


def test_each_runner_counts_its_own(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner(), rank.runner(is_draft_worker=True))
    scheduler.update_weights_from_disk(Request())
    assert rank.totals("target") == rank.totals("draft") == {"disk": (1, 0, 1)}
    assert len({event.update.trace_id for event in rank.events() if event.update.source}) == 1


def test_a_draft_that_fails_after_the_target(rank: Rank) -> None:
    rollback = answer(False, "Failed to update weights: x.\nRolling back to original weights.")
    draft = rank.runner(is_draft_worker=True, answers={"disk": rollback})
    target = rank.runner()
    rank.scheduler(target, draft).update_weights_from_disk(Request())
    assert rank.totals("target") == {"disk": (1, 0, 1)}
    assert rank.totals("draft") == {"disk": (0, 1, 1)}
    assert rank.last_update("draft").effect == "undefined"


def test_the_draft_may_come_first(rank: Rank) -> None:  # EAGLE, 0.5.5 to 0.5.20
    target, draft = rank.runner(), rank.runner(is_draft_worker=True)
    rank.scheduler(draft, target).update_weights_from_tensor(Request())
    assert rank.totals("target") == rank.totals("draft") == {"tensor": (1, 0, 1)}


def test_a_peer_that_writes_into_target_and_draft_updates_both(rank: Rank) -> None:
    """As the scheduler of 0.5.22 fans a session out: `run_post_load` is the same for all."""
    updaters = [rank.runner().weight_updater, rank.runner(is_draft_worker=True).weight_updater]
    for number in (1, 2):
        for updater in updaters:
            updater.begin_weight_update()
        rank.clock.now += 60
        for updater in updaters:
            updater.end_weight_update(run_post_load=True)
        assert rank.totals("target") == rank.totals("draft") == {"p2p": (number, 0, number)}
    began = [rank.role(name).update_started_at for name in ("target", "draft")]
    assert abs((began[0] or 0) - (began[1] or 0)) < 1


def test_a_load_that_failed_is_no_peers_write(rank: Rank) -> None:
    """The scheduler runs `post_load_weights` all the same, and stops at the first failure."""
    target = rank.runner(answers={"tensor": answer(False, DERIVED)})
    draft = rank.runner(is_draft_worker=True)
    for runner in (target, draft):
        runner.weight_updater.begin_weight_update()
    rank.scheduler(target, draft).update_weights_from_tensor(Request(flush_cache=False))
    for runner in (target, draft):
        runner.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals("target") == {"tensor": (0, 1, 1)}
    assert rank.totals("draft") == {}


# Outcomes.


def test_weights_that_changed_and_a_cache_that_was_not_flushed(rank: Rank) -> None:
    rank.scheduler(rank.runner(), flushes=False).update_weights_from_disk(Request())
    assert rank.totals() == {"disk": (1, 1, 1)}
    update = rank.last_update()
    assert (update.succeeded, update.effect) == (False, "changed")
    assert "cache was not flushed" in update.message


ROLLBACK = "Failed to update weights: x.\nRolling back to original weights."
CACHE = "[weight_cache] update_weights is not supported while the weight cache is active"
DERIVED = "Online weight updates are not supported while compensated mHC weight splits are active"
NO_GROUP = "Group g not in []. Please call `init_weights_update_group` first."
OUTCOMES: dict[str, tuple[str, Answer, str]] = {
    "disk-loader": ("disk", answer(False, "Failed to get model loader: x."), "unchanged"),
    "disk-path": ("disk", answer(False, "Failed to get weights iterator: x."), "unchanged"),
    "disk-rollback": ("disk", answer(False, ROLLBACK), "undefined"),
    "disk-rollback-fails": ("disk", fail(OSError("gone")), "undefined"),
    "disk-weight-cache": ("disk", fail(RuntimeError(CACHE)), "unchanged"),
    "disk-derived": ("disk", answer(False, DERIVED), "unchanged"),
    "tensor-shape": ("tensor", fail(AssertionError("Attempted to load weight")), "undefined"),
    "tensor-format": ("tensor", fail(NotImplementedError("Unknown load_format=x")), "unchanged"),
    "tensor-derived": ("tensor", answer(False, DERIVED), "unchanged"),
    "ipc-import": ("ipc", answer(False, "IPC weight update failed: ImportError x"), "unchanged"),
    "ipc-other": ("ipc", answer(False, "zmq"), "undefined"),
    "no-group": ("distributed", fail(AssertionError(NO_GROUP)), "unchanged"),
    "no-group-ever": (
        "distributed",
        fail(AttributeError("'ModelRunner' object has no attribute '_model_update_group'")),
        "unchanged",
    ),
    "partial": ("distributed", answer(False, "x are partially updated. Please"), "undefined"),
}


@pytest.mark.parametrize(("source", "result", "effect"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_failure_says_whether_weights_are_undefined(
    rank: Rank, source: str, result: Answer, effect: str
) -> None:
    updater = rank.runner(answers={source: result}).weight_updater
    calls = {
        "disk": lambda: updater.update_weights_from_disk("other", "auto"),
        "tensor": lambda: updater.update_weights_from_tensor([]),
        "ipc": lambda: updater.update_weights_from_ipc(Request()),
        "distributed": lambda: updater.load_weights_from_distributed([]),
    }
    try:
        returned = calls[source]()
    except Exception as error:
        with pytest.raises(type(error)):  # SGLang's own, untouched
            result()
    else:
        assert returned == result()
    rank.clock.now += IDLE_SECONDS + 1
    updater.begin_weight_update()  # what is still open has ended before
    assert rank.totals()[source] == (0, 1, 1)
    assert rank.last_update().effect == effect


def test_an_exception_in_a_session_is_reported_before_it_ends_the_engine(rank: Rank) -> None:
    runner = rank.runner(answers={"tensor": fail(ValueError("shape"))})
    runner.weight_updater.begin_weight_update()
    with pytest.raises(ValueError, match="shape"):
        rank.scheduler(runner).update_weights_from_tensor(Request())
    assert rank.totals() == {"tensor": (0, 1, 1)}
    assert rank.events()[-1].update.effect == "undefined"


NO_SESSION = (
    "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
)


def test_a_request_that_sglang_refuses_is_a_failure_with_its_reason(rank: Rank) -> None:
    """0.5.21 and later, without a session: no runner is called."""
    runners = rank.runner(), rank.runner(is_draft_worker=True)
    scheduler = rank.scheduler(*runners, refuses=NO_SESSION)
    before = rank.role()
    assert not scheduler.update_weights_from_tensor(Request()).success
    assert rank.totals("target") == {"tensor": (0, 1, 0)}
    assert rank.totals("draft") == {}
    update = rank.last_update()
    assert (update.succeeded, update.effect, update.message) == (False, "unchanged", NO_SESSION)
    assert rank.events()[-1].update == update
    assert sum(update.phases.values()) == pytest.approx(update.ended_at - update.started_at)
    role = rank.role()
    assert role.in_progress is None
    assert (role.updated_at, role.table) == (before.updated_at, before.table)


def test_a_refused_request_is_no_failure_of_what_goes_on(rank: Rank) -> None:
    runner = rank.runner()
    updater = runner.weight_updater
    updater.begin_weight_update()
    updater.update_weights_from_tensor([])
    rank.scheduler(runner, refuses="no such group").update_weights_from_tensor(Request())
    updater.update_weights_from_tensor([])
    updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"tensor": (1, 1, 2)}
    assert rank.last_update().succeeded


# Experts that move between ranks, which needs several GPUs.


def test_a_rebalance_is_one_update(rank: Rank) -> None:
    rank.runner()
    rebalanced(rank, lambda: None)
    assert rank.totals() == {"eplb": (1, 0, 3)}


def test_a_rebalance_goes_on_beside_an_update_that_nobody_ends(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.update_weights_from_tensor([])  # More might come.
    function = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    chunks = rank.balancers(lambda: function(move=lambda: None), 2).rebalance()
    next(chunks)
    next(chunks)
    assert rank.in_progress().source == "tensor"
    settled = rank.role().settled(rank.clock.now + 2 * IDLE_SECONDS)
    assert settled.updates["tensor"].updates == 1
    assert settled.in_progress is not None
    assert settled.in_progress.source == "eplb"
    assert list(chunks) == []
    assert rank.role().settled(rank.clock.now + 2 * IDLE_SECONDS).in_progress is None
    assert rank.totals()["eplb"] == (1, 0, 2)


def test_missing_experts_from_disk_belong_to_the_rebalance(rank: Rank) -> None:
    runner = rank.runner()
    rebalanced(rank, lambda: runner.weight_updater.update_weights_from_disk("tiny", "auto"))
    assert rank.totals() == {"eplb": (1, 0, 6)}


class DefaultModelLoader:
    """Says what files a checkpoint is in, before it takes tensors out of them."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def _prepare_weights(self, *arguments: Any) -> tuple[str, list[str], bool]:
        return "", self.files, True


def test_missing_experts_bring_less_than_the_files_that_they_are_in(
    rank: Rank, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(bytes(1000))
    loader = rank.hook(LOADER, DefaultModelLoader)([str(checkpoint)])

    def load() -> tuple[bool, str]:
        loader._prepare_weights()
        return True, "Success"

    runner = rank.runner(answers={"disk": load})
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert rank.last_update().nbytes == 1000
    rebalanced(rank, lambda: runner.weight_updater.update_weights_from_disk("tiny", "auto"))
    assert rank.last_update().source == "eplb"
    assert not rank.last_update().nbytes


def test_missing_experts_that_cannot_be_read(rank: Rank) -> None:
    runner = rank.runner(answers={"disk": answer(False, ROLLBACK)})
    rebalanced(rank, lambda: runner.weight_updater.update_weights_from_disk("tiny", "auto"))
    assert rank.totals()["eplb"][:2] == (0, 1)
    assert rank.last_update().effect == "undefined"


def test_a_rebalance_that_moves_nothing_is_no_update(rank: Rank) -> None:
    rank.runner()
    rebalanced(rank, lambda: None, chunks=0)
    assert rank.totals() == {}


# What is no update.


def test_checking_is_counted_apart_and_resetting_overwrites(rank: Rank) -> None:
    runner = rank.runner()
    runner.check_weights("snapshot")
    with pytest.raises(ValueError, match="differ"):
        runner.check_weights("compare")
    assert rank.totals() == {}
    runner.check_weights("reset_tensors")
    assert rank.totals() == {"external": (1, 0, 1)}
    counts = rank.snapshot().operations["check_weights"]
    assert (counts.calls, counts.failures) == (3, 1)


class WeightExporter:
    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> Any:
        return [1.0] if name == "there" else None


def test_reading_what_is_not_there_is_a_failure(rank: Rank) -> None:
    rank.runner()
    exporter = rank.hook(EXPORTER, WeightExporter)()
    assert exporter.get_weights_by_name("there") == [1.0]
    assert exporter.get_weights_by_name("not there") is None
    counts = rank.snapshot().operations["get_weights_by_name"]
    assert (counts.calls, counts.failures) == (2, 1)


# Loads.


def test_an_overlapped_load_has_ended_when_its_values_are_there(rank: Rank) -> None:
    runner = rank.runner(startup_weight_load=object())
    runner.alloc_memory_pool()
    assert rank.role().loaded_at is None
    assert rank.events() == []
    rank.clock.now += 60
    runner.finalize_startup_weight_load()
    assert (rank.role().load_seconds or 0) > 60
    assert rank.role().updated_at == rank.role().loaded_at
    (event,) = rank.events()
    assert (event.update.action, event.update.succeeded) == ("load", True)
    assert event.update.ended_at == rank.role().loaded_at


def test_a_draft_adds_only_what_it_does_not_share(rank: Rank) -> None:
    target = rank.runner()
    draft = rank.runner(is_draft_worker=True)
    alone = rank.weights("draft")[0].nbytes
    draft.model.embed_tokens = target.model.embed_tokens
    draft.alloc_memory_pool()
    shared = target.model.embed_tokens.weight.nbytes
    assert rank.weights("draft")[0].nbytes == alone - shared
    assert rank.weights("draft")[0].shared == shared
    assert rank.weights("draft")[0].tensors == 2


def test_drafts_of_several_layers_have_roles_of_their_own(rank: Rank) -> None:
    runners = [rank.runner()]
    runners += [rank.runner(is_draft_worker=True, draft_model_idx=index) for index in range(3)]
    names = [role.name for role in rank.snapshot().roles]
    assert names == ["target", "draft_0", "draft_1", "draft_2"]


# Weights that a weight-cache daemon holds.


def test_weights_of_a_daemon_count_there_and_not_in_the_engine(rank: Rank) -> None:
    loaders = rank.hook(IPC_LOADER, IpcModelLoader)
    mapped = loaders(model())._load_zero_copy_mode(None, None, {}, None)
    runner = rank.runner(model=mapped)
    whole = sum(tensor.nbytes for tensor in mapped.parameters())
    (usage,) = rank.weights()
    assert (usage.nbytes, usage.shared, usage.tensors) == (0, whole, 2)
    assert rank.role().resident == {"cpu": 0}
    adapter = torch.nn.Parameter(torch.zeros(16))
    runner.model.adapter = adapter  # of the engine's own
    runner.alloc_memory_pool()
    (usage,) = rank.weights()
    assert (usage.nbytes, usage.shared, usage.tensors) == (adapter.nbytes, whole, 3)


@pytest.mark.parametrize("alias", [None, "__main__", "__mp_main__"])
def test_a_daemon_is_a_rank_of_its_own(
    rank: Rank, alias: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alias is None:
        daemons = rank.hook(WEIGHT_CACHE_DAEMON, WeightCacheDaemon)
    else:  # `python -m`, whose module nobody imports under its own name
        daemons = type("WeightCacheDaemon", (WeightCacheDaemon,), dict(vars(WeightCacheDaemon)))
        main = ModuleType(alias)
        main.__spec__ = ModuleSpec(WEIGHT_CACHE_DAEMON, None)
        vars(main)["WeightCacheDaemon"] = daemons
        monkeypatch.setitem(sys.modules, alias, main)
    daemon = daemons()
    rank.hook(LOADER, get_model_loader)()
    daemon._export_state()
    snapshot = rank.snapshot()
    assert (snapshot.engine.name, snapshot.engine.model_path) == ("weight-cache", "tiny")
    assert (snapshot.ranks.tp, snapshot.ranks.pp) == (1, 0)
    (role,) = snapshot.roles
    assert (role.name, role.device) == ("weight_cache", "cpu")
    assert (role.load_seconds or 0) > 0
    (usage,) = rank.weights("weight_cache")
    assert usage.nbytes == sum(tensor.nbytes for tensor in daemon.model.parameters())
    (event,) = rank.events()
    assert (event.update.action, event.update.succeeded) == ("load", True)


# Memory that is given back.


class OnGpu(Segments):
    """All of the memory saver's regions: its releases need a GPU."""

    def outside_saver(
        self, ptr: Any, nbytes: Any, device: Any, device_values: tuple[str, ...]
    ) -> dict[str, int]:
        return dict.fromkeys(device_values, 0)


def test_weights_that_are_not_on_a_gpu_stay_when_those_of_the_gpu_are_released(rank: Rank) -> None:
    runner = rank.runner(memory_saver_adapter=SimpleNamespace(enabled=True))
    everything = sum(part.nbytes for part in rank.weights())
    rank.scheduler(runner).release_memory_occupation(Request(tags=["weights"]))
    assert rank.role().resident == {"cpu": everything}


@pytest.mark.parametrize(
    ("adapter", "tags", "resident"),
    [
        (SimpleNamespace(enabled=True), None, 0),
        (SimpleNamespace(enabled=True), [], 0),
        (SimpleNamespace(enabled=True), ["weights"], 0),
        (SimpleNamespace(enabled=True), ["kv_cache"], None),
        (SimpleNamespace(enabled=False), None, None),  # answered, and nothing done
        (None, None, None),
    ],
)
def test_released_weights_keep_their_bytes_and_have_none_resident(
    rank: Rank, adapter: Any, tags: list[str] | None, resident: int | None
) -> None:
    rank.allocations = OnGpu.none()
    runner = rank.runner(memory_saver_adapter=adapter)
    scheduler = rank.scheduler(runner)
    before = rank.weights()
    everything = sum(part.nbytes for part in before)
    scheduler.release_memory_occupation(Request(tags=tags))
    assert rank.weights() == before
    assert rank.role().resident == {"cpu": everything if resident is None else resident}
    scheduler.resume_memory_occupation(Request(tags=tags))
    assert rank.role().resident == {"cpu": everything}


# Ranks, wherever a release keeps them.


class Unset:
    """As SGLang's context before it is set up."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not initialized")


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"tp_rank": 1, "pp_rank": 2}, (1, 2, 3)),
        ({"tp_rank": 1, "pp_rank": 2, "dp_rank": 3}, (1, 2, 3)),
        ({"ps": SimpleNamespace(tp_rank=1, pp_rank=2, dp_rank=3)}, (1, 2, 3)),
        ({"ps": Unset()}, (0, 0, 3)),
    ],
)
def test_ranks(rank: Rank, attributes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    rank.hook(SCHEDULER, Scheduler)(lambda: rank.runner(**attributes), dp_rank=3)
    ranks = rank.snapshot().ranks
    assert (ranks.tp, ranks.pp, ranks.dp) == expected


def test_a_draft_does_not_say_which_rank_this_is(rank: Rank) -> None:
    rank.runner(tp_rank=1, pp_rank=1)
    rank.runner(is_draft_worker=True, tp_rank=0, pp_rank=0)
    assert (rank.snapshot().ranks.tp, rank.snapshot().ranks.pp) == (1, 1)
