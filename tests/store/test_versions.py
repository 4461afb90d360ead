# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Files of a rank that runs on with the version before, as that version wrote them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from sglang_weight_exporter.records.base import SCHEMA_VERSION
from sglang_weight_exporter.store.decoding import UnreadableError, decode_snapshot
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.tables import open_tables

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("version", ["0.1.0"])
def test_a_rank_of_an_earlier_version_is_read(tmp_path: Path, version: str) -> None:
    """It had loaded 600 rows of 4,096 bytes when it was recorded."""
    content = (RECORDED / f"{version}.snapshot").read_bytes()
    snapshot = decode_snapshot(content, tmp_path / "snapshot")
    (role,) = snapshot.roles
    assert role.table is not None
    runtime_dir = RuntimeDir.open(tmp_path / "runtime", os.environ)
    rank = runtime_dir.ranks / snapshot.rank_id
    rank.mkdir(mode=0o700)
    lock = FileLock(rank / "lock")
    assert lock.acquire()
    (rank / "table.lock").touch()
    shutil.copy(RECORDED / f"{version}.table", rank / role.table.file)
    (rank / "snapshot").write_bytes(content)
    (reader,) = open_tables(runtime_dir.path)
    table = reader.read()
    rows = list(table.rows())
    assert len(rows) == role.table.rows == 600
    assert {row.nbytes for row in rows} == {4096}
    assert rows[-1].data_ptr == 2**64 - 4096
    assert table.columns.sha256 == role.table.sha256
    lock.release()


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    members = msgspec.msgpack.decode((RECORDED / "0.1.0.snapshot").read_bytes())
    later = {**members, "unheard": {"of": 1}}
    assert decode_snapshot(msgspec.msgpack.encode(later), tmp_path).rank_id == members["rank_id"]


def test_a_version_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    members = msgspec.msgpack.decode((RECORDED / "0.1.0.snapshot").read_bytes())
    later = {**members, "schema": SCHEMA_VERSION + 1}
    with pytest.raises(UnreadableError, match=f"{SCHEMA_VERSION + 1}"):
        decode_snapshot(msgspec.msgpack.encode(later), tmp_path)
