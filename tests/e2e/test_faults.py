# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine, whose runtime directory and exporter process meet with what happens to them.

What fails at each point of an update is tested with stand-ins (``tests/hooks/test_faults.py``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from engines import Engine, eventually, kill


@contextlib.contextmanager
def no_writes(directory: Path) -> Iterator[None]:
    """Nothing can be made or removed in it, as after an error of the disk."""
    directories = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    tried = subprocess.run(
        ["chattr", "+i", *directories], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"needs root and immutable directories: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *directories], check=True)


def test_a_reload_that_could_not_be_written_is_counted_when_it_can(
    old_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    def updates() -> float:
        return old_engine.scrape().sum("sglang_weight_updates_total", source="disk")

    before = updates()
    with no_writes(old_engine.runtime_dir):
        status, answer = old_engine.update_weights_from_disk(checkpoints[1])
        assert (status, answer["success"]) == (200, True)
        # The truth or nothing: the rank says nothing while it cannot say what holds.
        assert old_engine.scrape().series("sglang_weight_updates_total") == []
    # Back by itself: nothing else happens in this engine.
    eventually(lambda: updates() == before + 1, 60, what="the reload is counted")
    assert old_engine.update_weights_from_disk(checkpoints[0])[1]["success"] is True
    eventually(lambda: updates() == before + 2, 30, what="and the next one")
    log = old_engine.log()
    assert log.count("SGLang is not affected; what could not be read is missing") <= 3


Fault = Callable[[Engine], AbstractContextManager[None]]


@contextlib.contextmanager
def directory_removed(engine: Engine) -> Iterator[None]:
    shutil.rmtree(engine.runtime_dir)
    yield


@contextlib.contextmanager
def locks_removed(engine: Engine) -> Iterator[None]:
    for lock in engine.runtime_dir.rglob("*.lock"):
        lock.unlink()
    for lock in engine.runtime_dir.rglob("lock"):
        lock.unlink()
    yield


@contextlib.contextmanager
def garbage(engine: Engine) -> Iterator[None]:
    for snapshot in engine.runtime_dir.rglob("snapshot"):
        snapshot.write_bytes(b"\xc1" * 1000)
    yield


@contextlib.contextmanager
def fifo(engine: Engine) -> Iterator[None]:
    for snapshot in engine.runtime_dir.rglob("snapshot"):
        snapshot.unlink()
        os.mkfifo(snapshot)
    yield


@contextlib.contextmanager
def exporter_stopped(engine: Engine) -> Iterator[None]:
    exporters = engine.exporters()
    for exporter in exporters:
        exporter.suspend()
    yield
    for exporter in exporters:
        exporter.resume()


@contextlib.contextmanager
def exporter_killed_and_port_taken(engine: Engine) -> Iterator[None]:
    kill(engine.exporters())
    with contextlib.ExitStack() as stack:

        def take() -> bool:
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", engine.exporter_port)))
                return True
            return False

        eventually(take, 10, every=0.001, what="the port")
        yield


FAULTS: list[Fault] = [
    directory_removed,
    locks_removed,
    garbage,
    fifo,
    exporter_stopped,
    exporter_killed_and_port_taken,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_serves_and_reloads_as_before_and_is_shown_again(
    old_engine: Engine, checkpoints: tuple[Path, Path], fault: Fault
) -> None:
    def answered() -> str:
        request = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0}}
        status, answer = old_engine.post("/generate", request)
        assert status == 200
        text: str = answer["text"]
        return text

    def updates() -> float:
        return old_engine.scrape().sum("sglang_weight_updates_total", source="disk")

    def reload(checkpoint: Path) -> None:
        old_engine.put_requests_away()
        status, answer = old_engine.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True)

    reload(checkpoints[0])
    before, said, log = eventually(updates, 30, what="metrics"), answered(), len(old_engine.log())
    with fault(old_engine):
        assert answered() == said
        reload(checkpoints[0])
        assert answered() == said
    reload(checkpoints[0])
    assert answered() == said

    def counted() -> bool:
        with contextlib.suppress(AssertionError, OSError):
            return updates() == before + 2
        return False

    eventually(counted, 60, what="both reloads are counted")
    assert "Traceback" not in old_engine.log()[log:]
