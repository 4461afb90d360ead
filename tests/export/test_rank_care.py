# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The loop that looks after ranks: what goes wrong with one of them is its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engines import Scrape
from published import PublishedRank
from ranks import Rank, rows
from serving import Exporter
from waiting import LIMIT, eventually

from sglang_weight_exporter.export import rank_care
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import UpdateInProgress
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.store.locks import FileLock, is_held
from sglang_weight_exporter.store.reader import (
    RankDirectory,
    SnapshotReader,
    read_endpoint,
    write_endpoint,
)
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

DIED = "sglang_weight_exporter_ranks_died_in_update_total"


def loaded(runtime_dir: RuntimeDir, *, tp: int, metadata_dir: str) -> Rank:
    """A rank whose weights are loaded, and whose `weights_metadata` files are to be there."""
    rank = Rank(runtime_dir.path, tp=tp)
    rank.load(rows(5))
    file = rank.store.path / "snapshot"
    snapshot = msgspec.msgpack.decode(file.read_bytes())
    snapshot["metadata_dir"] = metadata_dir
    snapshot["roles"][0] |= {"loaded_at": 1.0, "device": f"cuda:{tp}"}
    new = file.with_name(".new")
    new.write_bytes(msgspec.msgpack.encode(snapshot))
    new.replace(file)
    return rank


def scrape(exporter: Exporter) -> Scrape:
    return Scrape.of(f"http://127.0.0.1:{exporter.port}/metrics")


def care_for(runtime_dir: RuntimeDir, **more: Any) -> rank_care.RankCare:
    """With no more around it than ``more``."""
    around: dict[str, Any] = {
        "lock": None,
        "ends_with_ranks": False,
        "pipeline": None,
        "metadata": SimpleNamespace(follow=lambda: None),
        "read": lambda: None,
        "guard": Guard(),
        "died_in_update": Counter(),
        "is_ours": lambda endpoint: True,
    }
    return rank_care.RankCare(runtime_dir, **{**around, **more})


@pytest.mark.parametrize("directory", ["/tmp/a\0b", "/tmp/" + "x" * 5000, "/proc/1"])
def test_a_directory_that_cannot_be_is_one_rank_s(
    directory: str, runtime_dir: RuntimeDir, tmp_path: Path, serve: Callable[..., Exporter]
) -> None:
    broken = loaded(runtime_dir, tp=0, metadata_dir=directory)
    good = loaded(runtime_dir, tp=1, metadata_dir=str(tmp_path / "metadata"))
    exporter = serve()
    exporter.line("weights_metadata files")
    eventually((tmp_path / "metadata" / "weights_meta_1.json").exists, what="the other's files")
    eventually(
        lambda: (
            {each.labels["tp_rank"] for each in scrape(exporter).series("sglang_weight_info")}
            == {"0", "1"}
        ),
        what="both ranks",
    )
    assert exporter.process.poll() is None
    for rank in (broken, good):
        rank.store.close()


def test_an_error_is_counted(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter], tmp_path: Path
) -> None:
    rank = loaded(runtime_dir, tp=0, metadata_dir="/tmp/a\0b")
    exporter = serve()
    exporter.line("embedded null")
    assert scrape(exporter).one("sglang_weight_exporter_errors_total") >= 1
    rank.store.close()


def test_files_of_a_rank_go_with_it(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter], tmp_path: Path
) -> None:
    directory = tmp_path / "metadata"
    rank = loaded(runtime_dir, tp=0, metadata_dir=str(directory))
    serve()
    eventually((directory / "weights_meta_0.json").exists, what="its files")
    rank.store.close()
    eventually(lambda: not list(directory.glob("*.json")), what="the end of its files")


def test_an_idle_update_is_over_when_the_clock_was_set_back() -> None:
    now = time.time()
    progress = UpdateInProgress(
        source="tensor", started_at=now, last_call_at=now, calls=1, idle_seconds=10.0
    )
    assert not progress.is_over(now - 1.0)  # Clocks of two processes may differ a little.
    assert not progress.is_over(now + 9.0)
    assert progress.is_over(now - 3600.0)
    assert progress.is_over(now + 11.0)


@pytest.mark.parametrize(("ends_with_ranks", "lines"), [(False, 1), (True, 0)])
def test_a_sidecar_that_sees_no_rank_says_so_once(
    runtime_dir: RuntimeDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ends_with_ranks: bool,
    lines: int,
) -> None:
    """Where hooks are not loaded, only the exporter can. One that ranks started has seen them."""
    monkeypatch.setattr(rank_care, "UNSEEN_SECONDS", 0.0)
    monkeypatch.setattr(rank_care, "PASS_SECONDS", 0.0)
    passes = 0

    def read() -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            lock.current = False

    class Lock:
        current = True

        def is_current(self) -> bool:
            return self.current

        def close(self) -> None:
            raise asyncio.CancelledError

    lock = Lock()
    care = care_for(runtime_dir, lock=lock, ends_with_ranks=ends_with_ranks, read=read)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(care.run())
    assert passes == 5
    said = [each for each in caplog.messages if "No rank has published" in each]
    assert len(said) == lines
    assert all("PYTHONPATH" in each and str(runtime_dir.path) in each for each in said)


