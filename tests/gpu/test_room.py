# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is released comes back only where there is room, and that is said before anybody asks.

Two engines of one exporter share GPU 0; a third process takes what they have released.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from engines import PREFIX, Engine, Installation
from gpu_engines import MIB, Record, need_gpus, nvidia_smi, write_checkpoint
from monitoring import Monitoring
from waiting import LIMIT, eventually

#: 16,384 bytes each: 16.4 GB of KV pool for each engine.
TOKENS = 1_000_000
#: What NVML and the memory saver may differ by: contexts, and what is cached beside its segments.
APART = 128 * MIB
ALERT = "SGLangNoRoomToResume"

HOLD = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_gpus()
    return write_checkpoint(tmp_path_factory.mktemp("model"), 0)


def engine(checkpoint: Path, **variables: str) -> Engine:
    return Engine(
        Installation(Path(sys.executable), gpu=True),
        checkpoint,
        flags=[
            *("--enable-memory-saver", "--max-total-tokens", str(TOKENS)),
            *("--mem-fraction-static", "0.6", "--skip-server-warmup"),
        ],
        variables={
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **variables,
        },
    )


@pytest.fixture
def two_engines(checkpoint: Path) -> Iterator[tuple[Engine, Engine]]:
    """The second one in the runtime directory of the first, whose exporter serves both."""
    first = engine(checkpoint)
    shared = {PREFIX + "RUNTIME_DIR": str(first.runtime_dir), PREFIX + "SERVE": "off"}
    second = engine(checkpoint, **shared)
    try:
        for each in (first, second):
            each.start()
            each.wait_until_ready()
        eventually(first.scrape)
        yield first, second
    finally:
        second.stop()
        first.stop()


