# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Code inside the engine that changes weights by its own means, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

from engines import clean_environment  # noqa: E402
from standins import Rank  # noqa: E402

from sglang_weight_exporter import (  # noqa: E402
    UpdateInProgressError,
    open_tables,
    record_update,
    updating,
)
from sglang_weight_exporter.bootstrap import PostImportHook  # noqa: E402


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """The hooks of a process, where Python would have them."""
    made = Rank(tmp_path / "runtime")
    hook = PostImportHook()
    hook.installation = made.installation
    others = [finder for finder in sys.meta_path if not isinstance(finder, PostImportHook)]
    monkeypatch.setattr(sys, "meta_path", [hook, *others])
    return made


def test_an_announced_update_counts_and_the_table_is_read_again(rank: Rank) -> None:
    runner = rank.runner()
    (reader,) = open_tables(rank.directory)
    before = reader.read()
    runner.model.proj.weight.data = torch.ones(4, 4)
    record_update(runner)
    assert rank.totals() == {"external": (1, 0, 1)}
    after = reader.read()
    addresses = {row.name: row.data_ptr for row in after.rows()}
    assert addresses["proj.weight"] == runner.model.proj.weight.data_ptr()
    assert not reader.is_current(before)
    update = rank.role().last_update
    assert update is not None
    assert update.changes.moved == 1
    assert update.changes.names == {"moved": ("proj.weight",)}


def test_an_enclosed_update_is_in_progress_until_its_end(rank: Rank) -> None:
    runner = rank.runner()
    (reader,) = open_tables(rank.directory)
    with updating(runner, source="p2p"):
        assert rank.role().in_progress is not None
        with pytest.raises(UpdateInProgressError):
            reader.read()
    assert rank.role().in_progress is None
    assert rank.totals() == {"p2p": (1, 0, 1)}
    assert reader.read().update == 2


def test_an_exception_passes_through_and_counts_as_a_failure(rank: Rank) -> None:
    runner = rank.runner()
    with pytest.raises(RuntimeError, match="link is down"), updating(runner):
        raise RuntimeError("link is down")
    assert rank.totals() == {"external": (0, 1, 1)}
    update = rank.role().last_update
    assert update is not None
    assert (update.effect, update.message) == ("undefined", "link is down")


def test_inside_an_update_of_sglangs_it_is_one_of_its_calls(rank: Rank) -> None:
    runner = rank.runner()
    runner.weight_updater.begin_weight_update()
    record_update(runner, source="p2p")
    record_update(runner, source="p2p")
    runner.weight_updater.end_weight_update(run_post_load=False)
    assert rank.totals() == {"p2p": (1, 0, 2)}


def test_a_source_that_is_none_is_refused(rank: Rank) -> None:
    with pytest.raises(ValueError, match=r"'rdma' is no source.*disk, distributed"):
        record_update(rank.runner(), source="rdma")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["1", "0"])
def test_where_nothing_is_hooked_it_does_nothing(value: str, tmp_path: Path) -> None:
    program = (
        "import sglang_weight_exporter as w\n"
        "w.record_update(object())\n"
        "with w.updating(object()): print('inside')\n"
    )
    environ = clean_environment(
        SGLANG_WEIGHT_EXPORTER_DISABLED=value, SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR=str(tmp_path)
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "inside\n", "")
    assert list(tmp_path.iterdir()) == []
