# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`table` on the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import PREFIX, clean_environment
from published import ROWS, Command, PublishedRank

from sglang_weight_exporter.records.adapters import Adapter, Adapters
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.records.memory import MemoryDump, MemoryOwner
from sglang_weight_exporter.records.weights import TableChanges

COLUMNS = [
    "name",
    "data_ptr",
    "nbytes",
    "dtype",
    "shape",
    "stride",
    "device",
    "kind",
    "storage_ptr",
    "storage_nbytes",
]
#: Pointers as JSON has them.
TEXTS = {"data_ptr": "0x1000", "storage_ptr": "0x1000"}
MOVED = (
    *ROWS[1:3],
    ROWS[3]._replace(data_ptr=2**40),
    ROWS[4]._replace(nbytes=32),
    ROWS[0]._replace(name="new"),
)


def lines(ran: subprocess.CompletedProcess[bytes]) -> list[str]:
    assert ran.returncode in {0, 1}, ran.stderr
    return ran.stdout.decode().splitlines()


def values(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row as it was written, from a JSON object."""
    found = {**row, "data_ptr": int(row["data_ptr"], 16)}
    found["storage_ptr"] = int(row["storage_ptr"], 16)
    found |= {name: tuple(row[name]) for name in ("shape", "stride")}
    return tuple(found.values())


@pytest.mark.usefixtures("rank")
class TestOneTable:
    def test_text_has_a_line_for_each_tensor_and_the_memory_without_the_tied(
        self, command: Command
    ) -> None:
        title, header, *rows, total = lines(command("table"))
        assert "engine 30000" in title
        assert header.split() == ["name", "kind", "dtype", "shape", "bytes", "address", "device"]
        assert [row.split()[0] for row in rows] == [row.name for row in ROWS]
        assert rows[0].split()[3:6] == ["8x4", "64", "0x1000"]
        assert total.startswith("5 tensors, 324 bytes of memory")

    def test_sort_filter_and_totals(self, command: Command) -> None:
        by_bytes = lines(command("table", "--sort", "bytes"))[2:-1]
        assert [row.split()[0] for row in by_bytes] == [
            "layers.0.w",
            "layers.1.w",
            "embed.weight",
            "head.weight",
            "layers.0.scale",
        ]
        filtered = lines(command("table", "--filter", "layers.*", "--filter", "head*"))
        assert len(filtered) == 3 + 4
        assert filtered[-1].startswith("4 tensors, 324 bytes of memory")
        by_layer = [row.split() for row in lines(command("table", "--by", "layer"))[2:-1]]
        assert by_layer == [
            ["embed", "1", "64"],
            ["layers.0", "2", "132"],
            ["layers.1", "1", "128"],
            ["head", "1", "0"],  # Tied: its bytes are the embedding's.
        ]
        by_kind = [row.split() for row in lines(command("table", "--by", "kind"))[2:-1]]
        assert by_kind == [["parameter", "4", "320"], ["buffer", "1", "4"]]

    def test_jsonl_is_an_object_a_tensor(self, command: Command) -> None:
        rows = [json.loads(line) for line in lines(command("table", "--format", "jsonl"))]
        assert list(rows[0]) == COLUMNS
        assert rows[0]["data_ptr"] == "0x1000"
        assert [values(row) for row in rows] == list(ROWS)

    def test_json_also_says_whose_table_it_is(self, command: Command, rank: PublishedRank) -> None:
        (table,) = json.loads(command("table", "--format", "json").stdout)["tables"]
        assert [values(row) for row in table["tensors"]] == list(ROWS)
        whose = (table["engine"], table["role"], table["tp_rank"], table["dp_rank"], table["pid"])
        assert whose == ("30000", "target", 0, None, os.getpid())
        assert rank.role.table is not None
        assert table["sha256"] == rank.role.table.sha256

    def test_csv_has_the_same_columns(self, command: Command) -> None:
        text = command("table", "--format", "csv").stdout.decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        assert list(rows[0]) == COLUMNS
        assert rows[0]["shape"] == "[8, 4]"
        assert [int(row["data_ptr"], 16) for row in rows] == [row.data_ptr for row in ROWS]
        assert text.splitlines()[3].count("[]") == 2  # A scalar has no dimensions.

    def test_sglang_remote_has_elements_and_their_size(self, command: Command) -> None:
        weights = json.loads(command("table", "--format", "sglang-remote").stdout)
        assert weights["embed.weight"] == [4096, 32, 2]
        assert "layers.0.scale" not in weights  # Buffers are not asked for.

    def test_parquet_is_not_printed_on_a_terminal(self, runtime_dir: Path) -> None:
        primary, terminal = pty.openpty()
        ran = subprocess.run(
            [sys.executable, "-m", "sglang_weight_exporter", "table", "--format", "parquet"],
            env=clean_environment(**{PREFIX + "RUNTIME_DIR": str(runtime_dir)}),
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(terminal)
        os.close(primary)
        assert ran.returncode == 2
        assert "Redirect" in ran.stderr

    def test_a_reader_that_has_seen_enough_is_no_error(self, runtime_dir: Path) -> None:
        ran = subprocess.run(
            f"{sys.executable} -m sglang_weight_exporter table | head -1",
            shell=True,
            env=clean_environment(**{PREFIX + "RUNTIME_DIR": str(runtime_dir)}),
            capture_output=True,
            text=True,
        )
        assert ran.stdout.startswith("engine 30000")
        assert ran.stderr == ""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--regions", "--filter", "a"), "have no names"),
            (("--format", "mooncake", "--sort", "name"), "have no names"),
            (("--regions", "--format", "sglang-remote"), "Leave --regions out"),
            (("--by", "kind", "--format", "csv"), "Leave --format out"),
            (("--layout", "other", "x"), "the only one is weights-metadata"),
            (("--diff", "a", "b", "c"), "two files at most"),
            (("--diff", "missing.json"), "missing.json cannot be used"),
            (("--engine", "4"), "--engine 30000 --rank tp=0,pp=0 --role target"),
            (("--rank", "x=1"), "names no rank"),
        ],
    )
    def test_what_does_not_go_together_is_said(
        self, command: Command, arguments: tuple[str, ...], words: str
    ) -> None:
        ran = command("table", *arguments)
        assert ran.returncode == 2
        assert words in ran.stderr.decode()
        assert ran.stdout == b""


def test_without_an_engine_the_reason_is_said(command: Command) -> None:
    ran = command("table")
    assert ran.returncode == 2
    assert "No rank is alive here" in ran.stderr.decode()


def test_in_the_middle_of_an_update_it_waits_and_then_says_so(
    rank: PublishedRank, command: Command
) -> None:
    rank.begin_update()
    ran = command("table", "--wait", "0.1")
    assert ran.returncode == 2
    assert "being updated" in ran.stderr.decode()


def test_released_memory_is_said(rank: PublishedRank, command: Command) -> None:
    rank.release_memory()
    assert "released" in lines(command("table"))[1]


class TestSeveralTables:
    @pytest.fixture(autouse=True)
    def ranks(self, runtime_dir: Path) -> None:
        self.made = [
            PublishedRank(runtime_dir, ranks=Ranks(tp=tp, dp=0), role=role)
            for tp, role in ((0, "target"), (1, "target"), (0, "draft"))
        ]
        for made in self.made:
            made.publish()

    def test_a_format_for_one_process_asks_which(self, command: Command) -> None:
        ran = command("table", "--format", "mooncake")
        assert ran.returncode == 2
        assert "--engine 30000 --rank tp=1,pp=0,dp=0 --role target" in ran.stderr.decode()

    @pytest.mark.parametrize("rank", ["1", "tp=1", "dp=0,tp=1"])
    def test_a_rank_is_chosen(self, command: Command, rank: str) -> None:
        arguments = ("table", "--rank", rank, "--format", "json")
        (table,) = json.loads(command(*arguments).stdout)["tables"]
        assert table["tp_rank"] == 1

    def test_all_are_printed_in_text_and_json(self, command: Command) -> None:
        assert sum(line.startswith("engine ") for line in lines(command("table"))) == 3
        assert len(json.loads(command("table", "--format", "json").stdout)["tables"]) == 3

    def test_a_saved_table_is_compared_with_the_one_of_the_same_rank(
        self, command: Command, tmp_path: Path
    ) -> None:
        (tmp_path / "before.json").write_bytes(command("table", "--format", "json").stdout)
        ran = command("table", "--rank", "1", "--diff", "before.json")
        assert ran.returncode == 0
        assert ran.stdout == b"0 moved, 0 added, 0 removed, 0 resized, 0 device\n"

    def test_a_rank_in_the_middle_of_an_update_hides_no_other(self, command: Command) -> None:
        self.made[0].begin_update()
        ran = command("table", "--wait", "0.1")
        assert sum(line.startswith("engine ") for line in lines(ran)) == 2
        assert ran.stderr.decode().count("being updated") == 1
        assert command("table", "--wait", "0.1", "--rank", "1").stderr == b""

    def test_the_layout_is_written_for_all(self, command: Command, tmp_path: Path) -> None:
        ran = command("table", "--layout", "weights-metadata", tmp_path / "out")
        written = {Path(line).name for line in lines(ran)}
        assert written == {path.name for path in (tmp_path / "out").iterdir()}
        assert "weights_meta_0.json" in written
        assert len(written) == 6


def test_differences_are_printed_and_are_the_exit_status(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "before.json").write_bytes(command("table", "--format", "json").stdout)
    rank.publish(MOVED)
    expected = [
        "moved   layers.1.w  0x2080 → 0x10000000000",
        "added   new  0x1000, 64 bytes",
        "removed embed.weight  0x1000, 64 bytes",
        "resized head.weight  64 → 32 bytes",
        "1 moved, 1 added, 1 removed, 1 resized, 0 device",
    ]
    ran = command("table", "--diff", "before.json")
    assert (ran.returncode, lines(ran)) == (1, expected)
    (tmp_path / "after.json").write_bytes(command("table", "--format", "json").stdout)
    ran = command("table", "--diff", "before.json", "after.json")
    assert (ran.returncode, lines(ran)) == (1, expected)
    assert command("table", "--diff", "after.json", "after.json").returncode == 0


def test_the_changes_of_the_last_update_are_printed_with_what_was_cut(
    rank: PublishedRank, command: Command
) -> None:
    assert "no update since the load" in lines(command("table", "--diff"))[1]
    rank.publish(changes=TableChanges(moved=102, names={"moved": ("a", "b")}))
    ran = command("table", "--diff")
    assert ran.returncode == 1
    assert lines(ran)[1:] == [
        "  moved   a",
        "  moved   b",
        "  moved   and 100 more",
        "  102 moved, 0 added, 0 removed, 0 resized, 0 device",
    ]


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 10_000,
        b"\xff",
        b'{"tables": 1}',
        b'{"tables": [{"tensors": [{"name": "w"}]}]}',
        *(
            msgspec.json.encode(
                {"tables": [{"tensors": [{**ROWS[0]._asdict(), **TEXTS, key: value}]}]}
            )
            for key, value in (("nbytes", "x"), ("shape", 1), ("data_ptr", "x"), ("name", None))
        ),
    ],
)
def test_a_file_that_is_no_table_is_said(command: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.json").write_bytes(content)
    ran = command("table", "--diff", "other.json")
    assert ran.returncode == 2
    assert "other.json is not what" in ran.stderr.decode()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("0x1000", ["embed.weight  byte 0 of 64", "head.weight  byte 0 of 64"]),  # Tied.
        ("2081", ["layers.1.w  byte 1 of 128"]),
        ("0x20ff", ["layers.1.w  byte 127 of 128"]),
    ],
)
def test_an_address_is_found(
    rank: PublishedRank, command: Command, address: str, said: list[str]
) -> None:
    ran = command("table", "--at", address)
    assert ran.returncode == 0, ran.stderr
    title, *found = lines(ran)
    assert title.startswith(f"engine 30000  tp=0,pp=0  target  process {os.getpid()}")
    assert [line.partition(",")[0].strip() for line in found] == said


def test_a_view_reaches_to_its_last_element(rank: PublishedRank, command: Command) -> None:
    """A transposed view of 4 rows of 8 bytes in steps of 64: 200 bytes from end to end."""
    rank.publish([ROWS[0]._replace(shape=(4, 4), stride=(32, 1), nbytes=32)])
    last = 0x1000 + 3 * 64 + 3 * 2
    assert command("table", "--at", hex(last + 1)).returncode == 0
    assert command("table", "--at", hex(last + 2)).returncode == 1


def test_an_address_that_is_nobody_s(rank: PublishedRank, command: Command) -> None:
    ran = command("table", "--at", "0x2180")
    assert ran.returncode == 1
    assert "128 bytes behind layers.1.w" in lines(ran)[2]
    assert "640 bytes before layers.0.scale" in lines(ran)[3]
    assert "snapshot --ask" in lines(ran)[4]
    for text in ("x", "-1", "0x1ffffffffffffffff", ""):
        assert command("table", "--at", text).returncode == 2


def test_an_address_of_a_pool_where_the_rank_has_left_its_memory(
    rank: PublishedRank, command: Command
) -> None:
    pool = MemoryOwner(address=2**40, nbytes=4096, part="kv_pool", name="k_buffer[3] (target)")
    rank.store.leave_memory(MemoryDump(at=1.0, segments=b"[]", owners=(pool,)))
    ran = command("table", "--at", hex(2**40 + 5))
    assert ran.returncode == 0
    assert "k_buffer[3] (target)  byte 5 of 4,096, kv_pool" in lines(ran)[1]
    assert "snapshot --ask" not in command("table", "--at", "0x1").stdout.decode()


def test_no_torch_is_needed(rank: PublishedRank, runtime_dir: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pyarrow', 'sglang'): sys.modules[name] = None\n"
        "from sglang_weight_exporter.cli import main\n"
        "sys.exit(main(['table', '--format', 'json']))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment(**{PREFIX + "RUNTIME_DIR": str(runtime_dir)}),
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_adapters_are_named_with_what_is_known_of_them(
    rank: PublishedRank, command: Command
) -> None:
    none = command("table", "--adapters")
    assert none.returncode == 2
    assert b"--enable-lora" in none.stderr
    named = tuple(
        Adapter(name=f"step-{number}", rank=8, nbytes=4096, loaded_at=float(number), slot=slot)
        for number, slot in enumerate((None, 1, None, None, None, 0))
    )
    held = Adapters(count=7, nbytes=7 * 4096, changed_at=5.0, named=named)
    rank.role = msgspec.structs.replace(rank.role, adapters=held)
    rank.publish()
    shown = [line.split() for line in lines(command("table", "--adapters"))]
    assert shown[1] == ["name", "rank", "bytes", "slot", "loaded", "fingerprint"]
    assert shown[2] == ["step-0", "8", "4,096", "-", "1970-01-01T00:00:00+00:00", "-"]
    assert shown[3] == ["step-1", "8", "4,096", "1", "1970-01-01T00:00:01+00:00", "-"]
    assert (
        b"7 adapters, 28,672 bytes in the host's memory; 1 that were loaded before"
        in command("table", "--adapters").stdout
    )
    status = command("status").stdout.decode()
    assert "lora    7 adapters, 28,672 bytes in the host's memory" in status
    assert re.findall(r"step-(\d)  rank 8, 4,096 bytes, (\w+ ?\w* ?\w*),", status) == [
        *(("1", "slot 1"), ("2", "in no slot"), ("3", "in no slot"), ("4", "in no slot")),
        ("5", "slot 0"),
    ]
