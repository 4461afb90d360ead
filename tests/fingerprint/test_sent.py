# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks beside what was sent: names, verdicts, and what the exporter process finds of each update.

Which shares real ranks hold is what ``tests/manifests`` shows.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import msgspec  # noqa: E402
from array_ranks import command, noise  # noqa: E402
from published import PublishedRank  # noqa: E402
from ranks import ExporterProcess  # noqa: E402
from waiting import eventually  # noqa: E402

from sglang_weight_exporter.export.following import Finding  # noqa: E402
from sglang_weight_exporter.export.guard import Guard  # noqa: E402
from sglang_weight_exporter.export.manifests import ManifestFollower  # noqa: E402
from sglang_weight_exporter.export.otlp.spans import event_spans  # noqa: E402
from sglang_weight_exporter.fingerprint import sums  # noqa: E402
from sglang_weight_exporter.records.engine import Ranks  # noqa: E402
from sglang_weight_exporter.records.shares import Share, share_table  # noqa: E402
from sglang_weight_exporter.store.decoding import UnreadableError, decode  # noqa: E402
from sglang_weight_exporter.store.reader import SnapshotReader  # noqa: E402
from sglang_weight_exporter.store.runtime_dir import RuntimeDir  # noqa: E402
from sglang_weight_exporter.store.tables import open_tables  # noqa: E402
from sglang_weight_exporter.verification.manifest import write_manifest  # noqa: E402
from sglang_weight_exporter.verification.names import Names  # noqa: E402
from sglang_weight_exporter.verification.sent import SentTensor, grid  # noqa: E402
from sglang_weight_exporter.weight_table import Row, table_of_rows  # noqa: E402

State = dict[str, Any]
UP = "model.layers.1.mlp.up_proj.weight"
SPELT = "model.layers.1.mlp.upproj.weight"
EXPERT = "model.layers.0.mlp.experts.3.down_proj.weight"
NORM = "model.norm.weight"


def a_state() -> State:
    state = {NORM: noise(16)}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        state |= {mlp + "gate_proj.weight": noise(32, 16), mlp + "up_proj.weight": noise(32, 16)}
        state |= {f"{mlp}experts.{expert}.down_proj.weight": noise(16, 32) for expert in range(4)}
    return state


def words_of(array: Any) -> Any:
    return np.ascontiguousarray(array).reshape(-1, array.shape[-1]).view(np.int64)


def sum_of(words: Any, row: int = 0, column: int = 0) -> str:
    rows = (np.arange(len(words)) + row)[:, None]
    columns = np.arange(words.shape[1]) + column
    halves = sums.terms(words, sums.keys(rows, columns))
    return sums.text(*(int(each.sum()) for each in halves))


def sent_of(array: Any) -> SentTensor:
    words = words_of(array)
    rows, columns = grid(array.shape, 2, (1, 2, 4))
    return SentTensor(
        dtype="bfloat16",
        shape=array.shape,
        rows=rows,
        row_sums=tuple(sum_of(words[a:b], a) for a, b in itertools.pairwise(rows)),
        columns=columns,
        column_sums=tuple(sum_of(words[:, a:b], 0, a) for a, b in itertools.pairwise(columns)),
        words=words.size,
        offset=(0,) * array.ndim,
    )


