# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Who may own the runtime directory, and what is said to everyone else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.files import write_atomically
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.reader import rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir, RuntimeDirError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    os.umask(0)
    try:
        directory = RuntimeDir.open(tmp_path / "not" / "there" / "yet", {})
    finally:
        os.umask(0o022)
    assert mode(directory.path) == 0o700
    assert mode(directory.ranks) == 0o700
    assert RuntimeDir.open(directory.path, {}).path == directory.path


def test_the_default_follows_the_session_or_falls_back_to_a_place_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RuntimeDir.open(None, {"XDG_RUNTIME_DIR": str(tmp_path)}).path == (
        tmp_path / "sglang-weight-exporter"
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for environ in ({}, {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}):
        path = RuntimeDir.open(None, environ).path
        assert path == tmp_path / f"sglang-weight-exporter-{os.getuid()}"


@pytest.mark.parametrize("kind", ["link", "file", "open"])
def test_what_others_could_have_prepared_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "runtime"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod(0o750)
    with pytest.raises(RuntimeDirError) as error:
        RuntimeDir.open(path, {})
    reason = {"link": "is a symbolic link", "file": "is not a directory", "open": "mode 0750"}[kind]
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR" in str(error.value)
    assert not list((tmp_path / "elsewhere").iterdir()) if kind == "link" else True


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a directory to another user")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runtime"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)
    with pytest.raises(RuntimeDirError, match="belongs to the user with id 12345"):
        RuntimeDir.open(path, {})


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeDirError, match="cannot be made"):
        RuntimeDir.open(tmp_path / "file" / "runtime", {})


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert mode(path) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "directory", b"content")  # rename onto a directory fails
    assert [entry.name for entry in tmp_path.iterdir()] == ["directory"]


as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another user")
MALLORY = 12345


@as_root
def test_another_users_session_directory_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sudo` and `su` leave XDG_RUNTIME_DIR as it was."""
    session = tmp_path / "session"
    session.mkdir()
    os.chown(session, MALLORY, MALLORY)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = RuntimeDir.open(None, {"XDG_RUNTIME_DIR": str(session)})
    assert directory.path == tmp_path / "sglang-weight-exporter-0"
    assert list(session.iterdir()) == []


@as_root
def test_a_link_in_the_place_of_a_directory_leads_nobody_to_write_or_delete(
    tmp_path: Path,
) -> None:
    """Another user who may rename the directory puts a link to somewhere else in its place."""
    precious = tmp_path / "precious"
    (precious / "a").mkdir(parents=True)
    (precious / "a" / "file").write_text("kept")
    directory = RuntimeDir.open(tmp_path / "runtime", {})
    rank = RankStore(directory, "a")
    (found,) = rank_directories(directory)
    directory.ranks.rename(directory.path / "moved")
    directory.ranks.symlink_to(precious)
    rank.close()
    found.remove()
    with pytest.raises(OSError, match=r"[Nn]ot a directory|symbolic link"):
        rank.write_snapshot(
            Snapshot(
                rank_id="a", pid=1, started_at=1.0, engine=Engine(name="30000", instance="one")
            )
        )
    assert [path.name for path in precious.rglob("*")] == ["a", "file"]
