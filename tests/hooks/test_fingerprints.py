# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""When weights are read, when never, and what is said where they were not."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import Rank, Request, fail

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.capture.fingerprint import Fingerprinter, FingerprintTimeoutError
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


class Counting(Fingerprinter):
    """Counts how often memory is read, and can be told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0
        self.error: Exception | None = None
        self.limits: list[float] = []

    def __call__(
        self, tensors: Sequence[torch.Tensor], *, limit_seconds: float = float("inf")
    ) -> Any:
        self.times += 1
        self.limits.append(limit_seconds)
        if self.error is not None:
            raise self.error
        return super().__call__(tensors, limit_seconds=limit_seconds)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def rank(tmp_path: Path, counting: Counting) -> Rank:
    return Rank(tmp_path / "runtime", fingerprinter=counting)


def saving_memory(rank: Rank) -> Any:
    class MemorySaver:
        enabled = True

    return rank.runner(memory_saver_adapter=MemorySaver())


def of(rank: Rank) -> str:
    table = rank.role().table
    assert table is not None
    return table.fingerprint


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
    assert of(rank) == loaded  # Nobody has looked.
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


def test_nothing_is_read_inside_a_session(rank: Rank, counting: Counting) -> None:
    runner = rank.runner()
    before = counting.times
    runner.weight_updater.begin_weight_update()
    for _ in range(3):
        runner.weight_updater.update_weights_from_tensor([])
    runner.check_weights("checksum")
    assert counting.times == before
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert counting.times == before + 1


@pytest.mark.parametrize("error", [FingerprintTimeoutError("too long"), RuntimeError("CUDA error")])
def test_a_failure_costs_the_fingerprint_and_not_the_update(
    rank: Rank, counting: Counting, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runner = rank.runner()
    counting.error = error
    with caplog.at_level(logging.WARNING):
        assert runner.weight_updater.update_weights_from_disk("other", "auto") == (True, "Success")
        runner.weight_updater.update_weights_from_disk("other", "auto")
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(rank.directory, os.environ)).read()
    assert snapshot.hook_errors == {"fingerprint": 2}
    (role,) = snapshot.roles
    assert role.updates["disk"].updates == 2
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


def test_a_check_of_weights_looks_again(rank: Rank) -> None:
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
