# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""References: their keys, the directory, and what the exporter process finds with them.

That SGLang's own loader makes them is what ``tests/e2e`` shows.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import msgspec  # noqa: E402
from array_ranks import command, noise, save, serve  # noqa: E402
from collectors import Backend, attributes_of  # noqa: E402
from published import PublishedRank  # noqa: E402
from ranks import ExporterProcess  # noqa: E402
from waiting import eventually  # noqa: E402

from sglang_weight_exporter.export.following import Finding  # noqa: E402
from sglang_weight_exporter.export.guard import Guard  # noqa: E402
from sglang_weight_exporter.export.references import (  # noqa: E402
    ReferenceFollower,
    own_key,
    reference_of,
)
from sglang_weight_exporter.records.engine import Device  # noqa: E402
from sglang_weight_exporter.records.updates import UpdateCounts  # noqa: E402
from sglang_weight_exporter.store.reader import SnapshotReader  # noqa: E402
from sglang_weight_exporter.store.runtime_dir import RuntimeDir  # noqa: E402
from sglang_weight_exporter.store.tables import Table, open_tables  # noqa: E402
from sglang_weight_exporter.verification.reference import (  # noqa: E402
    References,
    checkpoint_identity,
    find_checkpoint,
)

EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
HELD = {EMBEDDINGS: noise(64, 16), NORM: noise(16)}
FLIPPED = {**HELD, NORM: HELD[NORM] ^ np.array([1] + [0] * 15, dtype=np.uint16)}


class Fleet:
    """Hosts with engines of one checkpoint, and the directory that they share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.references = path / "references"
        self.ranks: list[PublishedRank] = []

    def host(self, name: str, tensors: Any, *, checkpoint: Any = HELD, **more: Any) -> Path:
        """An engine that has loaded these tensors from its own copy of a checkpoint."""
        model, run = self.path / name / "model", self.path / name / "run"
        save(model / "model.safetensors", checkpoint)
        (model / "config.json").write_text("{}")
        rank = serve(run, tensors, **more)
        rank.engine = msgspec.structs.replace(rank.engine, model_path=str(model))
        rank.write_again()
        self.ranks.append(rank)
        return run

    def follow(self, run: Path) -> list[bool | None]:
        runtime_dir = RuntimeDir.open(run, os.environ)
        follower = ReferenceFollower(
            SnapshotReader(runtime_dir), self.references, os.environ, Guard()
        )
        follower.follow()
        return [
            role.reference_match
            for _, snapshot in SnapshotReader(runtime_dir).read()
            for role in follower.annotated(snapshot).roles
        ]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def table_of(run: Path) -> Table:
    (reader,) = open_tables(run)
    return reader.read()


def test_the_first_is_believed_and_the_others_are_compared(fleet: Fleet) -> None:
    """Of a flipped byte in one host's copy, which has the same headers and sizes."""
    runs = [fleet.host("one", HELD), fleet.host("two", HELD), fleet.host("three", FLIPPED)]
    assert [fleet.follow(run) for run in runs] == [[None], [True], [False]]
    assert len(list(fleet.references.iterdir())) == 1
    status, text = command(
        "verify", "--runtime-dir", runs[2], "--recorded", "--manifest", fleet.references
    )
    assert status == 1, text
    assert f"different  {NORM}" in text
    status, text = command(
        "verify", "--runtime-dir", runs[1], "--recorded", "--manifest", fleet.references
    )
    assert status == 0, text


@pytest.mark.parametrize(
    "more",
    [
        {"release": "0.5.9"},
        {"quantization": "fp8"},
        {"tp": 1, "tp_size": 2},
        {"role": "draft"},
        {"checkpoint": {**HELD, "more": noise(1)}},
    ],
)
def test_what_decides_the_bytes_is_in_the_key(fleet: Fleet, more: dict[str, Any]) -> None:
    """Another key has another reference, and nothing is called wrong."""
    fleet.follow(fleet.host("one", HELD))
    assert fleet.follow(fleet.host("two", FLIPPED, **more)) == [None]
    assert len(list(fleet.references.iterdir())) == 2


def test_settings_and_the_device_are_in_the_key(fleet: Fleet) -> None:
    run = fleet.host("one", HELD)
    digests = {own_digest(run)}
    (rank,) = fleet.ranks
    for settings in ({"moe_runner_backend": "triton"}, {"dtype": "float16"}):
        rank.engine = msgspec.structs.replace(rank.engine, load_settings=settings)
        rank.write_again()
        digests.add(own_digest(run))
    rank.devices = (Device(name="cpu", product="NVIDIA H200"),)
    rank.write_again()
    digests.add(own_digest(run))
    assert len(digests) == 4


def own_digest(run: Path) -> str:
    key = own_key(table_of(run), os.environ)
    assert key is not None
    return key.digest


