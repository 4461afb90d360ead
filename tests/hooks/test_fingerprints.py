# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When weights are read, when never, and what is said where they were not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import Rank, Request, Scheduler, answer, fail, model, rebalanced, session

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint.tensors import (
    Fingerprinter,
    FingerprintError,
    FingerprintTimeoutError,
)
from sglang_weight_exporter.hooks.targets import SCHEDULER
from sglang_weight_exporter.ledger import IDLE_SECONDS
from sglang_weight_exporter.records.fingerprints import FingerprintCounts
from sglang_weight_exporter.records.weights import Kind
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


class Counting(Fingerprinter):
    """Counts how often memory is read, and can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0
        self.error: Exception | None = None
        self.limits: list[float] = []
        self.bytes_read: list[int] = []

    def __call__(
        self, tensors: Sequence[torch.Tensor], *, limit_seconds: float = float("inf"), **more: Any
    ) -> Any:
        self.times += 1
        self.limits.append(limit_seconds)
        self.bytes_read += [tensor.nbytes for tensor in tensors]
        if self.error is not None:
            raise self.error
        return super().__call__(tensors, limit_seconds=limit_seconds, **more)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def rank(tmp_path: Path, counting: Counting) -> Rank:
    return Rank(tmp_path / "runtime", fingerprinter=counting)


def saving_memory(rank: Rank, **settings: Any) -> Any:
    class MemorySaver:
        enabled = True

    server_args = SimpleNamespace(port=30000, model_path="tiny", dp_size=1, **settings)
    return rank.runner(memory_saver_adapter=MemorySaver(), server_args=server_args)


def of(rank: Rank) -> str:
    table = rank.role().table
    assert table is not None
    return table.fingerprint


def counts(rank: Rank) -> FingerprintCounts:
    found = rank.role().fingerprints
    assert found is not None
    return found


def expected(runner: Any) -> str:
    return fingerprint.of_rank(
        {
            name: fingerprint.of_bytes(parameter.detach().numpy().tobytes())
            for name, parameter in runner.model.named_parameters()
        }
    )


def add_one(runner: Any) -> None:
    with torch.no_grad():
        runner.model.proj.weight += 1


def test_a_load_and_each_update_leave_what_memory_holds(rank: Rank) -> None:
    runner = rank.runner()
    loaded = of(rank)
    assert loaded == expected(runner)
    runner.weight_updater.update_weights_from_disk("same", "auto")
    assert of(rank) == loaded
    add_one(runner)
    assert of(rank) == loaded  # Nobody has read them.
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert of(rank) == expected(runner) != loaded
    table = rank.role().table
    assert table is not None
    assert table.fingerprint_seconds is not None


def test_every_tensor_is_in_the_tables_file(rank: Rank) -> None:
    runner = rank.runner()
    add_one(runner)
    runner.weight_updater.update_weights_from_disk("other", "auto")
    ((directory, _),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    ref = rank.role().table
    assert ref is not None
    table = directory.table(ref.file)
    from sglang_weight_exporter.weight_table import table_fingerprints

    assert table_fingerprints(table) == {
        name: fingerprint.of_bytes(parameter.detach().numpy().tobytes())
        for name, parameter in runner.model.named_parameters()
    }
    assert len(list(directory.path.glob("*.table"))) == 1


def test_without_the_setting_nothing_is_read(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime")
    rank.runner()
    assert of(rank) == ""
    assert rank.role().fingerprints is None


def test_without_the_setting_an_update_begins_without_a_capture(tmp_path: Path) -> None:
    rank = Rank(tmp_path / "runtime")
    runner = rank.runner()
    before = rank.snapshot().snapshot_seconds
    runner.weight_updater.begin_weight_update()
    assert rank.in_progress().source is None
    assert rank.snapshot().snapshot_seconds == before


def test_nothing_is_read_inside_a_session(rank: Rank, counting: Counting) -> None:
    runner = rank.runner()
    runner.weight_updater.begin_weight_update()
    before = counting.times
    for _ in range(3):
        runner.weight_updater.update_weights_from_tensor([])
    runner.check_weights("checksum")
    assert counting.times == before
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert counting.times == before + 1
    assert counts(rank).modified == {"serving": {}}


def asks(scheduler: Any, part: int, parts: int) -> None:
    """What `verify` asks for."""
    names = {"sglang_weight_exporter_part": part, "sglang_weight_exporter_parts": parts}
    scheduler.set_internal_state(Request(server_args=names))


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_whoever_asks_for_all_parts_learns_what_is_there(
    rank: Rank, counting: Counting, parts: int
) -> None:
    runner = rank.runner()
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    add_one(runner)
    loaded, read, before = of(rank), [], rank.role().table
    for part in range(parts):
        assert of(rank) == loaded  # Until the last.
        counting.bytes_read.clear()
        asks(scheduler, part, parts)
        read.append(sum(counting.bytes_read))
    assert of(rank) == expected(runner) != loaded
    assert counts(rank).modified == {"serving": {"parameter": 1}}
    assert sum(read) == sum(each.nbytes for each in runner.model.parameters())
    assert max(read) < sum(read) or parts == 1
    after = rank.role().table
    assert before is not None
    assert after is not None
    assert after.captured_at > before.captured_at
    assert rank.snapshot().operations == {}


def test_an_update_whose_end_nobody_reports_is_over_for_who_asks_later(rank: Rank) -> None:
    """slime's pattern until 0.5.20: no bucket asks for a flush, and there is no session."""
    runner = rank.runner(answers={})
    runner.answers["tensor"] = writes(runner)
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    loaded = of(rank)
    for _ in range(3):
        rank.scheduler(runner).update_weights_from_tensor(Request(flush_cache=False))
    asks(scheduler, 0, 1)
    assert (rank.in_progress().calls, of(rank)) == (3, loaded)  # A fourth may come.
    rank.clock.now += IDLE_SECONDS + 1
    asks(scheduler, 0, 1)
    assert rank.role().in_progress is None
    assert of(rank) == expected(runner) != loaded
    assert rank.totals() == {"tensor": (1, 0, 3)}
    assert counts(rank).modified == {"serving": {}}


