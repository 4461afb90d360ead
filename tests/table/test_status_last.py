# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`status --last` and `table --at` of ranks that have ended, in whatever state their files are."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import clean_environment
from published import Command, PublishedRank
from ranks import ExporterProcess
from waiting import eventually

from sglang_weight_exporter.records.black_box import BlackBox, Crash, Doing, OutOfMemory, Segment
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.records.memory import MEMORY_PARTS, DeviceMemory, MemoryOwner
from sglang_weight_exporter.records.updates import UpdateInProgress

GIB = 2**30
NOW = 1_700_000_000.0
IN_UPDATE = Doing(
    updates={
        "target": UpdateInProgress(
            source="distributed", started_at=NOW - 1, last_call_at=NOW, phase="receive"
        )
    }
)
PARTS = dict.fromkeys(MEMORY_PARTS, 0) | {"weights": 60 * GIB, "kv_pool": 10 * GIB}
ERROR = OutOfMemory(
    at=NOW,
    device="cuda:0",
    requested=6 * GIB,
    free=4 * GIB,
    limit=80 * GIB,
    total=80 * GIB,
    memory=DeviceMemory(
        device="cuda:0",
        at=NOW,
        allocated=70 * GIB,
        reserved=70 * GIB,
        allocated_peak=70 * GIB,
        reserved_peak=70 * GIB,
        parts=PARTS,
    ),
    largest_free=GIB,
    owners=(MemoryOwner(address=4096, nbytes=64, part="weights", name="embed.weight (target)"),),
    doing=IN_UPDATE,
)
CRASH = Crash(at=NOW, error="OutOfMemoryError", message="CUDA out of memory.\nTried", where=("f",))


def box(rank: PublishedRank, **fields: Any) -> BlackBox:
    return BlackBox(
        rank_id=rank.store.rank_id, pid=4711, engine=rank.engine, ranks=rank.ranks, **fields
    )


def lines(ran: subprocess.CompletedProcess[bytes]) -> list[str]:
    assert ran.stderr == b""
    return ran.stdout.decode().splitlines()


def test_of_a_rank_that_ended_it_says_why_and_what_held_the_memory(
    rank: PublishedRank, command: Command
) -> None:
    ended = box(rank, count=3, errors=(ERROR,), crash=CRASH)
    rank.store.leave_black_box(ended, None)
    rank.store.close()
    ran = command("status", "--last")
    assert ran.returncode == 0
    text = "\n".join(lines(ran))
    for said in (
        "engine 30000, tp 0 pp 0  (process 4711",
        "by OutOfMemoryError: CUDA out of memory.",
        "3 CUDA out-of-memory errors",
        "in an update of the target model from distributed (receive)",
        f"asked   {6 * GIB:,} bytes on cuda:0, where {4 * GIB:,} of {80 * GIB:,} were free",
        f"{GIB:,} bytes, the largest that torch had free",
        f"weights         {60 * GIB:>18,}",
        f"torch           {70 * GIB:>18,}",
        # 80 less the 4 that were free and the 70 of torch.
        f"elsewhere       {6 * GIB:>18,}",
        "weights  embed.weight (target)",
    ):
        assert said in text
    assert "lora" not in text  # Zeros are not said.


def test_a_rank_that_was_killed_in_an_update_is_known_by_what_it_wrote_last(
    rank: PublishedRank, command: Command
) -> None:
    rank.begin_update(phase="load")
    rank.store.close()
    text = command("status", "--last").stdout.decode()
    assert "said nothing" in text
    assert "during    an update of the target model from disk (load)" in text


def test_where_nothing_runs_any_more_status_says_what_ended(
    rank: PublishedRank, command: Command
) -> None:
    rank.store.leave_black_box(box(rank, crash=CRASH), None)
    assert b"has ended" not in command("status").stdout
    rank.store.close()
    said = "! The rank tp 0 pp 0 of engine 30000 (process 4711) has ended: OutOfMemoryError: CUDA"
    assert said in command("status").stdout.decode()


def test_a_rank_that_was_killed_at_another_time_has_nothing_to_tell(
    rank: PublishedRank, command: Command
) -> None:
    rank.store.close()
    ran = command("status", "--last")
    assert ran.returncode == 1
    assert "no rank has ended" in lines(ran)[0]


