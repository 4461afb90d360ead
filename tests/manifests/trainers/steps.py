# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A trainer's steps with its own functions, beside a real engine:
`steps.py NAME URL SENT CHECKPOINT STEPS`.

NAME is ``slime`` or ``verl``: their functions are in the files beside this one, read at a commit
and run as they are. What they import is given here: for Ray threads that call, for Megatron and
FSDP a state dict. STEPS is JSON, a list of sabotages: ``""``, ``drop``, ``rename NAME TO``,
``stale NAME``. Each step sends new weights under its number as the version, in a session where the
release has them and else in a pause, and leaves ``SENT/manifest_NUMBER.json`` of what the trainer
has. A line of input is the next step. Weights are on a GPU where this process sees one, and go over
NCCL.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import types
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_weight_exporter import sum_tensors, write_manifest

BUCKET_BYTES = 100_000
DEVICE, BACKEND = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
Named = list[tuple[str, torch.Tensor]]


def post(url: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    assert found.get("success", True), found
    return found


def own_functions(trainer: str, given: dict[str, Any]) -> dict[str, Any]:
    """The trainer's, with what they import."""
    path = Path(__file__).with_name(f"{trainer}.py.txt")
    source = "from __future__ import annotations\n" + path.read_text()
    names = {"torch": torch, "dist": dist, **given}
    exec(compile(source, path, "exec"), names)
    return names


def state_of(checkpoint: Path, seed: int) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    noise = torch.Generator().manual_seed(seed)
    with safe_open(str(checkpoint / "model.safetensors"), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return {
        name: torch.randn(shape, generator=noise).to(DEVICE, torch.bfloat16)
        for name, shape in shapes.items()
    }


def sabotaged(state: dict[str, Any], before: dict[str, Any], sabotage: str) -> dict[str, Any]:
    kind, *words = sabotage.split() or [""]
    if kind == "rename":
        state = dict(state)
        state[words[1]] = state.pop(words[0])
    elif kind == "stale":
        state = {**state, words[0]: before[words[0]]}
    return state


def buckets(state: dict[str, torch.Tensor]) -> Iterator[Named]:
    bucket: Named = []
    for name, tensor in state.items():
        bucket.append((name, tensor.clone()))
        if sum(each.nbytes for _, each in bucket) > BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


# slime, over a process group.


class _Remote:
    """``engine.method.remote(...)``, as Ray has it of an actor."""

    def __init__(self, actor: Any, threads: ThreadPoolExecutor) -> None:
        self._actor, self._threads = actor, threads

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return types.SimpleNamespace(
            remote=lambda *given, **named: self._threads.submit(method, *given, **named)
        )


def _get(refs: Any) -> Any:
    return refs.result() if isinstance(refs, Future) else [each.result() for each in refs]


def slime(url: str) -> Callable[[Named, str, bool], None]:
    import requests
    from sglang.srt.utils import init_custom_process_group

    ray = types.SimpleNamespace(
        get=_get,
        _private=types.SimpleNamespace(
            services=types.SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
        ),
    )
    own = own_functions(
        "slime",
        {
            "ray": ray,
            "requests": requests,
            "socket": socket,
            "time": __import__("time"),
            "accelerator": types.SimpleNamespace(weight_update_backend=lambda: BACKEND),
            "init_process_group": init_custom_process_group,
            "_wrap_ipv6": lambda host: host,
            "get_gloo_group": lambda: None,
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = own["SGLangEngine"]()
    host, _, port = url.removeprefix("http://").partition(":")
    engine.node_rank, engine.server_host, engine.server_port = 0, host, int(port)
    threads = ThreadPoolExecutor(4)
    remote = _Remote(engine, threads)
    tp_size = json.load(urllib.request.urlopen(f"{url}/get_server_info"))["tp_size"]
    name = f"slime-pp_{os.getpid()}"  # The engine keeps those of trainers that have ended.
    group = own["connect_rollout_engines_from_distributed"](
        types.SimpleNamespace(rollout_num_gpus_per_engine=tp_size), name, [remote]
    )
    lock = types.SimpleNamespace(acquire=lambda: True, release=lambda: None)

    base: Any = own["UpdateWeightFromDistributed"]

    class Updater(base):  # type: ignore[misc]
        def _iter_non_expert_chunks(self) -> Iterator[Named]:
            return buckets_of(self.named, expert=False)

        def _iter_expert_chunks(self) -> Iterator[Named]:
            return buckets_of(self.named, expert=True)

    updater = Updater()
    updater.rollout_engines, updater.rollout_engine_lock = [remote], _Remote(lock, threads)
    updater._group_name, updater._model_update_groups = name, group

    def buckets_of(named: Named, *, expert: bool) -> Iterator[Named]:
        """Its two passes."""
        return buckets({name: each for name, each in named if (".experts." in name) == expert})

    def send(named: Named, version: str, drop: bool) -> None:
        lost = [name for name, _ in list(buckets(dict(named)))[1]] if drop else []
        updater.named = [(name, tensor) for name, tensor in named if name not in lost]
        updater.weight_version = int(version)
        updater._send_weights(types.SimpleNamespace(update=lambda number: None))

    return send


# verl, tensors through the server, of each tensor-parallel rank.


async def _iterated(iterable: Any) -> Any:
    for item in iterable:
        yield item


def verl(url: str) -> Callable[[Named, str, bool], None]:
    import aiohttp
    import numpy
    from sglang.srt.utils import patch_torch
    from sglang.srt.weight_sync.utils import update_weights
    from torch.distributed.device_mesh import init_device_mesh

    if DEVICE == "cpu":
        # What SGLang puts in its place knows the memory of GPUs alone; the server is no child of
        # this.
        torch.multiprocessing.set_sharing_strategy("file_system")
        patch_torch.monkey_patch_torch_reductions = lambda: None
    sent: list[int] = []
    dropped: list[bool] = [False]

    async def all_but_what_is_dropped(**given: Any) -> None:
        sent.append(len(sent))
        if not (dropped[0] and len(sent) == 2):
            await update_weights(**given)

    own = own_functions(
        "verl",
        {
            "asyncio": asyncio,
            "aiohttp": aiohttp,
            "np": numpy,
            "asynccontextmanager": asynccontextmanager,
            "logger": __import__("logging").getLogger("verl"),
            "DEFAULT_TIMEOUT": 600,
            "ensure_async_iterator": _iterated,
            "sgl_update_weights": all_but_what_is_dropped,
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    host, _, port = url.removeprefix("http://").partition(":")
    server = own["AsyncHttpServerAdapter"]()
    server.server_args = types.SimpleNamespace(host=host, port=int(port))
    server.node_rank, server.max_attempts, server.retry_delay = 0, 3, 1.0
    server.max_connections, server.timeout = 100, 600
    adapter = own["ServerAdapter"]()

    async def ready() -> None:
        return None

    adapter._init_server_adapter = ready
    adapter._engine = _ForEachRank(server, url)
    adapter.device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "infer_tp"))

    class Config(dict[str, Any]):
        checkpoint_engine = types.SimpleNamespace(update_weights_bucket_megabytes=1)

    adapter.config = Config()
    in_buckets = own["get_named_tensor_buckets"]
    own["get_named_tensor_buckets"] = lambda weights, _: in_buckets(weights, BUCKET_BYTES)

    def send(named: Named, version: str, drop: bool) -> None:
        sent.clear()
        dropped[0] = drop
        asyncio.run(adapter.update_weights(iter(named)))
        post(url, "update_weight_version", {"new_version": version, "abort_all_requests": False})

    return send


class _ForEachRank:
    """verl has a process for each tensor-parallel rank, which give their handles to the first; here
    one process gives the same for all."""

    def __init__(self, server: Any, url: str) -> None:
        self._server = server
        self._ranks = json.load(urllib.request.urlopen(f"{url}/get_server_info"))["tp_size"]

    async def update_weights_from_tensor(self, request: Any) -> Any:
        from sglang.srt.utils import MultiprocessingSerializer

        (content,) = request.serialized_named_tensors
        named = MultiprocessingSerializer.deserialize(content)
        for _, tensor in named:
            tensor.values *= self._ranks
        request.serialized_named_tensors = [
            MultiprocessingSerializer.serialize(named) for _ in range(self._ranks)
        ]
        return await self._server.update_weights_from_tensor(request)

    async def flush_cache(self) -> Any:
        return await self._server.flush_cache()


TRAINERS = {"slime": slime, "verl": verl}


def main(trainer: str, url: str, directory: str, checkpoint: str, steps: Sequence[str]) -> None:
    send = TRAINERS[trainer](url)
    begin, end = "begin_weight_update", "end_weight_update"
    if f"/{begin}" not in json.load(urllib.request.urlopen(f"{url}/openapi.json"))["paths"]:
        begin, end = "pause_generation", "continue_generation"
    before: dict[str, torch.Tensor] = {}
    for number, sabotage in enumerate(steps, start=1):
        state = state_of(Path(checkpoint), number)
        has = sabotaged(state, before, sabotage) if "rename" in sabotage else state
        tensors: dict[str, Any] = {}
        for bucket in buckets(has):
            tensors |= sum_tensors(bucket)
        path = Path(directory) / f"manifest_{number}.json"
        write_manifest(path, tensors, weight_version=str(number))
        post(url, begin)
        send(list(sabotaged(state, before, sabotage).items()), str(number), sabotage == "drop")
        post(url, end)
        before = state
        print(number, flush=True)
        sys.stdin.readline()  # The test asks before the next.


if __name__ == "__main__":
    name, address, sent_to, loaded, wanted = sys.argv[1:]
    main(name, address, sent_to, loaded, json.loads(wanted))