def test_parts_of_two_updates_are_no_whole(rank: Rank) -> None:
    runner = rank.runner()
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    asks(scheduler, 0, 2)
    add_one(runner)
    runner.weight_updater.update_weights_from_disk("other", "auto")
    updated = rank.role().table
    asks(scheduler, 1, 2)
    assert rank.role().table == updated
    for part in (0, 2, 1):  # Nor are those of which one is missing.
        asks(scheduler, part, 3)
    assert rank.role().table == updated
    assert counts(rank).modified == {}


def test_who_asks_leaves_no_line_in_sglangs_log(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    """A watch would leave one for each part of each round."""
    rank.runner()
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    caplog.clear()
    asks(scheduler, 0, 2)
    asks(scheduler, 1, 2)
    assert caplog.messages == []
    scheduler.set_internal_state(Request(server_args={"page_size": 8}))
    assert caplog.messages == ["Updating page_size is not supported."]


def test_what_else_is_set_is_no_question(rank: Rank, counting: Counting) -> None:
    rank.runner()
    scheduler = rank.hook(SCHEDULER, Scheduler)(lambda: None)
    before = counting.times
    scheduler.set_internal_state(Request(server_args={"pp_max_micro_batch_size": 8}))
    assert counting.times == before


def test_a_check_that_fails_reads_nothing(rank: Rank, counting: Counting) -> None:
    runner = rank.runner()
    before = counting.times
    with pytest.raises(ValueError, match="differ"):
        runner.check_weights("compare")
    assert counting.times == before
    runner.check_weights("checksum")
    assert counting.times == before + 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FingerprintTimeoutError("too long"), "time_limit"),
        (FingerprintError("a CUDA graph is being captured"), "unsupported"),
        (RuntimeError("CUDA error"), "error"),
    ],
)
def test_a_failure_costs_the_fingerprint_and_not_the_update(
    rank: Rank,
    counting: Counting,
    error: Exception,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = rank.runner()
    assert counts(rank).skipped == {}
    # The first update is read before and after; before the second nothing is known to compare with.
    with caplog.at_level(logging.WARNING):
        counting.error = error
        assert runner.weight_updater.update_weights_from_disk("other", "auto") == (True, "Success")
        runner.weight_updater.update_weights_from_disk("other", "auto")
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    (role,) = snapshot.roles
    assert snapshot.hook_errors == ({"fingerprint": 3} if reason == "error" else {})
    assert role.updates["disk"].updates == 2
    assert role.fingerprints is not None
    assert role.fingerprints.skipped == {reason: 3}
    assert role.table is not None
    assert (role.table.fingerprint, role.table.fingerprint_seconds) == ("", None)
    assert len([record for record in caplog.records if "fingerprint" in record.message]) == 1
    counting.error = None
    runner.weight_updater.update_weights_from_disk("other", "auto")
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    assert snapshot.roles[0].table is not None
    assert snapshot.roles[0].table.fingerprint == expected(runner)


def test_an_update_may_take_less_time_than_a_load(rank: Rank, counting: Counting) -> None:
    runner = rank.runner()
    loads = set(counting.limits)
    counting.limits.clear()
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert max(counting.limits) < min(loads)


def test_released_memory_is_never_read(rank: Rank, counting: Counting) -> None:
    runner = saving_memory(rank)
    scheduler = rank.scheduler(runner)
    loaded, before = of(rank), counting.times
    scheduler.release_memory_occupation(Request(tags=["weights"]))
    assert of(rank) == ""
    runner.weight_updater.update_weights_from_disk("other", "auto")
    runner.check_weights("checksum")
    assert counting.times == before
    assert of(rank) == ""
    add_one(runner)
    scheduler.resume_memory_occupation(Request(tags=["weights"]))
    assert counting.times == before + 1
    assert of(rank) == expected(runner) != loaded


def test_a_released_kv_pool_is_no_reason(rank: Rank) -> None:
    runner = saving_memory(rank)
    rank.scheduler(runner).release_memory_occupation(Request(tags=["kv_cache"]))
    add_one(runner)
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert of(rank) == expected(runner)


def test_after_a_release_that_failed_nothing_is_read(rank: Rank, counting: Counting) -> None:
    """What it released before it failed, nobody knows."""
    runner = saving_memory(rank)
    scheduler = rank.scheduler(runner)
    before = counting.times
    with pytest.raises(TypeError):
        scheduler.release_memory_occupation()
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert counting.times == before
    assert of(rank) == ""


def test_placeholders_have_no_fingerprint(rank: Rank, counting: Counting) -> None:
    runner = rank.runner(startup_weight_load=object())
    assert counting.times == 0
    assert of(rank) == ""
    runner.finalize_startup_weight_load()
    assert of(rank) == expected(runner)


def test_a_tensor_whose_memory_was_given_back_is_left_out(rank: Rank) -> None:
    """As SGLang's DWDP does it with experts: the storage is emptied, the parameter stays."""
    runner = rank.runner()
    runner.model.proj.weight.untyped_storage().resize_(0)
    runner.weight_updater.update_weights_from_disk("other", "auto")
    rest = {
        "embed_tokens.weight": fingerprint.of_bytes(
            runner.model.embed_tokens.weight.detach().numpy().tobytes()
        )
    }
    assert of(rank) == fingerprint.of_rank(rest)
    assert counts(rank).skipped == {}


@pytest.mark.parametrize("name", ["experts/0", "größe", "a\nb", "\udc80"])
def test_a_name_of_any_kind(rank: Rank, name: str) -> None:
    made = model()
    made.register_parameter(name, torch.nn.Parameter(torch.ones(3)))
    rank.runner(model=made)
    assert len(of(rank)) == 32
    assert counts(rank).skipped == {}
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    assert snapshot.hook_errors == {}


def test_a_model_without_tensors(rank: Rank) -> None:
    rank.runner(model=torch.nn.Module())
    assert of(rank) == fingerprint.of_bytes(b"")
    assert counts(rank).skipped == {}


def test_a_check_of_weights_captures_again(rank: Rank) -> None:
    runner = rank.runner()
    add_one(runner)
    assert of(rank) != expected(runner)
    runner.check_weights("checksum")
    assert of(rank) == expected(runner)
    assert rank.totals() == {}


def test_an_update_that_failed_is_looked_at_too(rank: Rank) -> None:
    runner = rank.runner(answers={"disk": fail(RuntimeError("half of it"))})
    add_one(runner)
    with pytest.raises(RuntimeError):
        runner.weight_updater.update_weights_from_disk("other", "auto")
    assert of(rank) == expected(runner)


# --- what changed, and what did not ---------------------------------------------------------------


def writes(runner: Any) -> Callable[..., tuple[bool, str]]:
    """What an update of the stand-in does when it succeeds and brings other weights."""

    def write() -> tuple[bool, str]:
        add_one(runner)
        return True, "Success"

    return write


def without_change(rank: Rank) -> dict[str, int]:
    updates = rank.role().updates
    return {source: each.without_change for source, each in updates.items() if each.without_change}


def test_an_update_that_succeeds_and_changes_nothing_is_counted(rank: Rank) -> None:
    runner = rank.runner(answers={})
    runner.weight_updater.update_weights_from_disk("same", "auto")
    assert without_change(rank) == {"disk": 1}
    runner.answers["disk"] = writes(runner)
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert without_change(rank) == {"disk": 1}
    runner.answers["disk"] = answer(False, "Failed to get weights iterator")
    runner.weight_updater.update_weights_from_disk("nowhere", "auto")
    assert without_change(rank) == {"disk": 1}
    session(runner, loads=2)
    assert without_change(rank) == {"disk": 1, "tensor": 1}
    runner.answers["tensor"] = writes(runner)
    session(runner, loads=2)
    assert without_change(rank) == {"disk": 1, "tensor": 1}
    assert counts(rank).modified["serving"] == {}


def test_without_a_fingerprint_on_both_sides_no_update_is_said_to_have_changed_nothing(
    rank: Rank, counting: Counting
) -> None:
    runner = rank.runner()
    counting.error = FingerprintTimeoutError("too long")
    runner.weight_updater.update_weights_from_disk("same", "auto")
    counting.error = None
    runner.weight_updater.update_weights_from_disk("same", "auto")
    assert without_change(rank) == {}


def test_what_wrote_between_two_updates_is_found_by_a_check_and_before_the_next_update(
    rank: Rank,
) -> None:
    runner = rank.runner(answers={})
    runner.answers["disk"] = writes(runner)
    loaded = of(rank)
    runner.check_weights("checksum")
    assert counts(rank).modified == {"serving": {}}
    add_one(runner)
    runner.check_weights("checksum")
    assert counts(rank).modified == {"serving": {"parameter": 1}}
    table = rank.role().table
    assert table is not None
    assert (table.modified, table.modified_names) == (1, ("proj.weight",))
    runner.check_weights("checksum")  # It still does not hold what the load left.
    assert counts(rank).modified == {"serving": {"parameter": 2}}
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert counts(rank).modified == {"serving": {"parameter": 3}}
    table = rank.role().table
    assert table is not None
    assert (table.modified, table.modified_names) == (0, ())
    runner.check_weights("checksum")
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert counts(rank).modified == {"serving": {"parameter": 3}}
    assert of(rank) == expected(runner) != loaded


def test_what_forward_passes_write_is_scratch_once_it_is_seen(rank: Rank) -> None:
    """A persistent buffer, as of a quantizer that observes, and an attribute of a module."""
    made = model()
    made.register_buffer("seen", torch.zeros(4))
    made.history = torch.zeros(6)
    runner = rank.runner(model=made, answers={})
    runner.answers["disk"] = writes(runner)
    assert {part.kind: part.nbytes for part in rank.weights()}["derived"] == 24
    made.seen += 1
    made.history += 1
    for _ in range(2):
        runner.check_weights("checksum")
        table = rank.role().table
        assert table is not None
        assert counts(rank).modified == {"serving": {}}
        assert (table.modified, table.scratch) == (0, 2)
        assert table.scratch_names == ("seen", "history")
        assert of(rank) == expected(runner)
        made.seen += 1
        made.history += 1
    assert "derived" not in {part.kind for part in rank.weights()}
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert counts(rank).modified == {"serving": {}}
    assert of(rank) == expected(runner)
    add_one(runner)  # A parameter is none.
    runner.check_weights("checksum")
    table = rank.role().table
    assert table is not None
    assert counts(rank).modified == {"serving": {"parameter": 1}}
    assert (table.modified, table.modified_names, table.scratch) == (1, ("proj.weight",), 2)


class PagedExpertsMoEMethod:
    """Of 0.5.22 and later: the layer's parameters are slots, filled as experts are asked for."""


PagedExpertsMoEMethod.__module__ = "sglang.srt.layers.moe.paged_experts.method"


def test_slots_of_paged_experts_are_in_no_fingerprint(rank: Rank) -> None:
    made = model()
    made.proj.quant_method = PagedExpertsMoEMethod()
    runner = rank.runner(model=made)
    nbytes = sum(part.nbytes for part in rank.weights())
    add_one(runner)
    runner.check_weights("checksum")
    table = rank.role().table
    assert table is not None
    assert (table.modified, table.scratch_names) == (0, ("proj.weight",))
    assert counts(rank).modified == {"serving": {}}
    assert sum(part.nbytes for part in rank.weights()) == nbytes


def test_a_rank_is_of_its_weights_and_not_of_what_it_computes(rank: Rank) -> None:
    """A cache of rotary embeddings is as long as the context that the engine was started with."""
    made = model()
    made.register_buffer("cos_sin_cache", torch.zeros(4), persistent=False)
    runner = rank.runner(model=made)
    assert of(rank) == expected(runner)
    made.cos_sin_cache += 1
    runner.check_weights("checksum")
    assert counts(rank).modified == {"serving": {}}
    assert {part.kind: part.nbytes for part in rank.weights()}["buffer"] == 16


def test_fingerprints_at_the_start_are_taken_once_when_all_is_loaded(
    rank: Rank, counting: Counting
) -> None:
    """Each may take half a minute on a CPU."""

    def make() -> None:
        for draft in (False, True):
            rank.runner(is_draft_worker=draft).alloc_memory_pool()
        assert counting.times == 0

    rank.hook(SCHEDULER, Scheduler)(make)
    assert counting.times == 2
    assert of(rank) != ""


def test_where_no_batch_has_run_nothing_is_read_before_an_update(
    rank: Rank, counting: Counting
) -> None:
    owner = rank.hook(SCHEDULER, Scheduler)(lambda: rank.runner(answers={}).alloc_memory_pool())
    (runner,) = rank.workers
    runner.answers["disk"] = writes(runner)
    before = counting.times
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert counting.times == before + 1
    add_one(runner)
    owner.forward_ct += 1
    rank.scheduler(runner).update_weights_from_disk(Request())
    assert counting.times == before + 3
    assert counts(rank).modified == {"serving": {"parameter": 1}}


def test_what_a_bucket_of_a_session_wrote_is_none_of_it(rank: Rank) -> None:
    runner = rank.runner(answers={})
    runner.answers["tensor"] = writes(runner)
    for _ in range(2):
        session(runner, loads=3)
    scheduler = rank.scheduler(runner)
    for _ in range(3):  # Without a session: the last call asks for the cache to be flushed.
        scheduler.update_weights_from_tensor(Request(flush_cache=False))
        scheduler.update_weights_from_tensor(Request())
    runner.check_weights("checksum")
    assert counts(rank).modified == {"serving": {}}


def test_experts_that_move_are_not_looked_at_before(rank: Rank, counting: Counting) -> None:
    """They move between forward passes, and wait for nothing."""
    runner = rank.runner()
    before = counting.times
    rebalanced(rank, lambda: add_one(runner), chunks=2)
    assert counting.times == before + 1


@pytest.mark.parametrize("copied", [True, False])
def test_a_resume_that_brings_other_bytes_is_one_only_where_a_copy_was_kept(
    rank: Rank, copied: bool
) -> None:
    """Without a copy weights are garbage until an update; with one they are what they were."""
    runner = saving_memory(rank, enable_weights_cpu_backup=copied)
    scheduler = rank.scheduler(runner)
    for _ in range(2):
        scheduler.release_memory_occupation(Request(tags=["weights"]))
        scheduler.resume_memory_occupation(Request(tags=["weights"]))
    assert counts(rank).modified.get("release", {}) == {}
    scheduler.release_memory_occupation(Request(tags=["weights"]))
    add_one(runner)
    scheduler.resume_memory_occupation(Request(tags=["weights"]))
    found = {"parameter": 1} if copied else {}
    assert counts(rank).modified.get("release", {}) == found
    # What came back is known now, and is not found again.
    runner.check_weights("checksum")
    runner.weight_updater.update_weights_from_disk("other", "auto")
    runner.check_weights("checksum")
    assert counts(rank).modified.get("release", {}) == found
    assert counts(rank).modified.get("serving", {}) == {}


def test_an_update_of_released_memory_counts_what_was_not_taken(
    rank: Rank, counting: Counting
) -> None:
    runner = saving_memory(rank, enable_weights_cpu_backup=True)
    scheduler = rank.scheduler(runner)
    scheduler.release_memory_occupation(Request(tags=["weights"]))
    before = counting.times
    runner.weight_updater.update_weights_from_disk("other", "auto")
    assert counts(rank).skipped == {"released": 1}
    scheduler.resume_memory_occupation(Request(tags=["weights"]))
    assert counts(rank).skipped == {"released": 1}
    assert counting.times == before + 1
    assert without_change(rank) == {}


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:30000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:30000"),
        ({"host": "::"}, "http://[::1]:30000"),
        ({"host": "10.0.0.7"}, "http://10.0.0.7:30000"),
        ({"host": "fd00::7", "ssl_certfile": "cert.pem"}, "https://[fd00::7]:30000"),
        ({"host": "node-7", "port": None}, ""),
    ],
)
def test_where_the_engine_can_be_asked_is_in_its_settings(
    rank: Rank, settings: dict[str, Any], url: str
) -> None:
    known = {"port": 30000, "model_path": "tiny", "dp_size": 1, **settings}
    rank.runner(server_args=SimpleNamespace(**known))
    assert rank.snapshot().engine.url == url


