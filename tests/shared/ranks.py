# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks without an engine, written with the store's own code, and a real exporter process.

Their tables have far more rows than models that run on a CPU, their updates come faster than
SGLang reloads, and they die when a test says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from engines import PREFIX, Scrape, clean_environment
from ports import free_port
from waiting import LIMIT, forget, watch

from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableRef, WeightUsage
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import EVENT_COUNT
from sglang_weight_exporter.weight_table import Row, WeightTable, table_of_rows


def rows(count: int, *, base: int = 0x7F00_0000_0000) -> list[Row]:
    """Rows like those of a mixture of experts; the last address does not fit into 63 bits."""
    made = []
    for number in range(count):
        layer, expert = divmod(number, 300)
        made.append(
            Row(
                name=f"model.layers.{layer}.mlp.experts.{expert}.w13_weight",
                data_ptr=base + number * 4096 if number < count - 1 else 2**64 - 4096,
                nbytes=4096,
                dtype="bfloat16" if expert % 3 else "float8_e4m3fn",
                shape=(64, 32) if expert % 2 else (2048,),
                stride=(32, 1) if expert % 2 else (1,),
                device=f"cuda:{number % 2}",
                kind="parameter" if expert % 50 else "buffer",
                storage_ptr=base + number * 4096,
                storage_nbytes=8192,
            )
        )
    return made


class Rank:
    """A rank as the engine process would write it."""

    def __init__(
        self,
        runtime_dir: Path,
        *,
        tp: int = 0,
        instance: str = "0" * 16,
        event_count: int = EVENT_COUNT,
    ) -> None:
        self.runtime_dir = RuntimeDir.open(runtime_dir, os.environ)
        self.rank_id = os.urandom(8).hex()
        self.store = RankStore(self.runtime_dir, self.rank_id, event_count=event_count)
        self.engine = Engine(
            name="30000", instance=instance, model_name="tiny", sglang_version="0.5.23"
        )
        self.ranks = Ranks(tp=tp)
        self.device = Device(name="cuda:0", uuid=f"GPU-{tp}", product="NVIDIA H100")
        self.number = 0
        self.table: WeightTable | None = None
        self.write_snapshot()

    def load(self, table_rows: list[Row]) -> Event:
        return self.event("load", table_rows)

    def update(self, table_rows: list[Row] | None = None, *, message: str = "") -> Event:
        """An update; without rows in place, with a message a failed one."""
        return self.event("update", table_rows, message=message)

    def update_to(self, table: WeightTable) -> Event:
        """An update after which the table is this one."""
        return self.event("update", table)

    def event(
        self, action: str, after: list[Row] | WeightTable | None, *, message: str = ""
    ) -> Event:
        now = time.time()
        previous = self.table
        if isinstance(after, WeightTable):
            self.table = after
        elif after is not None:
            self.table = table_of_rows(after, role="target", captured_at=now)
        assert self.table is not None
        self.number += 1
        trace_id = f"{int(self.engine.instance, 16):016x}{self.number:016x}"
        event = Event(
            number=self.number,
            rank_id=self.rank_id,
            pid=os.getpid(),
            engine=self.engine,
            ranks=self.ranks,
            role="target",
            device=self.device,
            update=Update(
                action="load" if action == "load" else "update",
                source=None if action == "load" else "disk",
                sequence=self.number,
                started_at=now - 2.5,
                ended_at=now - 0.5,
                succeeded=not message,
                effect="undefined" if message else "changed",
                message=message,
                weight_version=str(self.number),
                trace_id=trace_id,
            ),
            weights=(
                WeightUsage(
                    device="cuda:0", kind="parameter", dtype="bfloat16", nbytes=4096, tensors=1
                ),
            ),
            table=TableRef(
                file=self.store.write_table(self.table),
                sha256=self.table.sha256,
                rows=self.table.rows,
                regions={"cuda:0": 3},
                captured_at=now,
                fingerprint=self.table.fingerprint,
                fingerprint_seconds=self.table.fingerprint_seconds,
            ),
            previous_sha256="" if previous is None else previous.sha256,
        )
        self.store.append_event(event, self.table)
        self.write_snapshot(event.table)
        return event

    def write_snapshot(self, table: TableRef | None = None) -> None:
        self.store.write_snapshot(
            Snapshot(
                rank_id=self.rank_id,
                pid=os.getpid(),
                started_at=time.time(),
                engine=self.engine,
                ranks=self.ranks,
                devices=(self.device,),
                roles=(Role(name="target", device="cuda:0", table=table),),
                events_dropped=self.store.events_dropped,
            )
        )

    def waiting(self) -> list[str]:
        """Files of events that were not acknowledged."""
        return sorted(path.name for path in (self.store.path / "events").glob("*.event"))


class ExporterProcess:
    """`python -m sglang_weight_exporter serve` of a runtime directory."""

    def __init__(self, runtime_dir: Path, **variables: str) -> None:
        self.runtime_dir = runtime_dir
        self.port = free_port()
        self.log_file = runtime_dir.parent / f"exporter-{self.port}.log"
        self.variables = {
            PREFIX + "RUNTIME_DIR": str(runtime_dir),
            PREFIX + "PORT": str(self.port),
            PREFIX + "ADDRESS": "127.0.0.1",
            **variables,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ExporterProcess:
        environment = clean_environment(**self.variables)
        with watch(self.log_file).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sglang_weight_exporter", "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def log(self) -> str:
        return self.log_file.read_text()

    def scrape(self) -> Scrape:
        return Scrape.of(f"http://127.0.0.1:{self.port}/metrics")

    def metric(self, name: str, **labels: str) -> float:
        return self.scrape().one(f"sglang_weight_exporter_{name}", **labels)

    def end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(LIMIT)
            self.process = None
            forget(self.log_file)