def test_after_an_update_there_is_nothing_to_compare_with(fleet: Fleet) -> None:
    runs = [fleet.host(name, HELD) for name in ("one", "two")]
    follower = ReferenceFollower(
        SnapshotReader(RuntimeDir.open(runs[1], os.environ)),
        fleet.references,
        os.environ,
        Guard(),
    )
    fleet.follow(runs[0])
    follower.follow()
    rank = fleet.ranks[1]
    assert match_of(follower, runs[1]) is True
    rank.begin_update()
    assert match_of(follower, runs[1]) is None
    rank.publish()
    follower.follow()
    assert match_of(follower, runs[1]) is None


def match_of(follower: ReferenceFollower, run: Path) -> bool | None:
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(run, os.environ)).read()
    return follower.annotated(snapshot).roles[0].reference_match


def test_random_weights_are_no_reference(fleet: Fleet) -> None:
    run = fleet.host("one", HELD)
    (rank,) = fleet.ranks
    rank.engine = msgspec.structs.replace(rank.engine, load_settings={"load_format": "dummy"})
    rank.write_again()
    assert fleet.follow(run) == [None]
    assert not fleet.references.exists()


def test_many_that_are_the_first(fleet: Fleet) -> None:
    manifest = reference_of(table_of(fleet.host("one", HELD)), os.environ)
    references, first = References(fleet.references), []
    threads = [
        threading.Thread(target=lambda: first.append(references.leave(manifest))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.count(True) == 1
    assert [path.suffix for path in fleet.references.iterdir()] == [".json"]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"{}"])
def test_a_damaged_reference_is_said_and_is_no_difference(fleet: Fleet, content: bytes) -> None:
    run = fleet.host("one", HELD)
    fleet.follow(run)
    (path,) = fleet.references.iterdir()
    path.write_bytes(content)
    assert fleet.follow(run) == [None]
    status, text = command("reference", "list", "--reference-dir", fleet.references)
    assert status == 1
    assert f"{path.stem}  ! " in text
    assert command("reference", "remove", path.stem, "-o", fleet.references)[0] == 0
    assert not path.exists()


def test_a_directory_that_cannot_be_used_costs_nothing(fleet: Fleet) -> None:
    fleet.references.write_text("no directory")
    assert fleet.follow(fleet.host("one", HELD)) == [None]


def test_list_and_remove(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, more in (("one", {}), ("two", {"release": "0.5.9"})):
        fleet.follow(fleet.host(name, HELD, **more))
    names = sorted(path.stem for path in fleet.references.iterdir())
    monkeypatch.setenv("SGLANG_WEIGHT_EXPORTER_REFERENCE_DIR", str(fleet.references))
    status, text = command("reference", "list")
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()] == names
    assert str(fleet.path / "one" / "model") in text
    assert "SGLang 0.5.9" in text
    for wrong in ("", "nobody"):
        status, text = command("reference", "remove", wrong)
        assert (status, "is the beginning of" in text) == (2, True)
    assert command("reference", "remove", names[0][:12]) == (0, f"removed  {names[0]}\n")
    assert [path.stem for path in fleet.references.iterdir()] == names[1:]


def test_a_reference_of_other_settings_says_nothing_of_other_bytes(fleet: Fleet) -> None:
    fleet.follow(fleet.host("one", HELD))
    run = fleet.host("two", FLIPPED, release="0.5.9")
    status, text = command(
        "verify", "--runtime-dir", run, "--recorded", "--manifest", fleet.references
    )
    assert status == 0, text
    assert f"cannot be compared  {NORM}: the reference is of another release" in text


def test_experts_that_were_moved_since_the_load_are_not_compared(fleet: Fleet) -> None:
    """By EPLB, by the engine's own load: what they hold is another expert's, and right."""
    experts = "model.layers.0.mlp.experts.w13_weight"
    loaded = {**HELD, experts: noise(1, 4)}
    run = fleet.host("one", loaded)
    assert fleet.follow(run) == [None]
    run = fleet.host("two", {**loaded, experts: noise(1, 4)})
    arguments = ("--runtime-dir", run, "--recorded", "--manifest", fleet.references)
    status, text = command("verify", *arguments, "--require", "0.3")
    assert status == 1, text
    assert text.count("different  ") == text.count(f"different  {experts}") == 1
    rank = fleet.ranks[-1]
    moved = {"eplb": UpdateCounts(updates=1, calls=1)}
    rank.role = msgspec.structs.replace(rank.role, updates=moved)
    rank.write_again()
    status, text = command("verify", *arguments, "--require", "0.3")
    assert status == 0, text
    assert f"cannot be compared  {experts}: EPLB places experts" in text


def test_a_reference_is_found_by_its_key_among_many(fleet: Fleet) -> None:
    other = {**HELD, NORM: noise(16)}
    fleet.follow(fleet.host("one", HELD))
    run = fleet.host("two", other, checkpoint={**other, "more": noise(1)})
    fleet.follow(run)
    status, text = command(
        "verify", "--runtime-dir", run, "--recorded", "--manifest", fleet.references
    )
    assert status == 0, text
    assert text.count("2 equal, 0 different") == 1


