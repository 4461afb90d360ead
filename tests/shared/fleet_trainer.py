# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One process of a trainer that sends all weights to an engine: fleet_trainer.py SETTINGS

Each process has its shards of every tensor, as FSDP has them, and writes its part of the manifest.
For each bucket the processes gather the tensors, and the first one broadcasts them to the engine's
ranks, over NCCL on GPUs and over gloo on a CPU. It prints what it has measured as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

os.environ["NCCL_CUMEM_ENABLE"] = "0"  # As SGLang has it; with another value both hang.

BUCKETS = 8
GROUP = "trainer"


class Trainer:
    """``settings``: rank, world, device, checkpoints, manifests, url of the engine, its number of
    ranks, two ports, and rounds."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        self.settings = settings
        self.rank, self.world = settings["rank"], settings["world"]
        self.device, on_gpu = settings["device"], settings["device"] != "cpu"
        self.backend = "nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(self.device)
            torch.empty(1, device=self.device)  # Or the mesh chooses another one.
        dist.init_process_group(
            self.backend,
            init_method=f"tcp://127.0.0.1:{settings['own_port']}",
            rank=self.rank,
            world_size=self.world,
        )
        self.mesh = dist.device_mesh.init_device_mesh("cuda" if on_gpu else "cpu", (self.world,))
        self.group: Any = None

    def join(self) -> None:
        """The first process and the engine's ranks, in a group of their own."""
        from sglang.srt.utils import init_custom_process_group

        world, port = 1 + self.settings["ranks"], self.settings["engine_port"]
        address = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1}
        asked = {**address, "world_size": world, "group_name": GROUP, "backend": self.backend}
        asking = self._ask("/init_weights_update_group", asked)
        self.group = init_custom_process_group(
            backend=self.backend,
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=world,
            rank=0,
            group_name=GROUP,
        )
        asking.join()

    def shards(self, checkpoint: Path) -> dict[str, Any]:
        from safetensors import safe_open
        from torch.distributed.tensor import Shard, distribute_tensor

        held = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, "pt", device=self.device) as file:
                for name in sorted(file.keys()):
                    held[name] = distribute_tensor(file.get_tensor(name), self.mesh, [Shard(0)])
        return held

    def send(self, version: str, held: dict[str, Any]) -> float:
        """All weights in buckets; seconds from the first to the end of the last."""
        import torch

        from sglang_weight_exporter import write_manifest

        path = Path(self.settings["manifests"]) / f"manifest_{version}.json"
        part = (self.rank, self.world)
        write_manifest(path, held, cuts=(1, 2, 4, 8), weight_version=version, part=part)
        torch.distributed.barrier()
        began, names = time.perf_counter(), list(held)
        sessions = self.rank == 0 and self._has_sessions()
        if sessions:
            self._ask("/begin_weight_update", {}).join()
        size = -(-len(names) // BUCKETS)
        for at in range(0, len(names), size):
            bucket = names[at : at + size]
            whole = {name: held[name].full_tensor() for name in bucket}
            if self.rank == 0:
                self._broadcast(whole, version, last=at + size >= len(names))
        if sessions:
            self._ask("/end_weight_update", {}).join()
        torch.distributed.barrier()
        return time.perf_counter() - began

    def _has_sessions(self) -> bool:
        """From SGLang 0.5.21 on."""
        with urllib.request.urlopen(self.settings["url"] + "/openapi.json") as response:
            return "/begin_weight_update" in json.load(response)["paths"]

    def _broadcast(self, whole: dict[str, Any], version: str, *, last: bool) -> None:
        import torch

        asking = self._ask(
            "/update_weights_from_distributed",
            {
                "names": list(whole),
                "dtypes": [str(each.dtype).removeprefix("torch.") for each in whole.values()],
                "shapes": [list(each.shape) for each in whole.values()],
                "group_name": GROUP,
                "flush_cache": last,
                **({"weight_version": version} if last else {}),
            },
        )
        for each in whole.values():
            torch.distributed.broadcast(each.contiguous(), src=0, group=self.group)
        if self.device != "cpu":
            torch.cuda.synchronize()
        asking.join()

    def _ask(self, path: str, body: dict[str, Any]) -> threading.Thread:
        """A request that goes on beside; what is refused ends this process."""

        def ask() -> None:
            request = urllib.request.Request(
                self.settings["url"] + path,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request) as response:
                    answer = json.load(response)
            except urllib.error.HTTPError as error:
                answer = {"success": False, "message": error.read().decode()}
            if not answer["success"]:
                print(f"{path} was refused: {answer}", file=sys.stderr, flush=True)
                os._exit(1)

        thread = threading.Thread(target=ask)
        thread.start()
        return thread


def main() -> None:
    settings = json.loads(sys.argv[1])
    trainer = Trainer(settings)
    if trainer.rank == 0:
        trainer.join()
    seconds, nbytes = [], 0
    for version, checkpoint in enumerate(settings["checkpoints"], 1):
        held = trainer.shards(Path(checkpoint))
        nbytes = sum(each.numel() * each.element_size() for each in held.values())
        seconds.append(trainer.send(str(version), held))
    if trainer.rank == 0:
        print(json.dumps({"seconds": seconds, "bytes": nbytes}), flush=True)
    os._exit(0)  # The engine's end of the group may already be gone.


if __name__ == "__main__":
    main()
