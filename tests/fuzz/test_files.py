# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Somebody does anything to the files beside ten ranks: the ten are served at every scrape.

A seed decides what is done. For another one, or for longer: `FUZZ_SEED=7 FUZZ_SECONDS=3600`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from collectors import Backend
from mutations import ODD_VALUES, packed
from ranks import ExporterProcess, Rank, rows
from waiting import eventually

from sglang_weight_exporter.records.black_box import BlackBox, Crash
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

pytestmark = pytest.mark.slow

HEALTHY = 10
VICTIMS = 6
#: At the least, however slow the machine is.
ROUNDS = 10

#: What a rank's directory has, and what looks like it.
NAMES = (
    *("snapshot", "lock", "table.lock", "progress", "exported", "memory", "memory.wanted"),
    *("events", "target-aaaaaaaaaaaaaaaa.table", ".snapshot.0123", "x"),
    *("events/000000000001-none.event", "events/000000000002-aaaaaaaaaaaaaaaa.event"),
    *("events/aaaaaaaaaaaaaaaa.table", "events/x"),
    *("black_box", "events/000000000001-black_box.event"),
)
#: What the runtime directory has.
ROOT = (
    *("exporter.json", "exporter.lock", "engines.lock", "x", "ranks/x", "ranks/.x", "ranks/lock"),
    *("ended", "ended/x", "ended/x/snapshot", "ended/x/black_box"),
)


class Healthy:
    """A rank whose weights have as many bytes as it has written snapshots."""

    def __init__(self, runtime_dir: RuntimeDir, number: int) -> None:
        self.store = RankStore(runtime_dir, f"healthy{number}")
        self.number = number
        self.written = 0
        self.write()

    def snapshot(self) -> Snapshot:
        usage = WeightUsage(
            device="cpu", kind="parameter", dtype="bfloat16", nbytes=self.written, tensors=1
        )
        return Snapshot(
            rank_id=self.store.rank_id,
            pid=os.getpid(),
            started_at=1.0,
            engine=Engine(name=f"healthy{self.number}", instance="one", model_name="tiny"),
            ranks=Ranks(tp=self.number),
            roles=(Role(name="target", device="cpu", weights=(usage,), loaded_at=1.0),),
        )

    def write(self) -> None:
        self.written += 1
        self.store.write_snapshot(self.snapshot())