# --- a draft beside the target --------------------------------------------------------------------


def target_and_draft(rank: Rank) -> tuple[Any, Any]:
    """An EAGLE draft, whose embeddings are the target's own tensor."""
    target, sharing = rank.runner(answers={}), model()
    sharing.embed_tokens.weight = target.model.embed_tokens.weight
    return target, rank.runner(is_draft_worker=True, answers={}, model=sharing)


def write_shared(target: Any) -> Callable[..., tuple[bool, str]]:
    def write() -> tuple[bool, str]:
        with torch.no_grad():
            target.model.embed_tokens.weight += 1
            target.model.proj.weight += 1
        return True, "Success"

    return write


def altered_of(rank: Rank) -> dict[str, dict[Kind, int]]:
    found = {}
    for name in ("target", "draft"):
        counted = rank.role(name).fingerprints
        assert counted is not None
        found[name] = dict(counted.modified.get("serving", {}))
    return found


@pytest.mark.parametrize("path", ["disk", "tensor", "ipc"])
def test_what_an_update_of_the_target_wrote_is_expected_in_the_draft_that_shares_it(
    rank: Rank, path: str
) -> None:
    target, draft = target_and_draft(rank)
    target.answers[path], draft.answers[path] = write_shared(target), writes(draft)
    scheduler = rank.scheduler(target, draft)
    for _ in range(2):
        getattr(scheduler, f"update_weights_from_{path}")(Request())
    assert altered_of(rank) == {"target": {}, "draft": {}}
    for name in ("target", "draft"):
        updates = rank.role(name).updates[path]  # type: ignore[index]
        assert (updates.updates, updates.without_change) == (2, 0)