@contextlib.contextmanager
def held(nbytes: int) -> Iterator[None]:
    """Another process has so much of GPU 0."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"holds\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(LIMIT)


def used() -> int:
    return nvidia_smi()[0].used * MIB


def free() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.check_output(query, text=True)) * MIB


def settled() -> int:
    """Bytes in use once they do not change any more."""
    seen: list[int] = []

    def same() -> bool:
        seen.append(used())
        return len(seen) > 3 and len(set(seen[-3:])) == 1

    eventually(same, every=0.5)
    return seen[-1]


def resume_bytes(running: Engine) -> int:
    found = running.scrape().series("sglang_gpu_memory_resume_bytes")
    assert len(found) == 1, found
    return int(found[0].value)


def room_of(running: Engine) -> float:
    """Bytes of the GPU that are free, by metrics, whose reading is a second old at most."""
    scrape = running.scrape()
    whole, in_use = (scrape.one(f"sglang_gpu_memory_{each}_bytes") for each in ("total", "used"))
    return whole - in_use


@contextlib.contextmanager
def prometheus(running: Engine, directory: Path) -> Iterator[Monitoring | None]:
    """With the shipped rules and the one that switches the alert on; None on a machine without a
    Prometheus, where the alert is not asked for."""
    if shutil.which("prometheus") is None:
        warnings.warn("The alert is not asked for: that needs `prometheus` in PATH.", stacklevel=2)
        yield None
        return
    own = {
        "record": "sglang_weights:room_to_resume_within_seconds",
        "expr": "vector(5)",
        "labels": {"model_name": str(running.model)},
    }
    target = {"sglang-weights": f"127.0.0.1:{running.exporter_port}"}
    monitoring = Monitoring(directory, target, own_rules=[own], notifies=False)
    try:
        yield monitoring.start()
    finally:
        monitoring.stop()


def firing(monitoring: Monitoring) -> list[str]:
    """What the alert says, where it fires."""
    alerts = monitoring.active_alerts(ALERT)
    return [each["annotations"]["description"] for each in alerts if each["state"] == "firing"]


def said(running: Engine, record: Record, moment: str) -> str:
    """What `status` says of the GPU."""
    printed = running.exporter_cli("status").stdout
    told = printed[printed.index("GPU 0") :] if "GPU 0" in printed else ""
    record(f"status, {moment}", told)
    print(f"{moment}:\n{told}")
    return told


def test_two_engines_resume_into_room_that_another_process_had(
    two_engines: tuple[Engine, Engine], checkpoint: Path, record_property: Record
) -> None:
    first, second = two_engines
    for each in two_engines:
        status, answer = each.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True), answer
    scrape = first.scrape()
    peaks = scrape.series("sglang_rank_memory_update_peak_bytes")
    assert {peak.labels["engine"] for peak in peaks} == {str(first.port), str(second.port)}
    for peak in peaks:
        record_property(f"update peak of engine {peak.labels['engine']}", peak.value)
    assert resume_bytes(first) == 0
    full = settled()
    gone = 0
    for each in two_engines:
        assert each.post("/release_memory_occupation", {})[0] == 200
        gone = full - settled()

        def published(gone: int = gone) -> bool:
            record_property("resume, published", resume_bytes(first))
            record_property("resume, by nvidia-smi", gone)
            # What torch has cached beside the saver's segments goes with the flush, and stays gone.
            # nvidia-smi counts in MiB, and a driver maps two at a time.
            assert -4 * MIB <= gone - resume_bytes(first) <= APART, (gone, resume_bytes(first))
            return True

        assert eventually(published)
    room = said(first, record_property, "both released")
    assert f"resume    takes {resume_bytes(first):,} bytes, and they fit" in room
    taken = free() - resume_bytes(first) // 2
    with held(taken):

        def short() -> bool:
            told = said(first, record_property, "another process has the room")
            more = re.search(r"takes ([\d,]+) bytes, ([\d,]+) more than there are", told)
            assert more is not None, told
            numbers = [int(each.replace(",", "")) for each in more.groups()]
            assert numbers[0] == resume_bytes(first)
            missing = numbers[0] - free()
            record_property("missing, by nvidia-smi", missing)
            return abs(numbers[1] - missing) <= 4 * MIB

        assert eventually(short)
        eventually(lambda: resume_bytes(first) > room_of(first), what="metrics say so too")
    eventually(lambda: "and they fit" in said(first, record_property, "it let go"))
    for each in two_engines:
        assert each.post("/resume_memory_occupation", {})[0] == 200
        status, answer = each.update_weights_from_disk(checkpoint)
        assert (status, answer["success"]) == (200, True), answer
    assert eventually(lambda: resume_bytes(first) == 0)
    assert abs(settled() - full) <= APART
    printed = first.exporter_cli("advise").stdout
    record_property("advise, two engines", printed)
    print(printed)


def resume_without_room(
    running: Engine, monitoring: Monitoring | None, record_property: Record
) -> None:
    """It is said before anybody asks, and then it fails."""
    told = eventually(
        lambda: re.search(
            "more than there are", said(running, record_property, "before the resume")
        )
    )
    assert told
    if monitoring is not None:
        alert = eventually(partial(firing, monitoring), what=f"{ALERT} fires")
        assert alert
        record_property("alert", alert[0])
        print(alert[0])
        assert running.main.poll() is None
    try:
        answer: object = running.post("/resume_memory_occupation", {})
    except OSError as error:
        answer = repr(error)
    record_property("answer to the resume", str(answer))
    print(f"resume: {answer}")
    # torch_memory_saver ends the scheduler's process, and SGLang the others after it.
    eventually(lambda: running.main.poll() is not None, what="the engine has ended")
    record_property("log", running.log()[-1500:])
    assert "out of memory" in running.log()


def test_a_resume_without_room_fails_as_was_said(
    checkpoint: Path, tmp_path: Path, record_property: Record
) -> None:
    running = engine(checkpoint)
    try:
        running.start()
        running.wait_until_ready()
        eventually(running.scrape)
        assert running.post("/release_memory_occupation", {})[0] == 200
        assert eventually(lambda: resume_bytes(running) > 0)
        with prometheus(running, tmp_path) as monitoring:
            if monitoring is not None:
                eventually(lambda: monitoring.query("sglang_gpu_memory_resume_bytes > 0"))
                assert firing(monitoring) == []
            with held(free() - resume_bytes(running) // 2):
                resume_without_room(running, monitoring, record_property)
    finally:
        running.stop()
