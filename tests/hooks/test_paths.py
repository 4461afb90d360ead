# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Every way to change weights that runs on a CPU, in a real rank of the oldest and the newest
release of CI, failures included; and of one more release on demand.

The rank is SGLang's Scheduler without a server (``actor.py``), because some failures end a server.
``SGLANG_EXTRA_ENVIRONMENT`` names an environment with a further release and this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_model
from engines import PREFIX, Installation, sglang_version
from ports import free_port
from waiting import LIMIT

from sglang_weight_exporter.hooks.targets import version_key
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.snapshot import Role, Snapshot

EXTRA = "SGLANG_EXTRA_ENVIRONMENT"
LORA_RANK = 8
LORA_ON_CPU = "0.5.9"  # Later ones pin memory, which needs a GPU.
BFLOAT16 = 2

#: Seconds that each phase is made to take longer.
DELAYS = {"wait": 0.4, "load": 0.5, "post_process": 0.6, "flush": 0.7, "capture": 0.8}


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write zeros in bfloat16."""
    header: dict[str, Any] = {}
    size = 0
    for name, shape in shapes.items():
        end = size + BFLOAT16 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(size))


def write_adapter(directory: Path) -> None:
    """A LoRA adapter on the query and value projections."""
    directory.mkdir()
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(tiny_model.LAYERS):
        for projection, heads in ("q_proj", tiny_model.HEADS), ("v_proj", tiny_model.KV_HEADS):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{projection}.lora_"
            shapes[prefix + "A.weight"] = (LORA_RANK, tiny_model.HIDDEN)
            shapes[prefix + "B.weight"] = (heads * tiny_model.HEAD_DIM, LORA_RANK)
    safetensors(directory / "adapter_model.safetensors", shapes)


def write_checkpoints(directory: Path) -> list[Path]:
    """One to load, one like it, one whose file is cut off, one with a tensor of another shape."""
    first, second, broken, other = (directory / name for name in "abcd")
    for seed, checkpoint in enumerate((first, second, broken, other)):
        tiny_model.write(checkpoint, seed)
    cut = broken / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    file = other / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [64, 2]
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    write_adapter(directory / "adapter")
    return [first, second, broken, other]


@dataclass(frozen=True)
class Step:
    """What SGLang answered to one request, and the rank after it."""

    success: bool | None
    message: str | None
    error: str | None
    snapshot: Snapshot
    events: tuple[Event, ...]

    @property
    def role(self) -> Role:
        (role,) = self.snapshot.roles
        return role

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """Source → updates, failures, calls."""
        return {
            source: (counts.updates, counts.failures, counts.calls)
            for source, counts in self.role.updates.items()
        }

    def operation(self, name: str) -> tuple[int, int]:
        counts = self.snapshot.operations.get(name)
        return (0, 0) if counts is None else (counts.calls, counts.failures)


class Run:
    """All requests to one rank, in order."""

    def __init__(
        self, steps: dict[str, Any], output: str, version: str, checkpoints: list[Path]
    ) -> None:
        self.output = output
        self.version = version
        self.checkpoint_bytes = {
            str(path): (path / "model.safetensors").stat().st_size for path in checkpoints
        }
        self.steps = {name: msgspec.convert(step, Step) for name, step in steps.items()}

    @property
    def has_sessions(self) -> bool:
        return "peer to peer begins" in self.steps

    def __getitem__(self, name: str) -> Step:
        assert name in self.steps, self.output[-6000:]
        return self.steps[name]

    def before(self, name: str) -> Step:
        names = list(self.steps)
        return self.steps[names[names.index(name) - 1]]

    def grown(self, first: str, last: str | None = None) -> dict[str, tuple[int, int, int]]:
        """How updates, failures and calls of each source grew from before one step to another."""
        before, after = self.before(first).totals(), self[last or first].totals()
        change = {}
        for source, (updates, failures, calls) in after.items():
            old = before[source]
            change[source] = (updates - old[0], failures - old[1], calls - old[2])
        return {source: numbers for source, numbers in change.items() if any(numbers)}


class Running:
    """A rank that is being sent its requests."""

    def __init__(self, release: str, installation: Installation, ranks: int, shared: Path) -> None:
        version = sglang_version(installation.python)
        assert version, f"no SGLang beside {installation.python}"
        self.version = version
        self.directory = shared / release
        self.directory.mkdir()
        self.checkpoints = write_checkpoints(self.directory)
        self.out = self.directory / "steps.json"
        self.log = self.directory / "log"
        lora = "lora" if version_key(version) <= version_key(LORA_ON_CPU) else ""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    installation.python,
                    Path(__file__).with_name("actor.py"),
                    self.out,
                    str(ranks),
                    lora,
                    str(free_port()),
                    json.dumps(DELAYS),
                    *self.checkpoints,
                ],
                env=installation.environment(
                    **{PREFIX + "RUNTIME_DIR": str(shared / "runtime"), PREFIX + "SERVE": "off"}
                ),
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """AssertionError with the end of the log if it ends badly, or not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LIMIT)
        assert self.process.returncode == 0, self.log.read_text(errors="replace")[-6000:]

    def run(self) -> Run:
        output = self.log.read_text(errors="replace")
        return Run(json.loads(self.out.read_text()), output, self.version, self.checkpoints)