def test_a_request_for_both_reads_each_once_before_and_once_after(
    rank: Rank, counting: Counting
) -> None:
    target, draft = target_and_draft(rank)
    scheduler = rank.scheduler(target, draft)
    before = counting.times
    scheduler.update_weights_from_disk(Request())
    assert counting.times == before + 4


def test_an_unexpected_write_in_the_draft_is_found_before_an_update_of_the_target_alone(
    rank: Rank,
) -> None:
    target, draft = target_and_draft(rank)
    add_one(draft)
    target.weight_updater.update_weights_from_disk("other", "auto")
    assert altered_of(rank) == {"target": {}, "draft": {"parameter": 1}}


def test_a_check_of_both_reads_each_once(rank: Rank, counting: Counting) -> None:
    """SGLang hands one request to the target's runner and then to the draft's."""
    target, draft = target_and_draft(rank)
    add_one(draft)
    before = counting.times
    for runner in (target, draft):
        runner.check_weights("checksum")
    assert counting.times == before + 2
    assert altered_of(rank) == {"target": {}, "draft": {"parameter": 1}}
    table = rank.role("draft").table
    assert table is not None
    assert table.modified_names == ("proj.weight",)


def test_tensors_that_moved_in_a_draft_are_counted_where_both_are_updated(rank: Rank) -> None:
    target, draft = target_and_draft(rank)

    def replace() -> tuple[bool, str]:
        draft.model.proj.weight = torch.nn.Parameter(draft.model.proj.weight + 1)
        return True, "Success"

    draft.answers["disk"] = replace
    rank.scheduler(target, draft).update_weights_from_disk(Request())
    assert rank.role("draft").moved == 1


def test_a_draft_that_is_kept_a_copy_of_has_the_targets_garbage_until_an_update(
    rank: Rank,
) -> None:
    """``--enable-draft-weights-cpu-backup`` alone, as where a trainer sends the target only."""
    target, sharing = saving_memory(rank), model()
    sharing.embed_tokens.weight = target.model.embed_tokens.weight
    kept = SimpleNamespace(
        port=30000, model_path="tiny", dp_size=1, enable_draft_weights_cpu_backup=True
    )
    draft = rank.runner(
        is_draft_worker=True,
        model=sharing,
        server_args=kept,
        memory_saver_adapter=target.memory_saver_adapter,
    )
    scheduler = rank.scheduler(target, draft)

    def brought_back(*names: str) -> dict[Kind, int]:
        scheduler.release_memory_occupation(Request(tags=["weights"]))
        with torch.no_grad():
            for name in names:
                draft.model.get_parameter(name).add_(1)
        scheduler.resume_memory_occupation(Request(tags=["weights"]))
        counted = rank.role("draft").fingerprints
        assert counted is not None
        return dict(counted.modified.get("release", {}))

    assert brought_back("embed_tokens.weight") == {}
    assert brought_back("embed_tokens.weight", "proj.weight") == {"parameter": 1}
