# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`snapshot`: blocks are named, files are read by those that they are for, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import clean_environment
from published import ROWS, Command, PublishedRank
from waiting import LIMIT

from sglang_weight_exporter.cli.torch_snapshot import SnapshotError, read_snapshot
from sglang_weight_exporter.records.memory import MemoryDump, MemoryOwner
from sglang_weight_exporter.store.rank import MEMORY
from sglang_weight_exporter.weight_table import Row

#: An engine's memory with CUDA graphs on; see tests/capture/test_account.py.
RECORDED = Path(__file__).parents[1] / "capture" / "recorded" / "graphs.json"


def engine() -> tuple[list[dict[str, Any]], list[MemoryOwner], list[tuple[int, int]]]:
    """The recorded segments as torch has them, what lies in them, and the graphs' pools."""
    recorded = json.loads(RECORDED.read_text())
    segments = [
        {
            "address": address,
            "device": 0,
            "stream": 0,
            "total_size": size,
            "allocated_size": sum(block[0] for block in blocks if block[2]),
            "active_size": sum(block[0] for block in blocks if block[2]),
            "segment_type": "large",
            "segment_pool_id": pool,
            "is_expandable": False,
            "frames": [],
            "blocks": [
                {
                    "size": size,
                    "requested_size": asked,
                    "state": "active_allocated" if live else "inactive",
                    "frames": [],
                }
                for size, asked, live in blocks
            ],
        }
        for address, size, pool, blocks in recorded["segments"]
    ]
    owners = [
        MemoryOwner(address=address, nbytes=nbytes, part=part, name=f"{part} {number} (target)")
        for part in ("weights", "kv_pool", "kv_tables")
        for number, (address, nbytes) in enumerate(recorded[part])
    ]
    return segments, owners, [tuple(recorded["graph_pool"])]


def leave(rank: PublishedRank) -> None:
    """What the rank does at a capture, once it was asked."""
    segments, owners, pools = engine()
    assert rank.store.memory_is_wanted
    rank.store.leave_memory(
        MemoryDump(
            at=1.0,
            segments=msgspec.json.encode(segments),
            owners=tuple(owners),
            graph_pools=tuple(pools),
        )
    )


def test_a_rank_leaves_its_memory_when_it_was_asked(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    assert b"was not asked" in command("snapshot", "--output", str(tmp_path)).stderr
    assert b"1 ranks leave their memory" in command("snapshot", "--ask").stdout
    waiting = command("snapshot", "--output", str(tmp_path))
    assert waiting.returncode == 1
    assert b"nothing has happened to it" in waiting.stderr
    leave(rank)
    assert not rank.store.memory_is_wanted
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "engine-30000-tp_rank0-pp_rank0.pickle").write_bytes(b"of all")
    taken = command("snapshot", "--output", str(tmp_path / "out"))
    assert taken.returncode == 0, taken.stderr
    viewer, perfetto = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix)[::-1]
    for path in (viewer, perfetto):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    content = pickle.loads(viewer.read_bytes())
    segments, owners, _ = engine()
    weights = {owner.address: owner.name for owner in owners if owner.part == "weights"}
    live = {
        block["address"]: block
        for segment in content["segments"]
        for block in segment["blocks"]
        if block["state"] != "inactive"
    }
    assert weights.keys() <= live.keys()
    for address, name in weights.items():
        assert live[address]["name"] == name
        assert live[address]["frames"][0] == {"filename": name, "line": 0, "name": "weights"}
    assert viewer.read_bytes()[:2] == b"\x80\x04", "the viewer reads no later protocol"
    blocks = [block for segment in content["segments"] for block in segment["blocks"]]
    assert {block["part"] for block in blocks if "part" in block} == {
        "weights",
        "kv_pool",
        "kv_tables",
        "cuda_graphs",
        "other_tensors",
    }
    events = [e for e in json.loads(perfetto.read_text())["traceEvents"] if e["ph"] == "X"]
    assert sum(event["dur"] for event in events) == sum(each["total_size"] for each in segments)
    assert set(weights.values()) <= {event["name"] for event in events}


