# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`status` on the command line."""

from __future__ import annotations

import re
import time
from pathlib import Path

from published import Command, PublishedRank

from sglang_weight_exporter.records.engine import Ranks


def test_an_update_that_nobody_ended_is_over_once_it_is_idle(
    rank: PublishedRank, command: Command
) -> None:
    rank.begin_update()
    assert b"update  in progress" in command("status").stdout
    an_hour_ago = time.time() - 3600
    rank.begin_update(started_at=an_hour_ago, last_call_at=an_hour_ago, calls=3, idle_seconds=10.0)
    assert b"in progress" not in command("status").stdout


def test_ranks_are_named_as_people_do_and_in_their_order(
    runtime_dir: Path, command: Command
) -> None:
    places = Ranks(tp=1, dp=1), Ranks(tp=1, dp=0, moe_ep=1), Ranks(tp=0, dp=0)
    alive = [PublishedRank(runtime_dir, ranks=ranks) for ranks in places]
    for each in alive:
        each.publish()
    shown = command("status").stdout.decode().splitlines()
    assert [line.partition("  ")[0] for line in shown if line.startswith("engine ")] == [
        "engine 30000, tp 0 pp 0 dp 0",
        "engine 30000, tp 1 pp 0 dp 0 ep 1",
        "engine 30000, tp 1 pp 0 dp 1",
    ]


def test_weights_whose_memory_was_given_back_are_said_to_be_released(
    rank: PublishedRank, command: Command
) -> None:
    assert b"released" not in command("status").stdout
    rank.release_memory()
    assert b"in 4 tensors, released" in command("status").stdout


def test_the_version_is_shown_as_it_was_given(rank: PublishedRank, command: Command) -> None:
    rank.publish(weight_version="step-42")
    assert b"\n  version   step-42\n" in command("status").stdout


def test_what_a_rank_waits_in_is_named_with_its_time(rank: PublishedRank, command: Command) -> None:
    rank.begin_update(phase="receive", phase_since=time.time() - 90)
    found = re.search(rb"\(receive for (\d+\.\d) s\)", command("status").stdout)
    assert found is not None
    assert float(found[1]) >= 90
    rank.publish(running={"init_weights_update_group": time.time() - 30})
    shown = command("status").stdout
    found = re.search(rb"\n  runs      init_weights_update_group for (\d+\.\d) s\n", shown)
    assert found is not None
    assert float(found[1]) >= 30