class Fleet:
    """The tensor-parallel ranks of an engine, and a trainer's directory."""

    def __init__(self, path: Path, size: int = 2, run: Path | None = None) -> None:
        self.run, self.sent = run or path / "run", path / "sent"
        self.sent.mkdir(parents=True)
        self.ranks, instance = [], os.urandom(8).hex()
        for tp in range(size):
            rank = PublishedRank(self.run, ranks=Ranks(tp=tp), device="cpu")
            rank.engine = msgspec.structs.replace(
                rank.engine,
                instance=instance,
                tp_size=size,
                expected_ranks=size,
                sglang_version="0.5.23",
            )
            self.ranks.append(rank)
        self.update(a_state(), "")
        self.follower = self.new_follower()

    def snapshots(self) -> SnapshotReader:
        return SnapshotReader(RuntimeDir.open(self.run, os.environ))

    def new_follower(self) -> ManifestFollower:
        return ManifestFollower(self.snapshots(), self.sent, Guard())

    def manifest(self, state: State, version: str, **more: Any) -> None:
        sent = {name: sent_of(array) for name, array in state.items()}
        path = self.sent / f"manifest_{version}.json"
        write_manifest(path, sent, weight_version=version, **more)

    def update(self, state: State, version: str) -> None:
        """All ranks hold this now, each its shares, as SGLang's layers cut it."""
        for rank in self.ranks:
            rank.publish(
                table=table_of(state, rank.ranks.tp, len(self.ranks)), weight_version=version
            )

    def matches(self) -> list[bool | None]:
        self.follower.follow()
        found = self.snapshots().read()
        return [
            self.follower.annotated(each).roles[0].manifest_match
            for _, each in sorted(found, key=lambda one: one[1].ranks.tp)
        ]


