# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The ``weights_metadata`` files: pointer tables for programs that read an older JSON layout.

``weights_meta_{gpu_id}.json``
    ``{name: {"ptr": int, "size": bytes, "device": "cuda:0", "dtype": "torch.bfloat16",
    "shape": [int, …]}}`` of every parameter, a tied one under its first name; after an update each
    entry also has ``"updated": true``.
``total_weight_meta_{gpu_id}.json``
    ``{device: GiB}``
``weight_update_summary_{gpu_id}.json``
    After an update: when it ended, how many weights and devices, GiB by device and in total; and,
    beyond the older layout, whose files these are.

Each file is replaced at once, so that no reader sees half of one. Where several models are on one
GPU the names distinguish them: the first rank has ``{gpu_id}``, a further one
``{gpu_id}_{engine}``, and a draft model ``_draft`` behind that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from sglang_weight_exporter.store.files import Directory
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Row

_GIB = 2**30


def gpu_id(table: Table) -> int:
    """Index of the device; where devices have none (CPU), the tensor-parallel rank."""
    _, _, index = table.role.device.partition(":")
    return int(index) if index.isdigit() else table.ranks.tp


def owners(table: Table) -> Iterator[str]:
    """What a rank's files may be called after, in order of preference."""
    gpu = str(gpu_id(table))
    yield gpu
    yield f"{gpu}_{table.engine.name}"
    yield f"{gpu}_{table.engine.name}_{table.rank_id}"


def write_files(directory: Path, table: Table, owner: str) -> list[Path]:
    """Write the files of one model; returns those that there are now.

    Raises ``OSError``; what would have been replaced is then gone, as an old address is worse
    than none.
    """
    with Directory.open(directory) as opened:
        return _write(opened, table, owner)


def _write(directory: Directory, table: Table, owner: str) -> list[Path]:
    files = _files(owner, table.role.name)
    written = []
    try:
        for part, content in _contents(table).items():
            if content is None:
                directory.remove(files[part])
                continue
            encoded = msgspec.json.format(msgspec.json.encode(content), indent=2)
            directory.write(files[part], encoded)
            written.append(directory.path / files[part])
    except OSError:
        _remove(directory, owner, table.role.name)
        raise
    return written


def _remove(directory: Directory, owner: str, role: str) -> None:
    for file in _files(owner, role).values():
        with contextlib.suppress(OSError):
            directory.remove(file)


def _files(owner: str, role: str) -> dict[str, str]:
    stem = owner if role == "target" else f"{owner}_{role}"
    return {
        "weights": f"weights_meta_{stem}.json",
        "totals": f"total_weight_meta_{stem}.json",
        "summary": f"weight_update_summary_{stem}.json",
    }


def _contents(table: Table) -> dict[str, Any]:
    rows = _parameters(table)
    update = table.role.last_update
    updated = update is not None and update.action == "update"
    mark = {"updated": True} if updated else {}
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.device] = totals.get(row.device, 0) + row.nbytes
    gigabytes = {device: nbytes / _GIB for device, nbytes in totals.items()}
    summary: dict[str, Any] | None = None
    if update is not None and updated:
        summary = {
            "update_timestamp": update.ended_at,
            "update_time_readable": time.strftime(
                "%Y-%m-%d %H:%M:%S", time.localtime(update.ended_at)
            ),
            "gpu_id": gpu_id(table),
            "total_weights": len(rows),
            "total_devices": len(totals),
            "device_weight_summary": gigabytes,
            "memory_usage_gb": sum(gigabytes.values()),
            "succeeded": update.succeeded,
            "engine": table.engine.name,
            "role": table.role.name,
            "tp_rank": table.ranks.tp,
            "pp_rank": table.ranks.pp,
            "dp_rank": table.ranks.dp,
            "pid": table.pid,
        }
    return {
        "weights": {
            row.name: {
                "ptr": row.data_ptr,
                "size": row.nbytes,
                "device": row.device,
                "dtype": f"torch.{row.dtype}",
                "shape": row.shape,
                **mark,
            }
            for row in rows
        },
        "totals": gigabytes,
        "summary": summary,
    }


def _parameters(table: Table) -> list[Row]:
    """Parameters, each once, as ``named_parameters()`` has them."""
    seen, rows = set(), []
    for row in table.rows():
        key = (row.data_ptr, row.shape, row.stride, row.dtype)
        if row.kind != "parameter" or (row.nbytes and key in seen):
            continue
        seen.add(key)
        rows.append(row)
    return rows


class MetadataFiles:
    """Keeps the files of one rank current (``SGLANG_WEIGHT_EXPORTER_METADATA_DIR``).

    Another user's directory is refused: who owns it decides what is read from it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._claim: FileLock | None = None
        self._owner = ""

    def update(self, table: Table) -> None:
        """Weights were loaded or updated. Raises ``OSError``."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._open() as directory:
            if self._claim is None:
                self._owner, self._claim = self._claim_owner(table, directory)
            _write(directory, table, self._owner)

    def close(self) -> None:
        """The rank is gone; another one may have its names."""
        if self._claim is not None:
            self._claim.release()

    def remove(self, role: str) -> None:
        """The table of a role could not be read. Raises ``OSError``."""
        if self._claim is not None:
            with self._open() as directory:
                _remove(directory, self._owner, role)

    def _open(self) -> Directory:
        directory = Directory.open(self._directory)
        owner = directory.status().st_uid
        if owner not in {0, os.getuid()}:
            directory.close()
            raise PermissionError(
                errno.EPERM, f"it belongs to the user with id {owner}", str(self._directory)
            )
        return directory

    def _claim_owner(self, table: Table, directory: Directory) -> tuple[str, FileLock]:
        """The first name that no other living rank has; it is ours for as long as we live."""
        for owner in owners(table):
            claim = FileLock(self._directory / f".{owner}.lock", directory=directory)
            if claim.acquire():
                break
        return owner, claim