def test_one_that_goes_on_after_an_error_is_shown_as_that(
    rank: PublishedRank, command: Command
) -> None:
    rank.store.leave_black_box(box(rank, count=1, errors=(ERROR,)), None)
    text = command("status", "--last").stdout.decode()
    assert "  goes on\n" in text
    assert "1 CUDA out-of-memory errors" in text


def test_ranks_of_the_engine_that_ended_last_are_shown_and_no_others(
    runtime_dir: Path, command: Command
) -> None:
    def end(tp: int, instance: str, at: float) -> None:
        made = PublishedRank(runtime_dir, ranks=Ranks(tp=tp))
        made.engine = msgspec.structs.replace(made.engine, instance=instance)
        made.publish()
        crash = msgspec.structs.replace(CRASH, at=at)
        made.store.leave_black_box(box(made, crash=crash), None)
        made.store.close()

    end(0, "before", NOW)
    end(0, "after", NOW + 60)
    end(1, "after", NOW + 60)
    shown = [line for line in lines(command("status", "--last")) if line.startswith("engine")]
    assert [line.partition("  ")[0] for line in shown] == [
        "engine 30000, tp 0 pp 0",
        "engine 30000, tp 1 pp 0",
    ]


def test_a_damaged_black_box_costs_itself_alone(rank: PublishedRank, command: Command) -> None:
    rank.store.leave_black_box(box(rank, crash=CRASH), None)
    (rank.store.path / "black_box").write_bytes(b"\xc1" * 100)
    rank.begin_update(phase="load")
    rank.store.close()
    text = command("status", "--last").stdout.decode()
    assert "an update of the target model from disk (load)" in text


POOL = MemoryOwner(address=2**40, nbytes=4096, part="kv_pool", name="full 3 (target)")
SEGMENTS = (
    Segment(address=2**40, nbytes=2**20),
    Segment(address=2**41, nbytes=2**21, of_graphs=True),
)


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("0x2081", 0, "layers.1.w  byte 1 of 128"),
        (hex(2**40 + 5), 0, "full 3 (target)  byte 5 of 4,096, kv_pool"),
        (hex(2**40 + 5000), 1, "byte 5,000 of a segment of torch's allocator (1,048,576 bytes): "
                               "of no tensor that is known, so an activation, a buffer, or freed"),
        (hex(2**41 + 7), 1, "(2,097,152 bytes): of CUDA graphs"),
        ("0x7", 1, "it is in none"),
    ],
)  # fmt: skip
def test_an_address_of_a_rank_that_has_ended(
    rank: PublishedRank, command: Command, address: str, status: int, said: str
) -> None:
    rank.store.leave_black_box(box(rank, crash=CRASH, owners=(POOL,), segments=SEGMENTS), None)
    rank.store.close()
    ran = command("table", "--at", address)
    assert ran.returncode == status, ran.stderr
    text = "\n".join(lines(ran))
    assert said in text
    assert ("which has ended" in text) == (address != "0x7")


def test_what_a_rank_left_is_kept_by_the_exporter_and_said_once(
    runtime_dir: Path, command: Command, tmp_path: Path
) -> None:
    program = [sys.executable, "tests/shared/published.py", str(runtime_dir), "updating"]
    rank = subprocess.Popen(
        program, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=clean_environment(PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    exporter = ExporterProcess(runtime_dir).start()
    try:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
        eventually(lambda: not list((runtime_dir / "ranks").iterdir()), what="it is put away")
        assert len(list((runtime_dir / "ended").iterdir())) == 1
        text = command("status", "--last").stdout.decode()
        assert "during    an update of the target model from disk (wait)" in text
        assert command("table", "--at", "0x2081").returncode == 0
    finally:
        exporter.end(signal.SIGTERM)
    said = "has ended in the middle of an update of the target model from disk (wait): it said noth"
    assert exporter.log().count(said) == 1
    assert (runtime_dir / "ended").stat().st_mode & 0o777 == 0o700
    for file in (runtime_dir / "ended").rglob("*"):
        if file.is_file():
            assert file.stat().st_mode & 0o077 == 0
