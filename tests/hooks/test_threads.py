# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Experts that move on one thread while an update is served on another, as SGLang 0.4.6 to 0.5.3
do it with overlap scheduling; and updates, rebalances and sessions inside one another.

Stand-ins, because moving experts takes several GPUs.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from standins import Rank, Request, update_expert_location_with_recovery
from waiting import LIMIT

from sglang_weight_exporter.hooks.targets import EPLB_MANAGER


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


def at_once(*calls: Any) -> None:
    """Run each on a thread of its own; all are inside SGLang's code at the same moment."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a hook held up another thread's call"


def test_an_update_and_a_move_at_the_same_moment_are_both_counted(rank: Rank) -> None:
    together = threading.Barrier(2, timeout=LIMIT)

    def meet(*arguments: Any, **keywords: Any) -> tuple[bool, str]:
        together.wait()  # Both are in SGLang's own code now, and no lock of ours is held.
        together.wait()
        return True, "Success"

    runner = rank.runner(answers={"disk": meet})
    scheduler = rank.scheduler(runner)
    move = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    for _ in range(20):
        at_once(
            lambda: scheduler.update_weights_from_disk(Request()),
            lambda: move(move=meet),
        )
    assert rank.totals() == {"disk": (20, 0, 20), "eplb": (20, 0, 20)}
    assert rank.role().in_progress is None
    assert rank.snapshot().hook_errors == {}


def test_a_rebalance_that_ends_inside_a_session_does_not_end_it(rank: Rank) -> None:
    runner = rank.runner()
    move = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    rebalance = rank.balancers(lambda: move(move=lambda: None), 2).rebalance()
    next(rebalance)
    runner.weight_updater.begin_weight_update()
    for _ in rebalance:
        pass
    assert rank.in_progress().source is None
    runner.weight_updater.update_weights_from_tensor([])
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"tensor": (1, 0, 1), "eplb": (1, 0, 2)}


def test_an_update_between_two_chunks_of_a_rebalance_leaves_it_one(rank: Rank) -> None:
    scheduler = rank.scheduler(rank.runner())
    move = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    for _ in rank.balancers(lambda: move(move=lambda: None), 3).rebalance():
        scheduler.update_weights_from_disk(Request())
    assert rank.totals() == {"disk": (3, 0, 3), "eplb": (1, 0, 3)}


def test_a_peers_write_is_seen_though_experts_moved_in_its_session(rank: Rank) -> None:
    runner = rank.runner()
    move = rank.hook(EPLB_MANAGER, update_expert_location_with_recovery)
    runner.weight_updater.begin_weight_update()
    move(move=lambda: None)
    runner.weight_updater.end_weight_update(run_post_load=True)
    assert rank.totals() == {"eplb": (1, 0, 1), "p2p": (1, 0, 1)}


def test_a_runner_that_was_collected_and_made_anew_is_the_target_again(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.update_weights_from_disk("other", "auto")
    del runner
    rank.workers.clear()
    gc.collect()
    again = rank.runner()
    assert [role.name for role in rank.snapshot().roles] == ["target"]
    again.weight_updater.update_weights_from_disk("other", "auto")
    assert rank.totals() == {"disk": (2, 0, 2)}  # A count of the process does not come back.
