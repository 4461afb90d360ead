# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A rank whose tables a test decides, in this process or in one of its own that can be killed.

Run as a program it publishes one table, says "ready", and lives until it is killed; with the
argument `updating` it dies in the middle of an update.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update, UpdateInProgress
from sglang_weight_exporter.records.weights import TableChanges, TableRef, WeightUsage
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import Row, WeightTable, table_of_rows

#: Runs `sglang-weight-exporter` with arguments.
Command = Callable[..., subprocess.CompletedProcess[bytes]]

#: A tied pair, a buffer, and names that a filter can tell apart.
ROWS = (
    Row("embed.weight", 4096, 64, "bfloat16", (8, 4), (4, 1), "cuda:0", "parameter", 4096, 64),
    Row("layers.0.w", 8192, 128, "bfloat16", (64,), (1,), "cuda:0", "parameter", 8192, 128),
    Row("layers.0.scale", 9216, 4, "float32", (), (), "cuda:0", "buffer", 9216, 4),
    Row("layers.1.w", 8320, 128, "bfloat16", (64,), (1,), "cuda:0", "parameter", 8320, 128),
    Row("head.weight", 4096, 64, "bfloat16", (8, 4), (4, 1), "cuda:0", "parameter", 4096, 64),
)


class PublishedRank:
    """Writes what a rank would write, with the store's own code."""

    def __init__(
        self,
        runtime_dir: Path,
        *,
        engine: str = "30000",
        ranks: Ranks = Ranks(),  # noqa: B008
        role: str = "target",
        device: str = "cuda:0",
    ) -> None:
        self.store = RankStore(RuntimeDir.open(runtime_dir, os.environ), os.urandom(8).hex())
        self.engine = Engine(name=engine, instance="0" * 16, model_name="tiny")
        self.ranks = ranks
        self.role = Role(name=role, device=device)
        self.devices: tuple[Device, ...] = ()
        #: What its snapshot says of directories: ``manifest_dir`` and the like.
        self.directories: dict[str, Any] = {}
        self.sequence = 0

    def publish(
        self,
        rows: Sequence[Row] = ROWS,
        *,
        table: WeightTable | None = None,
        changes: TableChanges = TableChanges(),  # noqa: B008
        weight_version: str = "",
        running: dict[str, float] | None = None,
        modified: tuple[str, ...] = (),
    ) -> None:
        """A load or, from the second time on, an update has ended with this table."""
        made = table or table_of_rows(rows, role=self.role.name, captured_at=time.time())
        self.sequence += 1
        now = time.time()
        self.role = msgspec.structs.replace(
            self.role,
            table=TableRef(
                file=self.store.write_table(made),
                sha256=made.sha256,
                rows=made.rows,
                regions={},
                captured_at=now,
                fingerprint=made.fingerprint,
                fingerprint_seconds=made.fingerprint_seconds,
                modified=len(modified) if made.fingerprint else None,
                modified_names=modified,
            ),
            weights=(
                WeightUsage(
                    device="cuda:0", kind="parameter", dtype="bfloat16", nbytes=320, tensors=4
                ),
            ),
            resident={"cuda:0": 320},
            in_progress=None,
            last_update=Update(
                action="load" if self.sequence == 1 else "update",
                source=None if self.sequence == 1 else "disk",
                sequence=self.sequence,
                started_at=now,
                ended_at=now,
                succeeded=True,
                effect="changed",
                changes=changes,
            ),
        )
        self._write(weight_version, running)
        self.store.unlock_table()

    def begin_update(self, **progress: Any) -> None:
        """An update has begun."""
        now = time.time()
        values = {"source": "disk", "started_at": now, "last_call_at": now, **progress}
        self.role = msgspec.structs.replace(self.role, in_progress=UpdateInProgress(**values))
        self._write()
        self.store.lock_table()

    def release_memory(self) -> None:
        """Physical memory was given back, addresses stay."""
        self.role = msgspec.structs.replace(self.role, resident={"cuda:0": 0})
        self._write()

    def write_again(self) -> None:
        """Something else is known of the rank or its engine."""
        self._write()

    def last_event(self, **more: Any) -> Event:
        """Of its last load or update, as it would have queued it; ``more``: what that update has
        besides."""
        assert self.role.last_update is not None
        return Event(
            number=1,
            rank_id=self.store.rank_id,
            pid=os.getpid(),
            engine=self.engine,
            ranks=self.ranks,
            role="target",
            device=Device(name="cpu"),
            update=msgspec.structs.replace(self.role.last_update, **more),
            table=self.role.table,
        )

    def _write(self, weight_version: str = "", running: dict[str, float] | None = None) -> None:
        self.store.write_snapshot(
            Snapshot(
                rank_id=self.store.rank_id,
                pid=os.getpid(),
                started_at=time.time(),
                engine=self.engine,
                ranks=self.ranks,
                devices=self.devices,
                roles=(self.role,),
                weight_version=weight_version,
                running=running or {},
                **self.directories,
            )
        )


if __name__ == "__main__":
    rank = PublishedRank(Path(sys.argv[1]))
    rank.publish()
    if sys.argv[2:] == ["updating"]:
        rank.begin_update()
    print("ready", flush=True)
    time.sleep(600)
