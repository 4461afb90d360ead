# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A rank without a server: SGLang's Scheduler in a process that nobody told about plugins, as
Ray's SchedulerActor has it, sent every request that touches weights.

`actor.py OUT RANKS LORA TRAINER_PORT DELAYS FIRST SECOND BROKEN OTHER_SHAPE`: RANKS is how many of
these processes run at once, LORA "lora" or nothing; then a free port, seconds by phase as JSON, the
checkpoint to load, one of the same shape, one whose file is cut off, one of another shape. Writes
to OUT, as JSON, what each request answered and the rank's snapshot and events after it. Requests
that fail go last: some of them would end a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.server_args import PortArgs, prepare_server_args
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from sglang_weight_exporter import TableReader, open_tables, record_update, updating
from sglang_weight_exporter.runners.inspector import ModelRunnerInspector
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader, rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

NORM = "model.norm.weight"
TRAINER = """
import sys, time, torch
from sglang.srt.utils import init_custom_process_group
group = init_custom_process_group(
    backend="gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", world_size=2, rank=0,
    group_name="trainer",
)
sys.stdin.readline()  # Until it is asked for,
time.sleep(2)  # and then it takes its time.
torch.distributed.broadcast(torch.full((128,), 2.0, dtype=torch.bfloat16), src=0, group=group)
"""


LORA = "--enable-lora --max-lora-rank 8 --max-loras-per-batch 2 --lora-backend torch_native"
LORA += " --lora-target-modules q_proj v_proj"


def make_scheduler(model: str, *, flags: str = "") -> Scheduler:
    flags += " --device cpu --disable-overlap-schedule --mem-fraction-static 0.2"
    flags += " --context-length 512 --max-total-tokens 4096"
    server_args = prepare_server_args(["--model-path", model, *flags.split()])
    port_args = PortArgs.init_new(server_args)
    ranks = (0, 0, 0, 0, 0, 0, None)
    try:
        from sglang.srt import runtime_context
    except ImportError:  # until 0.5.13
        return Scheduler(server_args, port_args, *ranks)
    if not hasattr(runtime_context, "SpawnRanks"):  # until 0.5.20
        if hasattr(runtime_context, "publish"):
            runtime_context.publish(server_args, role="scheduler")
        return Scheduler(server_args, port_args, *ranks)
    from sglang.srt.managers.scheduler import configure_scheduler_process

    only = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    runtime_context.publish(server_args, role="scheduler", ranks=only)
    configure_scheduler_process(server_args, 0)
    return Scheduler(server_args, port_args)


class Script:
    """What was asked, what was answered, and what the exporter would read after it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: dict[str, Any] = {}
        settings, _ = Settings.from_environ(os.environ)
        self.runtime_dir = RuntimeDir.open(settings.runtime_dir, os.environ)

    def own_directory(self) -> RankDirectory:
        for directory, snapshot in SnapshotReader(self.runtime_dir).read():
            if snapshot.pid == os.getpid():
                return directory
        raise LookupError("this process has published nothing")

    def own_reader(self) -> TableReader:
        own = self.own_directory()
        (reader,) = [
            found for found in open_tables(self.runtime_dir.path) if found.directory == own
        ]
        return reader

    def wait_for(self, ranks: int) -> None:
        """Until so many are loaded: each must have chosen its engine's name beside the others."""
        deadline = time.monotonic() + 600
        while len(list(rank_directories(self.runtime_dir))) < ranks and time.monotonic() < deadline:
            time.sleep(0.1)

    def step(self, name: str, act: Callable[[], Any]) -> None:
        try:
            with torch.inference_mode():  # As SGLang's event loop has it.
                result, error = act(), None
        except Exception as caught:
            result, error = None, repr(caught)
        directory = self.own_directory()
        self.steps[name] = {
            "success": None if result is None else getattr(result, "success", True),
            "message": getattr(result, "message", None) or getattr(result, "error_message", None),
            "error": error,
            "snapshot": msgspec.to_builtins(directory.snapshot()),
            "events": [
                msgspec.to_builtins(directory.events.event(path))
                for path in directory.events.waiting()
            ],
        }
        self.out.write_text(json.dumps(self.steps))


