# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``serve`` in a process of its own, and a rank for it, as fixtures."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import pytest
from ports import free_port
from waiting import LIMIT

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


@dataclass
class Exporter:
    """A running ``serve`` and its lines."""

    process: subprocess.Popen[str]
    port: int
    lines: Queue[str]

    def line(self, pattern: str) -> str:
        """Wait for a line that matches."""
        deadline = time.monotonic() + LIMIT
        seen = []
        while True:
            try:
                seen.append(self.lines.get(timeout=max(deadline - time.monotonic(), 0)))
            except Empty:
                raise AssertionError(f"no line matches {pattern!r} in {seen}") from None
            if re.search(pattern, seen[-1]):
                return seen[-1]

    def request(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request(
                method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def threads(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"^Threads:\s+(\d+)", status, re.MULTILINE)[0])

    def open_sockets(self) -> int:
        descriptors = Path(f"/proc/{self.process.pid}/fd")
        found = 0
        for each in descriptors.iterdir():
            with contextlib.suppress(FileNotFoundError):  # Closed while we look.
                found += "socket" in str(each.readlink())
        return found


@pytest.fixture
def runtime_dir(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir.open(tmp_path / "runtime", {})


@pytest.fixture
def serve(runtime_dir: RuntimeDir) -> Iterator[Callable[..., Exporter]]:
    """Start ``serve`` on a free port of the loopback address, with further flags."""
    started: list[Exporter] = []

    def start(
        *flags: str, port: int = 0, descriptors: int = 0, inside: tuple[str, ...] = ()
    ) -> Exporter:
        port = port or free_port()
        if descriptors:
            inside = ("prlimit", f"--nofile={descriptors}:{descriptors}")
        process = subprocess.Popen(
            [
                *inside,
                *(sys.executable, "-m", "sglang_weight_exporter", "serve"),
                *("--address", "127.0.0.1", "--port", str(port)),
                *("--runtime-dir", str(runtime_dir.path), *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"SGLANG_WEIGHT_EXPORTER_METRICS": "full", **os.environ},
        )
        exporter = Exporter(process, port, Queue())

        def collect() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                exporter.lines.put(line)

        Thread(target=collect, daemon=True).start()
        started.append(exporter)
        return exporter

    yield start
    for exporter in started:
        exporter.process.kill()
        exporter.process.wait()


@pytest.fixture
def rank(runtime_dir: RuntimeDir) -> Iterator[RankStore]:
    """A rank with 1,000 bytes of weights, alive in this process."""
    rank = RankStore(runtime_dir, "rank")
    rank.write_snapshot(
        Snapshot(
            rank_id="rank",
            pid=os.getpid(),
            started_at=1.0,
            engine=Engine(name="30000", instance="one", model_name='a \\ "model"'),
            ranks=Ranks(tp=3),
            roles=(
                Role(
                    name="target",
                    device="cpu",
                    weights=(
                        WeightUsage(
                            device="cpu", kind="parameter", dtype="bfloat16", nbytes=1000, tensors=2
                        ),
                    ),
                ),
            ),
        )
    )
    yield rank
    rank.close()