def test_pytorchs_own_reader_takes_the_file(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz", reason="needs torch, comes with SGLang")
    command("snapshot", "--ask")
    leave(rank)
    assert command("snapshot", "--output", str(tmp_path)).returncode == 0
    (viewer,) = tmp_path.glob("*.pickle")
    content = pickle.loads(viewer.read_bytes())
    summary = viz.segsum(content)
    assert "segments: 54" in summary
    assert "MemoryViz" in viz.segment_plot(content)


def torchs_file(path: Path, history: Sequence[Any] = ()) -> Path:
    """As ``_dump_snapshot`` writes it, with a block a storage."""
    blocks = [
        {"size": 4096, "requested_size": 64, "state": "active_allocated", "frames": []},
        {"size": 1024, "requested_size": 1024, "state": "active_allocated", "frames": []},
        {"size": 1024, "requested_size": 4, "state": "active_allocated", "frames": []},
        {"size": 1024, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    segment = {"address": 4096, "device": 0, "total_size": 7168, "blocks": blocks}
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [[*history]]}))
    return path


def test_blocks_of_a_file_of_torchs_are_named_by_the_ranks_table(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    done = command(
        "snapshot", str(torchs_file(tmp_path / "dump.pickle")), "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    content = pickle.loads((tmp_path / "dump-named.pickle").read_bytes())
    names = [block.get("name") for block in content["segments"][0]["blocks"]]
    assert names == [
        "embed.weight (target)",
        "layers.0.w (target) and 1 more",
        "layers.0.scale (target)",
        None,
    ]


def test_allocations_of_a_history_have_the_names_of_their_blocks(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    """What the viewer's timeline shows; the blocks' own frames it shows of what is older."""
    by = {"name": "load", "filename": "loader.py", "line": 7}
    steps = [
        ("segment_alloc", 4096),
        ("alloc", 4096),  # Of a tensor that is no more, where a weight is now.
        ("free_requested", 4096),
        ("free_completed", 4096),
        ("alloc", 4096),
        ("alloc", 9216),  # Where a weight is now that came when no history was taken.
        ("free_requested", 9216),
        ("free_completed", 9216),
        ("alloc", 10240),
        ("free_requested", 10240),
        ("free_completed", 10240),
        ("snapshot", 0),
    ]
    history = [{"action": action, "addr": address, "frames": [by]} for action, address in steps]
    file = torchs_file(tmp_path / "dump.pickle", history)
    done = command("snapshot", str(file), "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = pickle.loads((tmp_path / "dump-named.pickle").read_bytes())
    weight = {"filename": "embed.weight (target)", "line": 0, "name": "weights"}
    frames = [event["frames"] for event in content["device_traces"][0]]
    assert frames == [[weight, by] if number == 4 else [by] for number in range(len(steps))]
    assert content["segments"][0]["blocks"][0]["frames"] == [weight]


def test_the_viewer_hides_no_name(rank: PublishedRank, command: Command, tmp_path: Path) -> None:
    """``frameFilter`` of torch/utils/viz/MemoryViz.js drops functions with this in their name."""
    name = "audio_tower.layers.0.ffw_layer_start.ffw_layer_1.weight"
    rank.publish([Row(name, *ROWS[0][1:])])
    command("snapshot", str(torchs_file(tmp_path / "dump.pickle")), "--output", str(tmp_path))
    content = pickle.loads((tmp_path / "dump-named.pickle").read_bytes())
    (frame,) = content["segments"][0]["blocks"][0]["frames"]
    assert frame["filename"] == f"{name} (target)"
    assert "_start" not in frame["name"]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path.cwd() / "it-ran"),)


def test_a_pickle_that_would_run_something_is_refused(
    rank: PublishedRank, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps({"segments": [Evil()]}))
    done = command("snapshot", str(tmp_path / "evil.pickle"))
    assert done.returncode == 2
    assert b"mkdir, which no snapshot of torch needs" in done.stderr
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps(7),
        pickle.dumps({"segments": [{"address": 1}]}),
        pickle.dumps({"segments": [{"address": 1, "total_size": 9, "blocks": []}]}),
    ],
)
def test_what_is_no_snapshot_is_refused_in_words(
    rank: PublishedRank, command: Command, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file.pickle").write_bytes(content)
    done = command("snapshot", str(tmp_path / "file.pickle"), "--output", str(tmp_path))
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.strip().endswith(b".")


def test_a_file_that_a_rank_has_left_damaged_is_refused(
    rank: PublishedRank, command: Command, tmp_path: Path
) -> None:
    (rank.store.path / MEMORY).write_bytes(io.BytesIO(b"\x81").getvalue())
    done = command("snapshot", "--output", str(tmp_path))
    assert done.returncode == 2
    assert b"is damaged" in done.stderr


@pytest.mark.parametrize("segments", [b"", b"{", b"7", b'[{"address": 1}]', b"[" * 10_000])
def test_segments_that_a_rank_has_left_damaged_are_refused(
    rank: PublishedRank, command: Command, tmp_path: Path, segments: bytes
) -> None:
    rank.store.leave_memory(MemoryDump(at=1.0, segments=segments, owners=()))
    done = command("snapshot", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.strip().endswith(b".")


def segment(**changes: Any) -> dict[str, Any]:
    blocks = [{"size": 512, "state": "active_allocated", "frames": []}]
    return {"device": 0, "address": 4096, "total_size": 512, "blocks": blocks, **changes}


def nested(depth: int) -> bytes:
    """`{"segments": [], "x": a tuple in a tuple in …}`; pickle itself makes no such thing."""
    return b"\x80\x04}(\x8c\x08segments]\x8c\x01xN" + b"\x85" * depth + b"u."


def bombs() -> dict[str, bytes]:
    """Pickles that are small and ask for much."""
    twice = segment()
    frames = [{"name": "f", "filename": "f", "line": 1}] * 100_000
    blocks = [{"size": 512, "state": "active_allocated", "frames": frames} for _ in range(3000)]
    shared = segment(total_size=512 * 3000, blocks=blocks)
    return {
        "a memo of 300,000,000": b"\x80\x02Nr" + struct.pack("<I", 300_000_000) + b".",
        "text of 2^40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
        "a number of 2^31 digits": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "a million tuples": nested(1_000_000),
        "a segment many times": pickle.dumps({"segments": [twice] * 200_000}),
        "frames that all blocks share": pickle.dumps({"segments": [shared]}),
        "a thousand million devices": pickle.dumps({"segments": [segment(device=10**9)]}),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_pickle_takes_what_a_file_of_its_size_may_take(
    rank: PublishedRank, runtime_dir: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "file.pickle"
    file.write_bytes(bombs()[name])
    arguments = ["snapshot", file, "--output", tmp_path / "out", "--runtime-dir", runtime_dir]
    program = (
        "import re, sys\n"
        "from sglang_weight_exporter.cli import main\n"
        "status = main(sys.argv[1:])\n"
        # Not getrusage's: that knows what the process had before it became this program.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "print(int(peak[1]) * 1024)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(file) in done.stderr
    assert done.stderr.strip().endswith(".")
    assert int(done.stdout) < 2**29 + 100 * file.stat().st_size
    assert not (tmp_path / "out").exists()


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "content",
    [
        *(
            {"segments": [segment(**{key: value})]}
            for key, value in (
                ("device", -1),
                ("device", "x"),
                ("device", 1.5),
                ("device", None),
                ("segment_pool_id", None),
                ("segment_pool_id", 5),
                ("segment_pool_id", ()),
                ("address", "x"),
                ("address", -1),
                ("address", 10**5000),
                ("address", float("nan")),
                ("blocks", None),
                ("blocks", [{"size": 512, "state": "a", "frames": 5}]),
                ("blocks", [{"size": 512, "state": "a", "requested_size": b"x"}]),
                ("blocks", [{"size": -512, "state": "a"}, {"size": 1024, "state": "a"}]),
            )
        ),
        {"segments": [segment()], "device_traces": 5},
        {"segments": [segment()], "device_traces": CYCLE},
        {"segments": [segment()], "device_traces": [[{"action": "alloc", "addr": "x"}]]},
        {"segments": {}},
        {},
    ],
)
def test_what_torch_never_writes_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "file.pickle"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(SnapshotError) as refused:
        read_snapshot(file)
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 300