@contextlib.contextmanager
def delays(scheduler: Any, seconds: dict[str, float]) -> Iterator[None]:
    """SGLang's own code, and this package's capture, take so much longer, by phase."""
    model = scheduler.tp_worker.model_runner.model
    quantization = next(
        module.quant_method for module in model.modules() if hasattr(module, "quant_method")
    )
    places = {
        "load": (model, "load_weights"),
        "post_process": (quantization, "process_weights_after_loading"),
        "flush": (scheduler.tree_cache, "reset"),
        "capture": (ModelRunnerInspector, "capture"),
    }

    def late(original: Any, delay: float) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            time.sleep(delay)
            return original(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as patches:
        for phase, (owner, name) in places.items():
            slow = late(getattr(owner, name), seconds[phase])
            patches.enter_context(mock.patch.object(owner, name, slow))
        yield


def change_by_own_means(script: Script, runner: Any) -> None:
    """Write into a real parameter behind SGLang's back, and announce it."""
    weight = runner.model.get_parameter(NORM)

    def in_place() -> None:
        weight.data.fill_(3.0)
        record_update(runner)

    def elsewhere() -> None:
        with updating(runner):
            weight.data = weight.data.clone()

    def half() -> None:
        with updating(runner, source="p2p"):
            weight.data[:64].fill_(4.0)
            raise ConnectionError("the link is down")

    script.step("announced in place", in_place)
    with updating(runner):
        script.step("inside a block", lambda: weight.data.fill_(2.0))
        script.step("a reader inside a block", script.own_reader().read)
    script.step("a reader after a block", script.own_reader().read)
    script.step("announced elsewhere", elsewhere)
    script.step("announced half", half)


def main() -> None:
    out = Path(sys.argv[1])
    ranks, lora, port, late, first, second, broken, other_shape = sys.argv[2:]
    seconds = json.loads(late)
    script = Script(out)
    scheduler = make_scheduler(first, flags=LORA if lora else "")
    script.step("start", lambda: script.wait_for(int(ranks)))

    def ask(request: str, **arguments: Any) -> Callable[[], Any]:
        return lambda: scheduler._request_dispatcher(getattr(io_struct, request)(**arguments))

    def tensors(named: Any, **arguments: Any) -> Callable[[], Any]:
        serialized = [MultiprocessingSerializer.serialize(named)]
        return ask(
            "UpdateWeightsFromTensorReqInput", serialized_named_tensors=serialized, **arguments
        )

    has_sessions = hasattr(io_struct, "BeginWeightUpdateReqInput")

    @contextlib.contextmanager
    def session(name: str) -> Any:
        if has_sessions:
            script.step(f"{name} begins", ask("BeginWeightUpdateReqInput"))
        yield
        if has_sessions:
            script.step(f"{name} ends", ask("EndWeightUpdateReqInput"))

    disk = "UpdateWeightFromDiskReqInput"
    norm = torch.full((128,), 2.0, dtype=torch.bfloat16)
    flat = FlattenedTensorBucket(named_tensors=[(NORM, norm)])
    flattened = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
    # All at once: receiving changes how SGLang sends, and that needs a GPU then.
    first_bucket = tensors([(NORM, norm)], flush_cache=False)
    last_bucket = tensors([(NORM, norm)], weight_version="7")
    flattened_bucket = tensors(flattened, load_format="flattened_bucket")
    no_session = tensors([(NORM, norm)])
    late_bucket = tensors([(NORM, norm)])
    unknown_format = tensors([(NORM, norm)], load_format="no_such_format")
    wrong_shape = tensors([(NORM, norm), (NORM, norm[:64])])

    script.step("disk", ask(disk, model_path=second, load_format="auto"))
    with session("tensor"):
        script.step("first bucket", first_bucket)
        script.step("last bucket", last_bucket)
    with session("flattened"):
        script.step("flattened bucket", flattened_bucket)
    with delays(scheduler, seconds):
        script.step("late disk", ask(disk, model_path=second, load_format="auto"))
        if has_sessions:
            with session("late tensor"):
                time.sleep(seconds["wait"])
                script.step("late bucket", late_bucket)
    if has_sessions:
        script.step("no session", no_session)
        with session("peer to peer"):
            pass

    command = [sys.executable, "-c", TRAINER, port]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as trainer:
        group = {"group_name": "trainer"}
        script.step(
            "group opens",
            ask(
                "InitWeightsUpdateGroupReqInput",
                master_address="127.0.0.1",
                master_port=port,
                rank_offset=1,
                world_size=2,
                backend="gloo",
                **group,
            ),
        )
        batch = {"names": [NORM], "dtypes": ["bfloat16"], "shapes": [[128]]}
        distributed = "UpdateWeightsFromDistributedReqInput"
        with session("distributed"):
            batch_of_group = ask(distributed, **batch, **group)

            def receive() -> Any:
                print(file=trainer.stdin, flush=True)
                return batch_of_group()

            script.step("distributed batch", receive)
        impossible = ask(distributed, **{**batch, "shapes": [[-1, 128]]}, **group)
        with session("impossible"):
            script.step("impossible batch", impossible)
        script.step("group closes", ask("DestroyWeightsUpdateGroupReqInput", **group))
        trainer.wait()

    script.step("ipc", ask("UpdateWeightsFromIPCReqInput", zmq_handles={}))
    script.step("read", ask("GetWeightsByNameReqInput", name=NORM))
    script.step("read nothing", ask("GetWeightsByNameReqInput", name="no.such.weight"))
    script.step("checksum", ask("CheckWeightsReqInput", action="snapshot"))
    script.step("reset", ask("CheckWeightsReqInput", action="reset_tensors"))
    script.step("compare", ask("CheckWeightsReqInput", action="compare"))
    change_by_own_means(script, scheduler.tp_worker.model_runner)
    script.step("release", ask("ReleaseMemoryOccupationReqInput"))
    script.step("resume", ask("ResumeMemoryOccupationReqInput"))
    if lora:
        name = {"lora_name": "adapter", "lora_id": "adapter-id"}
        adapter = str(Path(first).parent / "adapter")
        script.step("lora", ask("LoadLoRAAdapterReqInput", **name, lora_path=adapter))
        script.step("lora off", ask("UnloadLoRAAdapterReqInput", **name))
        missing = {"lora_name": "x", "lora_id": "x", "lora_path": "/nowhere"}
        script.step("lora missing", ask("LoadLoRAAdapterReqInput", **missing))
    saved = out.parent / "saved"
    saved.mkdir()
    runner = scheduler.tp_worker.model_runner
    exporter = getattr(runner, "weight_exporter", runner)
    script.step("save", lambda: exporter.save_sharded_model(path=str(saved)))

    script.step("missing path", ask(disk, model_path="/nowhere", load_format="auto"))
    script.step("back", ask(disk, model_path=first, load_format="auto"))
    script.step("broken file", ask(disk, model_path=broken, load_format="auto"))
    script.step("other shape", ask(disk, model_path=other_shape, load_format="auto"))
    with session("format"):
        script.step("unknown format", unknown_format)
    with session("group"):
        script.step("no group", ask(distributed, **batch, group_name="nobody"))
    with session("shape"):
        script.step("wrong shape", wrong_shape)


if __name__ == "__main__":
    main()
    os._exit(0)  # SGLang's threads would keep the process.
