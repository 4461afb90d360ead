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
from engines import Engine, kill
from waiting import eventually


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


@pytest.fixture(
    params=[
        "tensor_parallel_engine",
        pytest.param("old_engine", marks=pytest.mark.release("oldest")),
    ]
)
def faulty_engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(request.param)
    return engine


def updates(engine: Engine) -> float:
    """Of each rank, once all have come as far: SGLang waits for the first rank alone."""
    found = {
        sample.value
        for sample in engine.scrape().series("sglang_weight_updates_total", source="disk")
    }
    assert len(found) == 1, f"ranks have counted {found}"
    return found.pop()


def test_a_reload_that_could_not_be_written_is_counted_when_it_can(
    faulty_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    ranks = len(faulty_engine.scrape().series("sglang_weight_info"))
    before = max(
        each.value
        for each in faulty_engine.scrape().series("sglang_weight_updates_total", source="disk")
    )
    with no_writes(faulty_engine.runtime_dir):
        status, answer = faulty_engine.update_weights_from_disk(checkpoints[1])
        assert (status, answer["success"]) == (200, True)
        # The truth or nothing: the rank says nothing while it cannot say what holds.
        eventually(
            lambda: not faulty_engine.scrape().series("sglang_weight_updates_total"),
            what="no rank is shown",
        )
    # Back by itself: nothing else happens in this engine.
    eventually(lambda: updates(faulty_engine) == before + 1, what="the reload is counted")
    assert faulty_engine.update_weights_from_disk(checkpoints[0])[1]["success"] is True
    eventually(lambda: updates(faulty_engine) == before + 2, what="and the next one")
    log = faulty_engine.log()
    assert log.count("SGLang is not affected; what could not be read is missing") <= 3 * ranks


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

        eventually(take, every=0.001, what="the port")
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
    faulty_engine: Engine, checkpoints: tuple[Path, Path], fault: Fault
) -> None:
    def answered() -> str:
        request = {
            "input_ids": [5, 6, 7],
            "sampling_params": {"temperature": 0, "max_new_tokens": 8},
        }
        status, answer = faulty_engine.post("/generate", request)
        assert status == 200
        text: str = answer["text"]
        return text

    def reload(checkpoint: Path) -> None:
        faulty_engine.put_requests_away()
        status, answer = faulty_engine.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True)

    reload(checkpoints[0])
    before = eventually(lambda: updates(faulty_engine))
    said, log = answered(), len(faulty_engine.log())
    with fault(faulty_engine):
        assert answered() == said
        reload(checkpoints[0])
        assert answered() == said
    reload(checkpoints[0])
    assert answered() == said

    def counted() -> bool:
        with contextlib.suppress(AssertionError, OSError):
            return updates(faulty_engine) == before + 2
        return False

    eventually(counted, what="both reloads are counted")
    assert "Traceback" not in faulty_engine.log()[log:]