IN_THE_RELEASE = pytest.mark.release("oldest")
RELEASES = ["newest", pytest.param("oldest", marks=IN_THE_RELEASE)]
RELEASES += ["extra"] if os.environ.get(EXTRA) else []


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Run]]:
    """One rank of each release that is asked for, all on this host at once."""
    installations = {}
    ours = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params.get("actor") for item in ours if hasattr(item, "callspec")}
    for release in sorted(filter(None, {*asked, "newest"})):
        if release == "extra":
            installations[release] = Installation(Path(os.environ[EXTRA]) / "bin" / "python")
        else:
            installations[release] = request.getfixturevalue(release)
    running: dict[str, Running] = {}
    with tempfile.TemporaryDirectory() as shared:
        try:
            for release, installation in installations.items():
                ranks = len(installations)
                running[release] = Running(release, installation, ranks, Path(shared))
            for rank in running.values():
                rank.wait()
            yield {release: rank.run() for release, rank in running.items()}
        finally:
            for rank in running.values():
                rank.process.kill()
                rank.process.wait()


@pytest.fixture(params=RELEASES)
def actor(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


@IN_THE_RELEASE
def test_engines_on_one_host_have_names_of_their_own(runs: dict[str, Run]) -> None:
    engines = [run["start"].snapshot.engine for run in runs.values()]
    port = "30000"  # SGLang's default, and theirs: nothing of them listens on it.
    names = [port, *(f"{port}-{number}" for number in range(2, len(engines) + 1))]
    assert sorted(engine.name for engine in engines) == names
    assert len({engine.instance for engine in engines}) == len(engines)


def test_it_is_loaded(actor: Run) -> None:
    role = actor["start"].role
    header = tiny_model.safetensors_header
    assert role.name == "target"
    assert role.loaded_at is not None
    assert role.load_seconds is not None
    assert actor["start"].snapshot.hook_errors == {}
    assert actor["start"].snapshot.engine.sglang_version == actor.version
    with tempfile.TemporaryDirectory() as directory:
        size = sum(size for _, size in header(tiny_model.write(Path(directory) / "a")).values())
    parameters = [part for part in role.weights or () if part.kind == "parameter"]
    assert sum(part.nbytes for part in parameters) == size
    (event,) = actor["start"].events
    assert (event.update.action, event.update.succeeded) == ("load", True)


def test_every_hook_that_the_release_has_is_on(actor: Run) -> None:
    states = {hook.target: (hook.status, hook.reason) for hook in actor["start"].snapshot.hooks}
    off = {name for name, (status, _) in states.items() if status not in {"installed", "absent"}}
    # Modules of processes that have no model runner; a rank does not import them.
    assert off <= {"encoder", "encoder.run_dp_worker", "weight_cache.export", "weight_cache.map"}
    assert all(states[name][0] == "pending" for name in off)
    assert (states["end_weight_update"][0] == "installed") == actor.has_sessions


def test_disk(actor: Run) -> None:
    assert actor["disk"].success is True
    assert actor.grown("disk") == {"disk": (1, 0, 1)}
    update = actor["disk"].role.last_update
    assert update is not None
    assert (update.source, update.effect, update.succeeded) == ("disk", "changed", True)
    assert update.model_path.endswith("/b")
    assert update.started_at < (actor["disk"].role.updated_at or 0) <= update.ended_at


def test_two_buckets_of_tensors_are_one_update(actor: Run) -> None:
    last = "tensor ends" if actor.has_sessions else "last bucket"
    first = "tensor begins" if actor.has_sessions else "first bucket"
    assert actor["first bucket"].success is True
    assert actor["first bucket"].role.in_progress is not None
    assert actor["last bucket"].success is True
    assert actor.grown(first, last) == {"tensor": (1, 0, 2)}
    assert actor[last].role.in_progress is None
    assert actor[last].snapshot.weight_version == "7"


def test_a_flattened_bucket(actor: Run) -> None:
    assert actor["flattened bucket"].success is True
    if actor.has_sessions:
        assert actor.grown("flattened begins", "flattened ends") == {"tensor": (1, 0, 1)}
    else:
        assert actor.grown("flattened bucket") == {"tensor": (1, 0, 1)}


def took(actor: Run, step: str) -> dict[str, float]:
    """Seconds of the last update by phase; their sum is its duration."""
    update = actor[step].role.last_update
    assert update is not None
    seconds = update.ended_at - update.started_at
    assert sum(update.phases.values()) == pytest.approx(seconds, rel=0.01)
    assert update.source is not None
    counts = actor[step].role.updates[update.source]
    assert sum(counts.phases.values()) == pytest.approx(counts.duration.sum, rel=0.01)
    return {str(phase): seconds for phase, seconds in update.phases.items()}


def brought(actor: Run, step: str) -> int | None:
    update = actor[step].role.last_update
    assert update is not None
    return update.nbytes


def lateness(phases: dict[str, float]) -> dict[str, float]:
    """The delays of which no whole one is in its phase."""
    return {
        phase: phases.get(phase, 0.0)
        for phase, seconds in DELAYS.items()
        if phases.get(phase, 0.0) < seconds
    }


def test_a_delay_in_a_reload_comes_back_in_its_phase(actor: Run) -> None:
    phases = took(actor, "late disk")
    if actor.has_sessions:
        assert lateness(phases).keys() <= {"wait"}
    else:  # Loading and packing are one function.
        assert lateness(phases).keys() <= {"wait", "post_process"}
        assert phases["load"] >= DELAYS["load"] + DELAYS["post_process"]


def test_a_delay_in_a_session_comes_back_in_its_phase(actor: Run) -> None:
    if actor.has_sessions:
        assert lateness(took(actor, "late tensor ends")) == {}
    else:
        assert "late bucket" not in actor.steps


def test_the_time_of_tensors_that_are_broadcast(actor: Run) -> None:
    """The trainer takes its time."""
    if actor.has_sessions:
        assert took(actor, "distributed ends")["receive"] > 0.5
    else:  # Receiving and loading are one function.
        assert took(actor, "distributed batch")["load"] > 0.5


def test_what_updates_bring_is_measured(actor: Run) -> None:
    def end(step: str, session: str) -> str:
        return f"{session} ends" if actor.has_sessions else step

    checkpoint = actor["disk"].role.model_path
    assert brought(actor, "disk") == actor.checkpoint_bytes[checkpoint]
    norm = tiny_model.HIDDEN * BFLOAT16
    assert brought(actor, end("last bucket", "tensor")) == 2 * norm
    assert brought(actor, end("flattened bucket", "flattened")) == norm
    assert brought(actor, end("distributed batch", "distributed")) == norm
    assert brought(actor, "announced in place") is None
    assert actor["announced in place"].role.updates["external"].nbytes is None
    assert (
        actor["missing path"].role.updates["disk"].nbytes == 2 * actor.checkpoint_bytes[checkpoint]
    )


def test_sessions(actor: Run) -> None:
    if not actor.has_sessions:
        assert actor["start"].totals()["p2p"] == (0, 0, 0)
        return
    assert actor["no session"].success is False
    assert actor.grown("no session") == {"tensor": (0, 1, 0)}
    assert actor.grown("peer to peer begins", "peer to peer ends") == {"p2p": (1, 0, 1)}


def test_a_distributed_batch_and_its_group(actor: Run) -> None:
    assert actor["group opens"].success is True, actor["group opens"].message
    assert actor["group opens"].snapshot.update_groups == 1
    assert actor["distributed batch"].success is True, actor["distributed batch"].message
    if actor.has_sessions:
        grown = actor.grown("distributed begins", "distributed ends")
    else:
        grown = actor.grown("distributed batch")
    assert grown == {"distributed": (1, 0, 1)}
    assert actor["group closes"].success is True
    assert actor["group closes"].snapshot.update_groups == 0
    assert actor["group closes"].operation("init_weights_update_group") == (1, 0)
    assert actor["group closes"].operation("destroy_weights_update_group") == (1, 0)


def test_a_size_that_cannot_be_takes_nothing_away(actor: Run) -> None:
    """SGLang answers, and the rank lives on; what the trainer claimed is no size."""
    assert actor["impossible batch"].success is False
    update, grown = failed(actor, "impossible batch", "impossible")
    assert grown["distributed"][:2] == (0, 1)
    assert not update.succeeded
    after = actor["impossible ends" if actor.has_sessions else "impossible batch"]
    assert after.role.updates["distributed"].nbytes == 128 * 2  # Of the batch that came.


def test_ipc_that_cannot_be(actor: Run) -> None:
    # It needs the package checkpoint-engine, and a GPU.
    assert actor["ipc"].success is False
    assert actor.grown("ipc") == {"ipc": (0, 1, 1)}


def test_reading_and_saving_are_operations(actor: Run) -> None:
    assert actor["read"].operation("get_weights_by_name") == (1, 0)
    assert actor["read nothing"].operation("get_weights_by_name") == (2, 1)
    assert actor["save"].error is None
    assert actor["save"].operation("save_sharded_model") == (1, 0)
    assert actor.grown("read", "read nothing") == {}
    assert actor.grown("save") == {}


def test_reset_tensors_overwrites_weights(actor: Run) -> None:
    assert actor["checksum"].success is True
    assert actor.grown("checksum") == {}
    assert actor["reset"].success is True, actor["reset"].message
    assert actor.grown("reset") == {"external": (1, 0, 1)}
    assert actor["compare"].success is False  # They are not what they were.
    assert actor.grown("compare") == {}
    assert actor["compare"].operation("check_weights") == (3, 1)


def test_a_write_in_place_that_is_announced(actor: Run) -> None:
    assert actor["announced in place"].error is None
    assert actor.grown("announced in place") == {"external": (1, 0, 1)}
    update = actor["announced in place"].role.last_update
    assert update is not None
    assert (update.source, update.effect, update.succeeded) == ("external", "changed", True)
    assert not update.changes
    assert (actor["announced in place"].role.updated_at or 0) > update.started_at


def test_a_block_of_announced_writes_is_in_progress_until_its_end(actor: Run) -> None:
    assert actor["inside a block"].error is None
    progress = actor["inside a block"].role.in_progress
    assert progress is not None
    assert (progress.source, progress.idle_seconds) == ("external", None)
    assert "UpdateInProgressError" in (actor["a reader inside a block"].error or "")
    assert actor["a reader after a block"].error is None
    assert actor["a reader after a block"].role.in_progress is None
    assert actor.grown("inside a block", "a reader after a block") == {"external": (1, 0, 1)}


def test_a_tensor_that_was_replaced_has_moved(actor: Run) -> None:
    assert actor["announced elsewhere"].error is None
    assert actor.grown("announced elsewhere") == {"external": (1, 0, 1)}
    before, after = (
        step.role for step in (actor.before("announced elsewhere"), actor["announced elsewhere"])
    )
    assert after.moved - before.moved == 1
    assert after.last_update is not None
    assert after.last_update.changes.names == {"moved": ("model.norm.weight",)}
    assert after.table is not None
    assert before.table is not None
    assert after.table.sha256 != before.table.sha256
    assert after.weights == before.weights


def test_an_announced_block_that_raises_leaves_weights_undefined(actor: Run) -> None:
    assert "the link is down" in (actor["announced half"].error or "")
    assert actor.grown("announced half") == {"p2p": (0, 1, 1)}
    update = actor["announced half"].role.last_update
    assert update is not None
    assert (update.succeeded, update.effect) == (False, "undefined")
    assert update.message == "the link is down"
    assert actor["announced half"].role.in_progress is None


def test_release_without_the_memory_saver_does_nothing(actor: Run) -> None:
    # In a process with CUDA's torch and no GPU SGLang's last line of it raises, from 0.5.21 on.
    resident = actor["start"].role.resident
    assert actor["release"].role.resident == resident
    assert actor["release"].role.kv_resident == actor["start"].role.kv_resident
    assert resident is not None
    assert sum(resident.values()) > 0
    assert actor["resume"].role.resident == resident


def test_lora_slots_are_there_before_and_after_an_adapter(actor: Run) -> None:
    if "lora" not in actor.steps:
        assert actor["start"].role.lora == ()
        pytest.skip(f"LoRA needs a GPU after SGLang {LORA_ON_CPU}")
    (empty,) = actor["start"].role.lora
    assert empty.adapters == 0
    assert empty.nbytes > 0
    assert actor["lora"].success is True, actor["lora"].message
    (loaded,) = actor["lora"].role.lora
    assert (loaded.adapters, loaded.nbytes) == (1, empty.nbytes)
    # Modules refer to the slots, and the slots are no weights all the same.
    assert [part for part in actor["lora"].role.weights or () if part.kind == "derived"] == []
    assert actor["lora off"].success is True
    assert actor["lora off"].role.lora == (empty,)
    assert actor.grown("lora", "lora off") == {}
    assert actor["lora missing"].operation("load_lora_adapter") == (2, 1)
    assert actor["lora missing"].operation("unload_lora_adapter") == (1, 0)


def test_a_path_that_does_not_exist(actor: Run) -> None:
    assert actor["missing path"].success is False
    assert actor.grown("missing path") == {"disk": (0, 1, 1)}
    update = actor["missing path"].role.last_update
    assert update is not None
    assert (update.succeeded, update.effect) == (False, "unchanged")
    assert actor["missing path"].role.updated_at == actor.before("missing path").role.updated_at


@pytest.mark.parametrize("step", ["broken file", "other shape"])
def test_a_checkpoint_that_cannot_be_loaded_leaves_weights_undefined(actor: Run, step: str) -> None:
    # The rollback reads the new checkpoint again, which fails again: SGLang raises.
    assert actor[step].error is not None
    assert actor.grown(step) == {"disk": (0, 1, 1)}
    update = actor[step].role.last_update
    assert update is not None
    assert (update.succeeded, update.effect) == (False, "undefined")
    assert update.message
    assert (actor[step].role.updated_at or 0) > update.started_at
    now, before = actor[step].role.table, actor["back"].role.table
    assert now is not None
    assert before is not None
    assert now == msgspec.structs.replace(before, captured_at=now.captured_at)


def failed(actor: Run, step: str, group: str) -> Any:
    """The update that a failing call belongs to, and how its source's totals grew."""
    ended = actor[f"{group} ends"] if actor.has_sessions else actor[step]
    first = f"{group} begins" if actor.has_sessions else step
    last = f"{group} ends" if actor.has_sessions else step
    return ended.role.last_update, actor.grown(first, last)


def test_an_unknown_format_changes_nothing(actor: Run) -> None:
    assert "Unknown load_format" in (actor["unknown format"].error or "")
    # Besides the one that was refused without a session.
    assert actor["unknown format"].totals()["tensor"][1] == 1 + actor.has_sessions
    failure = actor["unknown format"].role.last_update
    assert failure is not None
    assert (failure.succeeded, failure.effect) == (False, "unchanged")


def test_a_group_that_does_not_exist_changes_nothing(actor: Run) -> None:
    update, grown = failed(actor, "no group", "group")
    assert grown["distributed"][:2] == (0, 1)
    assert (update.succeeded, update.effect) == (False, "unchanged")
    assert "Group nobody" in update.message


def test_a_tensor_of_the_wrong_shape_leaves_weights_undefined(actor: Run) -> None:
    assert actor["wrong shape"].error is not None
    failure = actor["wrong shape"].role.last_update
    assert failure is not None
    assert (failure.source, failure.succeeded, failure.effect) == ("tensor", False, "undefined")


def test_the_engine_is_one_rank_by_its_settings(actor: Run) -> None:
    assert actor["start"].snapshot.engine.expected_ranks == 1


def test_nothing_of_ours_went_wrong(actor: Run) -> None:
    assert list(actor.steps.values())[-1].snapshot.hook_errors == {}
    assert "sglang_weight_exporter:" not in actor.output


def test_every_update_has_an_event(actor: Run) -> None:
    last = list(actor.steps.values())[-1]
    ended = sum(counts.updates + counts.failures for counts in last.role.updates.values())
    assert len([event for event in last.events if event.update.action == "update"]) == ended
    assert [event.number for event in last.events] == list(range(1, len(last.events) + 1))
