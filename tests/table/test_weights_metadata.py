# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The `weights_metadata` files, read as programs that know only their layout read them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import disk
from published import ROWS, PublishedRank

from sglang_weight_exporter import open_tables
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.store.weights_metadata import MetadataFiles


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    return tmp_path / "weights_metadata"


def test_after_the_load_there_are_parameters_and_totals(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    (reader,) = open_tables(runtime_dir)
    MetadataFiles(metadata).update(reader.read())
    assert names(metadata) == {"weights_meta_0.json", "total_weight_meta_0.json"}
    weights = read(metadata / "weights_meta_0.json")
    # As named_parameters() has them: no buffer, and a tied parameter under its first name.
    assert list(weights) == ["embed.weight", "layers.0.w", "layers.1.w"]
    assert weights["embed.weight"] == {
        "ptr": 4096,
        "size": 64,
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "shape": [8, 4],
    }
    assert read(metadata / "total_weight_meta_0.json") == {"cuda:0": 320 / 2**30}


def test_after_an_update_the_weights_say_so_and_a_summary_says_when(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    rank.publish()
    (reader,) = open_tables(runtime_dir)
    MetadataFiles(metadata).update(reader.read())
    weights = read(metadata / "weights_meta_0.json")
    assert all(entry["updated"] is True for entry in weights.values())
    summary = read(metadata / "weight_update_summary_0.json")
    assert rank.role.last_update is not None
    assert summary["update_timestamp"] == rank.role.last_update.ended_at
    assert (summary["gpu_id"], summary["total_weights"], summary["total_devices"]) == (0, 3, 1)
    assert summary["device_weight_summary"] == {"cuda:0": 320 / 2**30}
    assert summary["memory_usage_gb"] == 320 / 2**30
    assert (summary["engine"], summary["role"]) == ("30000", "target")


def test_a_new_engine_removes_the_summary_of_the_one_before(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    metadata.mkdir()
    (metadata / "weight_update_summary_0.json").write_text("{}")
    (reader,) = open_tables(runtime_dir)
    MetadataFiles(metadata).update(reader.read())
    assert "weight_update_summary_0.json" not in names(metadata)


def test_a_draft_and_a_second_engine_have_files_of_their_own(
    runtime_dir: Path, metadata: Path
) -> None:
    first = PublishedRank(runtime_dir)
    draft = PublishedRank(runtime_dir, role="draft")
    second = PublishedRank(runtime_dir, engine="30001")
    same = PublishedRank(runtime_dir, engine="30001", ranks=Ranks(tp=1))
    other_gpu = PublishedRank(runtime_dir, ranks=Ranks(tp=1), device="cuda:1")
    tables = {}
    for made in (first, draft, second, same, other_gpu):
        made.publish()
        tables[made] = next(
            reader.read()
            for reader in open_tables(runtime_dir)
            if reader.directory.rank_id == made.store.rank_id
        )
    of_first = MetadataFiles(metadata)
    of_first.update(tables[first])
    of_first.update(tables[draft])  # The same process holds both.
    further = [MetadataFiles(metadata) for _ in range(3)]
    for files, made in zip(further, (second, same, other_gpu), strict=True):
        files.update(tables[made])
    assert {name for name in names(metadata) if name.startswith("weights_meta")} == {
        "weights_meta_0.json",
        "weights_meta_0_draft.json",
        "weights_meta_0_30001.json",
        f"weights_meta_0_30001_{same.store.rank_id}.json",
        "weights_meta_1.json",
    }


def test_the_next_engine_has_the_name_of_one_that_died(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    (reader,) = open_tables(runtime_dir)
    table = reader.read()
    program = (
        "import pathlib, os, sys, sglang_weight_exporter as w\n"
        "from sglang_weight_exporter.store.weights_metadata import MetadataFiles\n"
        "(reader,) = w.open_tables(pathlib.Path(sys.argv[1]))\n"
        "files = MetadataFiles(pathlib.Path(sys.argv[2]))\n"
        "files.update(reader.read())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, runtime_dir, metadata], check=False)
    assert killed.returncode == -9
    assert "weights_meta_0.json" in names(metadata)
    MetadataFiles(metadata).update(table)
    assert names(metadata) == {"weights_meta_0.json", "total_weight_meta_0.json"}


def test_only_this_user_can_read_the_addresses(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    (reader,) = open_tables(runtime_dir)
    MetadataFiles(metadata).update(reader.read())
    assert stat.S_IMODE(metadata.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in metadata.iterdir()} == {0o600}


def test_a_link_in_the_place_of_the_directory_leads_nobody_to_write_or_delete(
    rank: PublishedRank, runtime_dir: Path, metadata: Path, tmp_path: Path
) -> None:
    """Another user who may rename the directory puts a link to somewhere else in its place."""
    rank.publish()
    (reader,) = open_tables(runtime_dir)
    files = MetadataFiles(metadata)
    files.update(reader.read())
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in names(metadata):
        (precious / name).write_text("kept")
    metadata.rename(tmp_path / "moved")
    metadata.symlink_to(precious)
    with pytest.raises(OSError, match=r"[Nn]ot a directory|symbolic link"):
        files.update(reader.read())
    with pytest.raises(OSError, match=r"[Nn]ot a directory|symbolic link"):
        files.remove("target")
    assert {path.read_text() for path in precious.iterdir()} == {"kept"}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a directory to another user")
def test_a_directory_of_another_user_is_refused(
    rank: PublishedRank, runtime_dir: Path, metadata: Path
) -> None:
    metadata.mkdir()
    os.chown(metadata, 1000, 1000)
    (reader,) = open_tables(runtime_dir)
    with pytest.raises(PermissionError, match="belongs to the user with id 1000"):
        MetadataFiles(metadata).update(reader.read())
    assert list(metadata.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", "64k") as path:
        yield path


def test_on_a_full_disk_no_old_address_stays(
    rank: PublishedRank, runtime_dir: Path, small_disk: Path
) -> None:
    (reader,) = open_tables(runtime_dir)
    files = MetadataFiles(small_disk)
    files.update(reader.read())
    rank.publish([ROWS[0]._replace(name=f"w{index}", data_ptr=index) for index in range(2000)])
    with pytest.raises(OSError, match="No space left"):
        files.update(reader.read())
    assert names(small_disk) == set()
    rank.publish()
    files.update(reader.read())
    assert len(names(small_disk)) == 3


def test_no_reader_sees_half_a_file(rank: PublishedRank, runtime_dir: Path, metadata: Path) -> None:
    (reader,) = open_tables(runtime_dir)
    files = MetadataFiles(metadata)
    files.update(reader.read())
    with (metadata / "weights_meta_0.json").open() as opened:
        rank.publish([ROWS[0]])
        files.update(reader.read())
        assert len(json.load(opened)) == 3
    assert len(read(metadata / "weights_meta_0.json")) == 1
