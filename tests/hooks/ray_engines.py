# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks of two engines in a Ray of their own, made as SGLang's RayEngine makes them: a
SchedulerActor each, in worker processes that are children of one raylet.

`ray_engines.py OUT TEMPORARY FIRST SECOND`: where to write what was seen, as JSON; a directory for
Ray; a checkpoint to load and one to update to.

On a CPU an actor's event loop cannot run, since SGLang selects a GPU in it; so there is no server
and no tokenizer, and what a server would send is given to the scheduler by a call of the actor.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util.placement_group import placement_group

from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

FLAGS = "--use-ray --dp-size 2 --device cpu --disable-overlap-schedule --mem-fraction-static 0.2"
FLAGS += " --context-length 512 --max-total-tokens 4096"
SECONDS = 600.0


class RayDidNotStartError(Exception):
    """Nothing of ours was tried."""


def start_ray(temporary: str) -> None:
    try:
        ray.init(
            num_cpus=2,
            num_gpus=3,  # Only counted: an actor asks for one.
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _temp_dir=temporary,
        )
    except Exception as error:
        raise RayDidNotStartError(f"Ray {ray.__version__} did not start: {error}") from error


def launch(model: str, ranks: int) -> list[Any]:
    """The first ranks of an engine with two data-parallel ones, on a placement group of its own.

    All at once, where SGLang's RayDataParallelController starts one after the other.
    """
    from sglang.srt import runtime_context
    from sglang.srt.ray.engine import _create_scheduler_actor
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(["--model-path", model, *FLAGS.split()])
    runtime_context.publish(server_args, role="tokenizer")
    group = placement_group([{"CPU": 1, "GPU": ranks}], strategy="STRICT_PACK")
    ray.get(group.ready(), timeout=SECONDS)
    address = ray.util.get_node_ip_address()
    actors = []
    for rank in range(ranks):
        port_args = PortArgs.init_new(server_args)
        actors.append(
            _create_scheduler_actor(
                pg=group,
                bundle_idx=0,
                gpu_id=rank,
                server_args=server_args,
                port_args=port_args,
                tp_rank=0,
                pp_rank=0,
                dp_rank=rank,
                dist_init_addr=f"{address}:{port_args.nccl_port}",
                rank0_node_ip=address,
            )
        )
    return actors


def inside(actor: Any, act: Callable[[Any], Any]) -> Any:
    """Call the function with the SchedulerActor in its process."""
    return ray.get(actor.__ray_call__.remote(act), timeout=SECONDS)


def process(actor: Any) -> dict[str, Any]:
    from sglang.srt import plugins

    return {"pid": os.getpid(), "parent": os.getppid(), "plugins": plugins._plugins_loaded}


def update(actor: Any, model: str) -> bool:
    import torch
    from sglang.srt.managers import io_struct

    request = io_struct.UpdateWeightFromDiskReqInput(model_path=model, load_format="auto")
    with torch.inference_mode():  # As SGLang's event loop has it.
        return bool(actor.scheduler._request_dispatcher(request).success)


class Script:
    """What was done, and what the exporter would read after it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seen: dict[str, Any] = {}
        settings, _ = Settings.from_environ(os.environ)
        self.reader = SnapshotReader(RuntimeDir.open(settings.runtime_dir, os.environ))

    def say(self, name: str, what: Any) -> None:
        self.seen[name] = what
        self.out.write_text(json.dumps(self.seen))

    def ranks(self, name: str) -> None:
        snapshots = [msgspec.to_builtins(snapshot) for _, snapshot in self.reader.read()]
        self.say(name, snapshots)

    def wait_until_gone(self, pid: int) -> None:
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)


def main() -> None:
    out, temporary, first, second = sys.argv[1:]
    script = Script(Path(out))
    try:
        start_ray(temporary)
    except RayDidNotStartError as error:
        script.say("no ray", str(error))
        return
    actors = [*launch(first, 2), *launch(first, 1)]
    ray.get([actor.get_info.remote() for actor in actors], timeout=SECONDS)
    script.say("processes", [inside(actor, process) for actor in actors])
    script.ranks("loaded")
    updated = actors[1]
    script.say("success", inside(updated, functools.partial(update, model=second)))
    script.ranks("updated")
    ray.kill(actors[0])
    script.wait_until_gone(script.seen["processes"][0]["pid"])
    script.ranks("killed")
    for actor in actors[1:]:
        ray.kill(actor)
    ray.shutdown()


if __name__ == "__main__":
    main()
    os._exit(0)  # Python would take seconds to take down what SGLang imported.
