# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ranks left that ended in the middle of something: kept, and bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_weight_exporter.records.black_box import BlackBox, Crash, Segment
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.store import ended, rank
from sglang_weight_exporter.store.ended import ended_ranks, keep
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.reader import RankDirectory
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


@pytest.fixture
def runtime_dir(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir.open(tmp_path / "runtime", os.environ)


def die(runtime_dir: RuntimeDir, number: int, *, segments: int = 0) -> RankDirectory:
    store = RankStore(runtime_dir, f"{number:016x}")
    box = BlackBox(
        rank_id=store.rank_id,
        pid=1,
        engine=Engine(name="30000", instance=str(number)),
        crash=Crash(at=1.0, error="ValueError"),
        segments=(Segment(address=1, nbytes=2),) * segments,
    )
    store.leave_black_box(box, None)
    store.close()
    for file in store.path.iterdir():
        os.utime(file, (number, number))
    return RankDirectory(store.path)


def kept(runtime_dir: RuntimeDir) -> list[str]:
    return [each.known.engine.instance for each in ended_ranks(runtime_dir)]


def test_the_newest_are_kept(runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "KEPT_RANKS", 3)
    for number in (5, 1, 4, 2, 3):
        keep(runtime_dir, die(runtime_dir, number))
    assert kept(runtime_dir) == ["5", "4", "3"]


def test_no_more_bytes_are_kept_than_that(
    runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ended._size(die(runtime_dir, 1, segments=1000))
    monkeypatch.setattr(ended, "KEPT_BYTES", 2 * size + 1)
    keep(runtime_dir, RankDirectory(runtime_dir.ranks / f"{1:016x}"))
    for number in (2, 3, 4):
        keep(runtime_dir, die(runtime_dir, number, segments=1000))
    assert kept(runtime_dir) == ["4", "3"]


def test_one_that_came_back_is_left_alone(runtime_dir: RuntimeDir) -> None:
    directory = die(runtime_dir, 1)
    again = RankStore(runtime_dir, directory.rank_id)
    keep(runtime_dir, directory)
    assert directory.is_alive()
    again.close()


def test_a_black_box_is_bounded(runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "BLACK_BOX_BYTES", 10_000)
    directory = die(runtime_dir, 1, segments=100_000)
    file = directory.path / "black_box"
    assert file.stat().st_size < 10_000
    assert file.stat().st_mode & 0o777 == 0o600
    (found,) = ended_ranks(runtime_dir)
    assert found.box is not None
    assert found.box.crash == Crash(at=1.0, error="ValueError")