def table_of(state: State, tp: int, size: int) -> Any:
    rows: list[Row] = []
    shares: list[Share] = []
    taken: list[str] = []
    address = 4096

    def add(name: str, shape: tuple[int, ...]) -> None:
        nonlocal address
        strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
        nbytes = 2 * int(np.prod(shape))
        at = (address, nbytes)
        rows.append(Row(name, *at, "bfloat16", shape, strides, "cpu", "parameter", *at))
        address += nbytes

    def hold(part: str, offset: int, words: Any, row: int, column: int, axis: str) -> None:
        height, width = words.shape
        shares.append(Share(len(rows) - 1, part, offset, height, width, row, column, axis))
        taken.append(sum_of(words, row, column))

    for name, array in state.items():
        words = words_of(array)
        layer = name.partition(".mlp.")[0]
        if "gate_proj" in name:
            own = len(words) // size
            add(f"{layer}.mlp.gate_up_proj.weight", (2 * own, 16))
            for number, part in enumerate(("gate_proj", "up_proj")):
                held = words_of(state[f"{layer}.mlp.{part}.weight"])[own * tp : own * (tp + 1)]
                hold(str(number), number * held.nbytes, held, own * tp, 0, "rows")
        elif name.endswith("experts.0.down_proj.weight"):
            own = words.shape[1] // size
            add(f"{layer}.mlp.experts.w2_weight", (4, 16, 32 // size))
            for expert in range(4):
                all_of = words_of(state[f"{layer}.mlp.experts.{expert}.down_proj.weight"])
                held = all_of[:, own * tp : own * (tp + 1)]
                hold(f"{expert}.w2", expert * held.nbytes, held, 0, own * tp, "columns")
        elif "up_proj" not in name and "experts" not in name:
            add(name, array.shape)
            hold("", 0, words, 0, 0, "whole")
    table = table_of_rows(rows, role="target", captured_at=time.time())
    held = share_table(shares, [], definition=sums.DEFINITION)
    return msgspec.structs.replace(
        table,
        fingerprints=os.urandom(16 * len(rows)),
        fingerprint=os.urandom(16).hex(),
        shares=msgspec.structs.replace(held, sums=bytes.fromhex("".join(taken))),
    )


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_what_was_sent_is_what_every_rank_holds(fleet: Fleet) -> None:
    state = a_state()
    fleet.manifest(state, "1")
    fleet.update(state, "1")
    assert fleet.matches() == [True, True]


@pytest.mark.parametrize("name", [UP, EXPERT])
def test_a_tensor_that_is_older_is_named(fleet: Fleet, name: str) -> None:
    state = a_state()
    fleet.manifest(state, "1")
    fleet.update({**state, name: noise(*state[name].shape)}, "1")
    assert fleet.matches() == [False, False]
    found = [finding for _, finding in fleet.follower._found.values()]
    assert found == [Finding(match=False, differing=(name,))] * 2
    status, text = verify(fleet)
    assert status == 1, text
    assert f"different  {name}" in text
    _, text = command("status", "--runtime-dir", fleet.run, "--manifest-dir", fleet.sent)
    assert f"{name} is not what the trainer sent as version 1" in text


def test_engines_of_two_trainers_have_a_directory_each(tmp_path: Path) -> None:
    """Of a policy and its critic on one host, whose versions are counted alike."""
    fleets = [Fleet(tmp_path / name, run=tmp_path / "run") for name in ("policy", "critic")]
    for fleet in fleets:
        state = a_state()
        fleet.manifest(state, "1")
        for rank in fleet.ranks:
            rank.directories = {"manifest_dir": str(fleet.sent)}
        fleet.update(state, "1")
    snapshots = SnapshotReader(RuntimeDir.open(tmp_path / "run", os.environ))
    follower = ManifestFollower(snapshots, None, Guard())
    follower.follow()
    annotated = [follower.annotated(each) for _, each in snapshots.read()]
    assert [each.roles[0].manifest_match for each in annotated] == [True] * 4
    _, text = command("status", "--runtime-dir", tmp_path / "run")
    assert text.count(" 0 different") == 4, text
    fleets[1].manifest(a_state(), "2")
    fleets[1].update(a_state(), "2")
    follower.follow()
    annotated = [follower.annotated(each) for _, each in snapshots.read()]
    found = {each.manifest_dir: each.roles[0].manifest_match for each in annotated}
    assert found == {str(fleets[0].sent): True, str(fleets[1].sent): False}


def test_a_rank_that_is_compared_with_nothing_has_its_spans_at_once(fleet: Fleet) -> None:
    fleet.update(a_state(), "1")
    follower = ManifestFollower(fleet.snapshots(), None, Guard())
    assert follower.of_event(fleet.ranks[0].last_event()) == Finding()
    for rank in fleet.ranks:
        rank.directories = {"manifest_dir": str(fleet.sent)}
    fleet.update(a_state(), "1")
    assert follower.of_event(fleet.ranks[0].last_event()) is None


def verify(fleet: Fleet) -> tuple[int, str]:
    return command("verify", "--runtime-dir", fleet.run, "--recorded", "--manifest", fleet.sent)


def test_of_many_versions_the_one_that_is_served_is_compared(fleet: Fleet) -> None:
    for version in ("1", "2"):
        state = a_state()
        fleet.manifest(state, version)
        fleet.update(state, version)
    status, text = verify(fleet)
    assert status == 0, text
    assert text.count(" 0 different") == len(fleet.ranks), text
    fleet.update(a_state(), "3")
    status, text = verify(fleet)
    assert status == 2, text
    assert "or of its version (3)" in text


def test_a_tensor_that_is_alone_is_proved_by_an_earlier_update(fleet: Fleet) -> None:
    """There is no other layer's: what the loader makes of it is not known before it was equal."""
    for version, expected in (("1", True), ("2", False)):
        state = a_state()
        fleet.manifest(state, version)
        held = {**state, NORM: noise(16)} if version == "2" else state
        fleet.update(held, version)
        assert fleet.matches() == [expected] * 2
    # An exporter that is started anew, and commands, say what the one before has said.
    new = fleet.new_follower()
    new.follow()
    assert [finding.match for _, finding in new._found.values()] == [False, False]
    _, text = command("status", "--runtime-dir", fleet.run, "--manifest-dir", fleet.sent)
    assert f"! engine 30000, tp 0 pp 0: {NORM} is not what the trainer sent as version 2" in text
    status, text = verify(fleet)
    assert status == 1, text
    assert f"different  {NORM}" in text


def test_what_was_not_equal_before_is_named_with_why_no_more_is_said(fleet: Fleet) -> None:
    state = a_state()
    fleet.manifest(state, "1")
    fleet.update({**state, NORM: noise(16)}, "1")
    assert fleet.matches() == [True, True]
    _, text = command("status", "--runtime-dir", fleet.run, "--manifest-dir", fleet.sent)
    assert f"cannot be compared  {NORM}: the rank holds something else" in text


def test_all_of_a_tensor_is_whole_however_it_would_be_divided() -> None:
    """Embeddings on one rank: what is confirmed of whole tensors holds for them."""
    held = Share(0, "", 0, 32000, 256, 0, 0, axis="rows", total=32000)
    assert held.is_whole
    assert not held._replace(rows=16000).is_whole
    assert held._replace(axis="columns", total=256).is_whole
    assert not held._replace(part="3.w1").is_whole


def test_a_name_that_no_rank_knows_is_reported_with_the_one_that_was_meant(fleet: Fleet) -> None:
    state, before = a_state(), a_state()
    sent = dict(state)
    sent[SPELT] = sent.pop(UP)
    fleet.manifest(sent, "1")
    fleet.update({**state, UP: before[UP]}, "1")
    assert fleet.matches() == [False, False]
    for _, finding in fleet.follower._found.values():
        assert finding.renamed == ((SPELT, UP),)
    status, text = verify(fleet)
    assert status == 1, text
    assert text.startswith(f"sent under a name that no rank holds  {SPELT}: was {UP} meant?\n")
    assert f"no rank here holds  {SPELT}\nnobody sent  {UP}" in text
    _, text = command("status", "--runtime-dir", fleet.run, "--manifest-dir", fleet.sent)
    assert f"! {SPELT} was sent as version 1, and no rank knows it: was {UP} meant?" in text


def test_a_rank_that_is_not_here_may_hold_it(fleet: Fleet) -> None:
    state = a_state()
    fleet.manifest({**state, SPELT: state[UP]}, "1")
    for rank in fleet.ranks:
        rank.engine = msgspec.structs.replace(rank.engine, expected_ranks=3)
    fleet.update(state, "1")
    assert fleet.matches() == [True, True]


def test_what_is_sent_besides_is_no_difference(fleet: Fleet) -> None:
    """Nor is what was not sent: an update may be of some layers."""
    state = a_state()
    more = {f"mtp.layers.0.mlp.{part}_proj.weight": noise(32, 16) for part in ("gate", "up")}
    fleet.manifest({**state, **more}, "1")
    fleet.update(state, "1")
    assert fleet.matches() == [True, True]
    some = {name: array for name, array in state.items() if ".1." not in name}
    fleet.manifest(some, "2")
    fleet.update(state, "2")
    assert fleet.matches() == [True, True]


def test_names_that_a_loader_has_of_its_own_are_no_difference(fleet: Fleet) -> None:
    """SGLang renames some tensors of all layers (Mamba's ``A_log``), and experts that are sent in
    one tensor are like one expert's by their name, and not by their shape."""
    state = a_state()
    sent = {name.replace("gate_proj", "gate_prj"): array for name, array in state.items()}
    stacked = "model.layers.0.mlp.experts.down_proj.weight"
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    sent[stacked] = np.stack([sent.pop(expert)] * 4)
    fleet.manifest(sent, "1")
    fleet.update(state, "1")
    assert fleet.matches() == [True, True]
    status, text = verify(fleet)
    assert (status, "meant?" in text) == (0, False), text
    assert "no rank here holds  model.layers.0.mlp.experts.down_proj.weight and 2 more" in text


def test_a_head_that_hugging_face_calls_otherwise_is_the_engines(fleet: Fleet) -> None:
    """As the Transformers backend maps it (``hf_to_sglang_mapper``), of GPT-NeoX."""
    state = {**a_state(), "lm_head.weight": noise(64, 16)}
    sent = {name.replace("lm_head", "embed_out"): array for name, array in state.items()}
    fleet.manifest(sent, "1")
    fleet.update(state, "1")
    assert fleet.matches() == [True, True]
    _, text = verify(fleet)
    assert "embed_out" not in text
    assert "lm_head" not in text


def test_names_that_a_loader_shortens_are_found(fleet: Fleet) -> None:
    """As Qwen3-Next's (``load_weights`` of ``models/qwen3_next.py``)."""
    own, theirs = "model.layers.1.k_norm.weight", "model.layers.1.self_attn.k_norm.weight"
    state = {**a_state(), theirs: noise(16)}
    fleet.manifest(state, "1")
    held = {name: array for name, array in state.items() if name != theirs}
    fleet.update({**held, own: state[theirs]}, "1")
    status, text = verify(fleet)
    assert status == 0, text
    assert "k_norm" not in text


def test_what_the_engine_keeps_in_one_tensor_is_there(fleet: Fleet) -> None:
    """As DeepSeek's (``models/deepseek_common/deepseek_weight_loader.py``): neither missing nor
    sent by nobody."""
    state, attention = a_state(), "model.layers.1.self_attn."
    sent = {
        f"{attention}{name}.weight": noise(8, 16) for name in ("q_a_proj", "kv_a_proj_with_mqa")
    }
    fleet.manifest({**state, **sent}, "1")
    fused = f"{attention}fused_qkv_a_proj_with_mqa.weight"
    fleet.update({**state, fused: np.concatenate(list(sent.values()))}, "1")
    status, text = verify(fleet)
    assert status == 0, text
    assert "no rank here holds" not in text
    assert "nobody sent" not in text
    assert f"cannot be compared  {fused}: it was sent in parts" in text


def test_what_is_sent_in_one_tensor_is_no_difference(fleet: Fleet) -> None:
    """As Phi-3 and GLM-4 have it, and later mixtures of experts: a word's place is in its sum."""
    state = a_state()
    sent = dict(state)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        parts = [sent.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up")]
        sent[mlp + "gate_up_proj.weight"] = np.concatenate(parts)
    mlp = "model.layers.1.mlp.experts."
    parts = [sent.pop(f"{mlp}{expert}.down_proj.weight") for expert in range(4)]
    sent[mlp + "down_proj"] = np.stack(parts)
    fleet.manifest(sent, "1")
    fleet.update(state, "1")
    _, text = verify(fleet)
    assert "no rank here holds" not in text
    assert "nobody sent" not in text
    assert " 0 different" in text
    assert "it was sent in one tensor with others" in text


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ("", "model."),
        ("module.model.", "model."),
        ("model.language_model.", "language_model.model."),
    ],
)
def test_prefixes_are_told_by_what_they_are_of(theirs: str, own: str) -> None:
    ends = [f"layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    names = Names({theirs + end for end in ends}, [own + end for end in ends])
    assert [names.sent_as(own + end) for end in ends] == [theirs + end for end in ends]
    assert names.sent_as(own + "layers.7.mlp.up_proj.weight") is None


def test_towers_are_not_taken_for_each_other() -> None:
    held = [f"visual.blocks.{n}.norm1.weight" for n in range(2)] + ["model.norm.weight"]
    sent = {f"model.visual.blocks.{n}.norm1.weight" for n in range(2)} | {"visual.norm.weight"}
    names = Names(sent, held)
    assert names.sent_as(held[0]) == "model.visual.blocks.0.norm1.weight"
    assert names.sent_as("model.blocks.0.norm1.weight") is None


def test_a_manifest_that_comes_later_is_compared_then(fleet: Fleet) -> None:
    state = a_state()
    fleet.update(state, "1")
    assert fleet.matches() == [None, None]
    fleet.manifest(state, "1")
    assert fleet.matches() == [True, True]
    fleet.update(a_state(), "2")
    assert fleet.matches() == [None, None]


def test_a_manifest_in_parts_is_compared_when_all_are_there(fleet: Fleet) -> None:
    state = a_state()
    fleet.update(state, "1")
    halves = [dict(list(state.items())[part::2]) for part in range(2)]
    for part, half in enumerate(halves):
        assert fleet.matches() == [None, None]
        fleet.manifest(half, "1", part=(part, 2))
    assert fleet.matches() == [True, True]
    status, text = verify(fleet)
    assert status == 0, text


@pytest.mark.parametrize("version", ["", "default", "../1", "a b"])
def test_what_is_no_version_has_no_manifest(fleet: Fleet, version: str) -> None:
    state = a_state()
    if "/" not in version:
        fleet.manifest(a_state(), version)
    fleet.update(state, version)
    assert fleet.matches() == [None, None]


def test_a_version_that_follows_its_update_is_waited_for(fleet: Fleet) -> None:
    """Until then the rank has the version before, and no more the weights of that."""
    states = [a_state(), a_state()]
    for version, state in enumerate(states, start=1):
        fleet.manifest(state, str(version))
    fleet.update(states[0], "1")
    assert fleet.matches() == [True, True]
    fleet.update(states[1], "1")
    assert fleet.matches() == [None, None]
    for rank in fleet.ranks:
        rank._write("2")
    assert fleet.matches() == [True, True]


def test_a_file_that_is_no_manifest_is_said_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    (fleet.sent / "manifest_1.json").write_text("{")
    fleet.update(a_state(), "1")
    assert fleet.matches() == fleet.matches() == [None, None]
    assert len([line for line in caplog.messages if "compared with no manifest" in line]) == 1


def test_the_version_before_reads_a_table_with_shares(fleet: Fleet) -> None:
    """It ignores what it does not know; this version refuses what does not fit together."""
    (reader, _) = open_tables(fleet.run)
    table = reader.read().columns
    assert table.shares is not None
    before = msgspec.defstruct("Before", [("names", bytes), ("schema", int)])
    content = msgspec.msgpack.encode(table)
    old: Any = msgspec.msgpack.decode(content, type=before)
    assert old.names == table.names
    assert decode(content, type(table), Path("table")) == table
    broken = msgspec.structs.replace(table.shares, row=table.shares.row[8:])
    content = msgspec.msgpack.encode(msgspec.structs.replace(table, shares=broken))
    with pytest.raises(UnreadableError, match="the column row"):
        decode(content, type(table), Path("table"))


def test_a_span_waits_for_its_finding_and_has_the_names(fleet: Fleet) -> None:
    state = a_state()
    sent = {(SPELT if name == UP else name): array for name, array in state.items()}
    fleet.update({**state, UP: a_state()[UP], EXPERT: a_state()[EXPERT]}, "1")
    event = fleet.ranks[0].last_event(weight_version="1")
    assert fleet.matches() == [None, None]
    assert fleet.follower.of_event(event) is None
    fleet.manifest(sent, "1")
    fleet.matches()
    finding = fleet.follower.of_event(event)
    assert finding == Finding(match=False, differing=(EXPERT,), renamed=((SPELT, UP),))
    (span,) = event_spans(event, None, state="missing", finding=finding).spans
    prefix = "sglang.weights.manifest."
    attributes = dict(span.attributes or {})
    assert {key: value for key, value in attributes.items() if prefix in key} == {
        prefix + "match": False,
        prefix + "differing": 1,
        prefix + "differing.names": (EXPERT,),
        prefix + "renamed.names": (SPELT,),
    }
    fleet.update(state, "2")
    fleet.manifest(state, "2")
    assert fleet.matches() == [True, True]
    missed = msgspec.structs.replace(event.update, weight_version="of another")
    assert fleet.follower.of_event(msgspec.structs.replace(event, update=missed)) == Finding()


@pytest.mark.parametrize("by_ranks", [False, True], ids=["of the exporter", "of its ranks"])
def test_the_exporter_process_serves_what_it_finds(fleet: Fleet, by_ranks: bool) -> None:
    environ = {} if by_ranks else {"SGLANG_WEIGHT_EXPORTER_MANIFEST_DIR": str(fleet.sent)}
    for rank in fleet.ranks:
        rank.directories = {"manifest_dir": str(fleet.sent)} if by_ranks else {}
    state = a_state()
    fleet.manifest(state, "1")
    fleet.update({**state, UP: a_state()[UP]}, "1")
    exporter = ExporterProcess(fleet.run, **environ).start()
    try:

        def found() -> bool:
            scrape = exporter.scrape()
            return all(scrape.one("sglang_weight_manifest_match", tp_rank=tp) == 0 for tp in "01")

        eventually(found, what="the update is compared")
    finally:
        exporter.end(signal.SIGTERM)