def test_status_names_what_is_other(fleet: Fleet) -> None:
    runs = [fleet.host("one", HELD), fleet.host("two", HELD), fleet.host("three", FLIPPED)]
    fleet.follow(runs[0])
    for run, count in zip(runs, (0, 0, 1), strict=True):
        _, text = command("status", "--runtime-dir", run, "--reference-dir", fleet.references)
        assert text.count(f"its load left other bytes in {NORM} than another load") == count, text
        said = f"1 tensors hold other bytes\n          {NORM}\n" if count else "target: the same\n"
        assert said in text, text


def test_a_load_has_a_finding_once_it_is_compared(fleet: Fleet) -> None:
    """Its span waits for it, and not for long."""
    fleet.follow(fleet.host("one", HELD))
    snapshots = SnapshotReader(RuntimeDir.open(fleet.host("two", FLIPPED), os.environ))
    event = fleet.ranks[1].last_event()
    follower = ReferenceFollower(snapshots, fleet.references, os.environ, Guard())
    assert follower.of_event(event) is None
    follower.follow()
    assert follower.of_event(event) == Finding(match=False, differing=(NORM,))
    nothing = Finding()
    new = ReferenceFollower(snapshots, fleet.references, os.environ, Guard())
    for more in ({"action": "update"}, {"succeeded": False}, {"ended_at": time.time() - 3600}):
        assert new.of_event(fleet.ranks[1].last_event(**more)) == nothing
    without = ReferenceFollower(snapshots, None, os.environ, Guard())
    assert without.of_event(event) == nothing


def test_the_exporter_process_serves_and_sends_what_it_finds(fleet: Fleet) -> None:
    fleet.follow(fleet.host("one", HELD))
    run = fleet.host("two", FLIPPED)
    rank = fleet.ranks[1]
    rank.store.append_event(rank.last_event(), None)
    backend = Backend().start()
    exporter = ExporterProcess(
        run,
        SGLANG_WEIGHT_EXPORTER_REFERENCE_DIR=str(fleet.references),
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.http_port}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
    ).start()
    try:

        def found() -> bool:
            return exporter.scrape().one("sglang_weight_reference_match", role="target") == 0

        eventually(found, what="the load is compared")
        (span,) = eventually(lambda: backend.spans("sglang.weights.load"), what="the span is sent")
        prefix = "sglang.weights.reference."
        said = {name: value for name, value in attributes_of(span).items() if prefix in name}
        assert said == {
            prefix + "match": False,
            prefix + "differing": 1,
            prefix + "differing.names": [NORM],
        }
    finally:
        exporter.end(signal.SIGTERM)
        backend.stop()


# --- which checkpoint it is -----------------------------------------------------------------------


def test_copies_of_a_checkpoint_are_the_same_and_others_are_not(tmp_path: Path) -> None:
    def identity(name: str, files: dict[str, bytes], *, all_bytes: bool = False) -> str:
        directory = tmp_path / name
        directory.mkdir()
        for file, content in files.items():
            (directory / file).write_bytes(content)
        return checkpoint_identity(directory, all_bytes=all_bytes)

    content = save(tmp_path / "source" / "m.safetensors", HELD).read_bytes()
    flipped = save(tmp_path / "source" / "n.safetensors", FLIPPED).read_bytes()
    renamed = save(tmp_path / "source" / "o.safetensors", {EMBEDDINGS + "x": HELD[NORM]})
    base = {"model.safetensors": content, "config.json": b"{}"}
    one_bit = {**base, "model.safetensors": flipped}
    first = identity("a", base)
    assert identity("b", {**base, "README.md": b"x"}) == first
    assert identity("c", one_bit) == first
    for number, other in enumerate(
        (
            {"config.json": b'{"a": 1}'},
            {"model.safetensors": content + b"0"},
            {"model.safetensors": renamed.read_bytes()},
            {"model-2.safetensors": content},
            {"model.bin": b"x"},
        )
    ):
        assert identity(f"d{number}", {**base, **other}) != first
    assert identity("e", base, all_bytes=True) != identity("f", one_bit, all_bytes=True)


def test_a_models_name_is_found_in_the_cache(tmp_path: Path) -> None:
    """As huggingface_hub lays it out."""
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    environ = {"HF_HOME": str(tmp_path)}
    assert find_checkpoint("org/name", "", environ) == snapshot
    assert find_checkpoint("org/name", "abc123", environ) == snapshot
    assert find_checkpoint("org/name", "other", environ) is None
    assert find_checkpoint("org/other", "", environ) is None
    assert find_checkpoint(str(tmp_path), "", environ) == tmp_path


def test_words_that_are_no_reference(tmp_path: Path) -> None:
    for words, said in (
        ((), "--model-path"),
        (("--model-path", "x"), "Name a directory of references"),
        (("--model-path", "x", "-o", str(tmp_path), "--port", "1"), "has a port of its own"),
        (("list",), "Name a directory of references"),
    ):
        status, text = command("reference", *words)
        assert (status, said in text) == (2, True), text


def test_a_manifest_keeps_its_key(fleet: Fleet) -> None:
    fleet.follow(fleet.host("one", HELD))
    (path,) = fleet.references.iterdir()
    key = json.loads(path.read_bytes())["reference"]["key"]
    assert (key["release"], key["tp_size"], key["role"]) == ("0.5.23", 1, "target")