def test_ranks_that_end_in_an_update_are_counted_and_those_behind_one_are_not(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter]
) -> None:
    """What is scraped last before an engine is ended may be an update that it has ended since."""
    inside, behind, staying = (
        PublishedRank(runtime_dir.path, engine=name) for name in ("inside", "behind", "staying")
    )
    for rank in (inside, behind, staying):
        rank.publish()
        rank.begin_update()
    exporter = serve()
    progress = "sglang_weight_update_in_progress"
    eventually(lambda: len(scrape(exporter).series(progress)) == 3, what="all are in an update")
    assert scrape(exporter).series(DIED) == []
    behind.publish()
    behind.store.close()
    inside.store.close()
    eventually(lambda: len(scrape(exporter).series(progress)) == 1, what="two are gone")
    eventually(lambda: scrape(exporter).series(DIED), what="one is counted")
    (died,) = scrape(exporter).series(DIED)
    assert (died.labels["engine"], died.value) == ("inside", 1)
    staying.store.close()


def test_a_rank_whose_files_cannot_be_removed_is_counted_once(
    runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is looked at each second, for as long as it is there."""

    def refuse(*arguments: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(rank_care, "keep", refuse)
    monkeypatch.setattr(RankDirectory, "remove", lambda directory: None)
    rank = PublishedRank(runtime_dir.path, engine="inside")
    rank.publish()
    rank.begin_update()
    rank.store.close()
    died: Counter[tuple[str, str]] = Counter()
    pipeline = SimpleNamespace(discard=lambda directory: None, is_done_with=lambda directory: True)
    care = care_for(runtime_dir, pipeline=pipeline, died_in_update=died)
    for _ in range(3):
        asyncio.run(care._pass())
    assert list(died.values()) == [1]


def test_a_lock_that_is_no_exporters_in_place_of_its_own_ends_nothing(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter]
) -> None:
    """As where somebody links or moves a living rank's there."""
    living = Rank(runtime_dir.path, tp=0)
    exporter = serve()
    eventually(lambda: is_held(runtime_dir.exporter_lock), what="its own")
    runtime_dir.exporter_lock.unlink()
    os.link(living.store.path / "lock", runtime_dir.exporter_lock)
    exporter.line("is locked by something that is no exporter")
    assert scrape(exporter).one("sglang_weight_exporter_ranks") == 1
    runtime_dir.exporter_lock.unlink()
    eventually(lambda: is_held(runtime_dir.exporter_lock), what="its own again")
    assert scrape(exporter).one("sglang_weight_exporter_ranks") == 1
    living.store.close()


def test_another_exporter_in_place_of_it_ends_it(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter]
) -> None:
    before = serve()
    eventually(
        lambda: (said := read_endpoint(runtime_dir)) and said.url, what="what it says of itself"
    )
    write_endpoint(runtime_dir, ExporterEndpoint(pid=1, started_at=1.0, version="0"))
    lock = FileLock(runtime_dir.path / "other.lock")
    assert lock.acquire()
    lock.path.replace(runtime_dir.exporter_lock)
    before.line("was removed, so this process ends")
    assert before.process.wait(LIMIT) == 0
    lock.close()


def test_of_dead_ranks_each_is_asked_once(
    runtime_dir: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (runtime_dir.ranks / f"dead-{number}").mkdir(parents=True)
        (runtime_dir.ranks / f"dead-{number}" / "lock").touch()
    living = Rank(runtime_dir.path, tp=0)
    asked: list[str] = []
    is_alive = RankDirectory.is_alive

    def count(directory: RankDirectory) -> bool:
        asked.append(directory.path.name)
        return is_alive(directory)

    monkeypatch.setattr(RankDirectory, "is_alive", count)
    reader = SnapshotReader(runtime_dir)
    for _ in range(10):
        assert [snapshot.rank_id for _, snapshot in reader.read()] == [living.rank_id]
    assert len(asked) == 100 + 10
    living.store.close()
    assert reader.read() == []


def test_more_series_than_any_model_has_cost_their_rank_alone(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter]
) -> None:
    good, bad = Rank(runtime_dir.path, tp=0), Rank(runtime_dir.path, tp=1)
    usages = tuple(
        WeightUsage(device="cpu", kind="buffer", dtype=f"d{number}", nbytes=1, tensors=1)
        for number in range(100_000)
    )
    bad.store.write_snapshot(
        Snapshot(
            rank_id=bad.rank_id,
            pid=1,
            started_at=1.0,
            engine=bad.engine,
            ranks=bad.ranks,
            roles=(
                Role(name="target", device="cpu", weights=usages),
                Role(name="draft", device=""),
            ),
        )
    )
    exporter = serve()
    assert "weights (Expected `array` of length <= 1000" in exporter.line("is damaged")
    found = eventually(lambda: scrape(exporter).series("sglang_weight_info"), what="the ranks")
    assert len(found) == 3
    assert len(scrape(exporter).series("sglang_weight_bytes")) < 10
    for rank in (good, bad):
        rank.store.close()