class Vandal:
    """Does one thing after another to anything that is not a healthy rank's."""

    def __init__(self, root: Path, healthy: list[Healthy], random: random.Random) -> None:
        self._root = root
        self._healthy = healthy
        self._random = random
        self._held: list[int] = []
        self._contents = [
            packed(
                msgspec.to_builtins(
                    msgspec.structs.replace(
                        healthy[0].snapshot(),
                        rank_id="victim0",
                        engine=Engine(name="victim", instance="two"),
                    )
                )
            ),
            packed(
                msgspec.to_builtins(
                    BlackBox(
                        rank_id="victim0",
                        pid=1,
                        engine=Engine(name="victim", instance="two"),
                        crash=Crash(at=1.0, error="ValueError", message="x\x1b[31m"),
                    )
                )
            ),
            b"",
            b"\xff" * 1000,
            b"{}",
        ]
        self._actions: tuple[Callable[[Path], Any], ...] = (
            *(self._write,) * 4,
            *(self._hold,) * 4,
            *(self._remove,) * 3,
            self._truncate,
            self._make_directory,
            self._make_link,
            self._make_link,
            self._make_pipe,
            self._make_socket,
            self._rename,
            self._link_file,
            self._copy_healthy,
            self._change_mode,
            self._change_times,
        )

    def act(self) -> None:
        action = self._random.choice(self._actions)
        with contextlib.suppress(OSError):
            action(self._path())

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _path(self) -> Path:
        """Somewhere in a victim's directory, or in the runtime directory itself."""
        if self._random.random() < 0.2:
            return self._root / self._random.choice(ROOT)
        victim = self._root / "ranks" / f"victim{self._random.randrange(VICTIMS)}"
        if self._random.random() < 0.1:
            return victim
        return self._not_through_a_link(victim / self._random.choice(NAMES), below=victim)

    def _not_through_a_link(self, path: Path, *, below: Path) -> Path:
        """What a link leads to may be a healthy rank's."""
        for part in (below, path.parent):
            if part.is_symlink():
                return part
        return path

    def _content(self) -> bytes:
        content = self._random.choice(self._contents)
        fields = msgspec.msgpack.decode(content) if content.startswith(b"\x8e") else None
        if isinstance(fields, dict) and self._random.random() < 0.5:
            fields[self._random.choice(list(fields))] = self._random.choice(ODD_VALUES)
            with contextlib.suppress(ValueError, OverflowError, UnicodeEncodeError):
                return packed(fields)
        return content[: self._random.choice([len(content), len(content) // 2])]

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_TRUNC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.write(descriptor, self._content())
        finally:
            os.close(descriptor)

    def _hold(self, path: Path) -> None:
        """Be alive: what is dead is removed."""
        lock = self._root / "ranks" / f"victim{self._random.randrange(VICTIMS)}" / "lock"
        if lock.parent.is_symlink():
            return
        lock.parent.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self._held.append(os.open(lock, flags, 0o600))
        with contextlib.suppress(OSError):
            fcntl.flock(self._held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if len(self._held) > 2 * VICTIMS:
            os.close(self._held.pop(self._random.randrange(len(self._held))))

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            for directory, names, files in os.walk(path, topdown=False):
                for name in files:
                    Path(directory, name).unlink()
                for name in names:
                    below = Path(directory, name)
                    if below.is_symlink():
                        below.unlink()
                    else:
                        below.rmdir()
            path.rmdir()
        else:
            path.unlink()

    def _truncate(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.ftruncate(descriptor, self._random.choice([0, 1, 100, 20 * 2**20, 2**40]))
        finally:
            os.close(descriptor)

    def _make_directory(self, path: Path) -> None:
        self._remove_if_there(path)
        path.mkdir(parents=True)

    def _make_link(self, path: Path) -> None:
        self._remove_if_there(path)
        healthy = self._random.choice(self._healthy).store.path
        elsewhere = [Path(name) for name in ("/dev/zero", "/", "/nowhere", "..")]
        path.symlink_to(
            self._random.choice([healthy, healthy / "snapshot", path, self._root, *elsewhere])
        )

    def _make_pipe(self, path: Path) -> None:
        self._remove_if_there(path)
        os.mkfifo(path)

    def _make_socket(self, path: Path) -> None:
        self._remove_if_there(path)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))

    def _rename(self, path: Path) -> None:
        path.rename(self._path())

    def _link_file(self, path: Path) -> None:
        other = self._path()
        self._remove_if_there(other)
        os.link(path, other, follow_symlinks=False)

    def _copy_healthy(self, path: Path) -> None:
        """What a healthy rank says, with its lock: a copy of links, as some backups are."""
        victim = self._root / "ranks" / f"victim{self._random.randrange(VICTIMS)}"
        self._remove_if_there(victim)
        victim.mkdir()
        healthy = self._random.choice(self._healthy).store.path
        (victim / "snapshot").write_bytes((healthy / "snapshot").read_bytes())
        # To the lock nobody writes.
        os.link(healthy / "lock", victim / "lock")

    def _change_mode(self, path: Path) -> None:
        if not path.is_symlink():
            path.chmod(self._random.choice([0o000, 0o400, 0o600, 0o777]))

    def _change_times(self, path: Path) -> None:
        os.utime(path, ns=(0, self._random.choice([0, 2**62])), follow_symlinks=False)

    def _remove_if_there(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._remove(path)


@pytest.fixture
def backend() -> Iterator[Backend]:
    started = Backend().start()
    yield started
    started.stop()


def check(exporter: ExporterProcess, healthy: list[Healthy]) -> None:
    """All ten are there, each once, with what it has written last."""
    for rank in healthy:
        rank.write()
    samples = exporter.scrape().series("sglang_weight_bytes")
    found = sorted(
        (sample.labels["engine"], sample.value)
        for sample in samples
        if sample.labels["engine"].startswith("healthy")
    )
    assert found == sorted((f"healthy{rank.number}", rank.written) for rank in healthy)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(6.0, id="short"),
        pytest.param(600.0, id="long", marks=pytest.mark.release("files")),
    ],
)
def test_whatever_is_done_beside_ten_ranks_they_are_served_at_every_scrape(
    seconds: float, tmp_path: Path, backend: Backend
) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1" if seconds < 60 else str(time.time_ns())))
    print(f"FUZZ_SEED={seed}")
    seconds = float(os.environ.get("FUZZ_SECONDS", str(seconds)))
    runtime_dir = RuntimeDir.open(tmp_path / "runtime", {})
    healthy = [Healthy(runtime_dir, number) for number in range(HEALTHY)]
    sending = Rank(runtime_dir.path, tp=HEALTHY)
    vandal = Vandal(runtime_dir.path, healthy, random.Random(seed))
    exporter = ExporterProcess(
        runtime_dir.path,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.http_port}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
    ).start()
    try:
        eventually(exporter.scrape, what="metrics of the exporter process")
        assert exporter.process is not None
        process = psutil.Process(exporter.process.pid)
        descriptors: list[int] = []
        memory: list[int] = []
        loads = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(descriptors) < ROUNDS:
            for _ in range(15):
                vandal.act()
            check(exporter, healthy)
            if not sending.waiting():
                sending.load(rows(3, base=(loads + 1) << 32))
                loads += 1
            descriptors.append(process.num_fds())
            memory.append(process.memory_info().rss)
        eventually(lambda: not sending.waiting(), what="all spans")
        assert (
            len([span for span in backend.spans() if span.name == "sglang.weights.load"]) >= loads
        )
        # As many as in the middle, where the exporter had seen it all.
        middle = len(descriptors) // 2
        assert min(descriptors[middle:]) <= max(descriptors[:middle])
        assert min(memory[-3:]) < 1.3 * max(memory[:middle])
        assert "Traceback" not in exporter.log()
    finally:
        vandal.close()
        exporter.end(signal.SIGKILL)
