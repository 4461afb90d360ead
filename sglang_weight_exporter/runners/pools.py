# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which of a runner's objects are KV pools and LoRA slots, and what to call their parts."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch

from sglang_weight_exporter.capture.object_tensors import Storage, owned_tensors, unique_storages
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage

#: Tensors that help kernels find the pool and hold no key, value or state.
_BOOKKEEPING = ("_ptrs", "_strides", "_mapping", "_pos", "_loc", "free_slots")

#: Pools of state beside the KV pool, on `runner.req_to_token_pool` (0.5.2 and later).
_STATE_POOLS = ("mamba_pool", "mamba_ckpt_pool", "short_conv_pool", "ngram_pool")

#: Part of an attribute's name → label. The first that appears on the way to a tensor wins.
_LABELS = (
    ("swa", "swa"),
    ("mamba", "mamba"),
    ("conv", "mamba"),
    ("ngram", "ngram"),
    ("compress_state", "compress_state"),
    ("index", "index"),
    ("qsa", "index"),
    ("c128", "c128"),
    ("c4", "c4"),
    ("unified", "unified"),
)


#: Where SGLang keeps pools and their parts, and what else it keeps there.
_POOL_MODULES = ("sglang.srt.mem_cache.", "sglang.srt.hardware_backend.")
_NO_POOLS = ("Host", "Allocator", "ReqToToken", "Controller")


def _is_pool(value: object) -> bool:
    kind = type(value)
    return kind.__module__.startswith(_POOL_MODULES) and not any(
        word in kind.__name__ for word in _NO_POOLS
    )


def _label(path: tuple[str, ...]) -> str:
    for name in path:
        for part, label in _LABELS:
            if part in name:
                return label
    return "full"


def _pool_tensors(runner: Any, backed: dict[int, int]) -> Iterator[tuple[str, torch.Tensor]]:
    # The one buffer of unified pools first: the others are views into it, and share it as they
    # need it.
    roots: list[tuple[tuple[str, ...], Any]] = [
        (("unified",), getattr(runner, "_unified_memory_pool", None)),
        ((), getattr(runner, "token_to_kv_pool", None)),
    ]
    request_pool = getattr(runner, "req_to_token_pool", None)
    roots += [((name,), getattr(request_pool, name, None)) for name in _STATE_POOLS]
    for prefix, root in roots:
        if root is None:
            continue
        for path, tensor in owned_tensors(root, _is_pool, backed):
            if not path or not path[-1].partition("[")[0].endswith(_BOOKKEEPING):
                yield _label((*prefix, *path)), tensor


def kv_storages(runner: Any, counted: Container[int] = ()) -> list[Storage] | None:
    """Memory of a runner's KV pools, labelled with the pool; ``None`` before they are allocated.

    ``counted``: addresses of storages that an earlier runner's pools hold.
    """
    if getattr(runner, "token_to_kv_pool", None) is None:
        return None
    backed: dict[int, int] = {}
    tensors = list(_pool_tensors(runner, backed))
    return unique_storages(tensors, counted=counted, backed=backed)


def kv_usage(runner: Any, storages: Iterable[Storage]) -> tuple[KvPoolUsage, ...]:
    """Bytes and tokens of each pool."""
    full = getattr(runner, "full_max_total_num_tokens", None) or getattr(
        runner, "max_total_num_tokens", None
    )
    swa = getattr(runner, "swa_max_total_num_tokens", None)
    tokens: dict[str, Any] = {"full": full, "unified": full, "swa": swa}
    totals: dict[tuple[str, str], int] = {}
    for storage in storages:
        key = (storage.device, storage.label)
        totals[key] = totals.get(key, 0) + storage.nbytes
    return tuple(
        KvPoolUsage(
            device=device,
            pool=pool,
            nbytes=nbytes,
            tokens=None if tokens.get(pool) is None else int(tokens[pool]),
        )
        for (device, pool), nbytes in totals.items()
        if nbytes
    )


_PAGED_EXPERTS = "sglang.srt.layers.moe.paged_experts."

#: What finds a request's tokens in the pool, and free slots.
_TABLES = ("req_to_token_pool", "token_to_kv_pool_allocator", "token_to_kv_pool")


def table_storages(runner: Any, pools: Container[int]) -> list[Storage]:
    """Memory of what keeps the pools' books: tables of requests, free slots, addresses of buffers.

    ``pools``: addresses of the pools' own storages.
    """

    def follow(value: object) -> bool:
        return (
            type(value).__module__.startswith(_POOL_MODULES) and "Host" not in type(value).__name__
        )

    tensors = (
        (name, tensor)
        for name in _TABLES
        if (owner := getattr(runner, name, None)) is not None
        for _, tensor in owned_tensors(owner, follow)
    )
    return unique_storages(tensors, counted=pools)


def is_lora_layer(module: torch.nn.Module) -> bool:
    """Whether a module is one that SGLang puts around another for adapters: its attributes are
    adapter slots."""
    return type(module).__module__.startswith("sglang.srt.lora.")


def paged_parameters(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of parameters that hold the experts that were asked for last and that forward passes
    write (``--enable-paged-experts`` of 0.5.22 and later; all experts are on the host)."""
    return tuple(
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__module__.startswith(_PAGED_EXPERTS)
        for parameter, held in module._parameters.items()
        if held is not None
    )


def lora_storages(runner: Any) -> list[Storage]:
    """Memory of a runner's adapter slots; empty where LoRA is off."""
    pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
    if pool is None:
        return []
    slots = ((str(path[0]), tensor) for path, tensor in owned_tensors(pool, lambda value: False))
    return unique_storages(slots)


def lora_usage(runner: Any, storages: Iterable[Storage]) -> tuple[LoraUsage, ...]:
    """Bytes of adapter slots by device, and adapters that are loaded."""
    manager = getattr(runner, "lora_manager", None)
    adapters = len(getattr(manager, "loras", ()))
    slots = getattr(getattr(manager, "memory_pool", None), "max_loras_per_batch", None)
    devices: dict[str, int] = {}
    for storage in storages:
        devices[storage.device] = devices.get(storage.device, 0) + storage.nbytes
    return tuple(
        LoraUsage(
            device=device,
            nbytes=nbytes,
            adapters=adapters,
            slots=slots if isinstance(slots, int) else None,
        )
        for device, nbytes in devices.items()
    )


#: Where SGLang says which memory pool all CUDA graphs are captured into: 0.5.17 and later, before.
_GRAPH_RUNNERS = (
    "sglang.srt.model_executor.runner_utils.pool",
    "sglang.srt.model_executor.cuda_graph_runner",
    "sglang.srt.model_executor.piecewise_cuda_graph_runner",
)


def graph_pools() -> frozenset[tuple[int, int]] | None:
    """torch's names of the memory pools of CUDA graphs; ``None`` where SGLang names none."""
    found = set()
    for name in _GRAPH_RUNNERS:
        ask = getattr(sys.modules.get(name), "get_global_graph_memory_pool", None)
        pool = None if ask is None else ask()
        if isinstance(pool, tuple) and len(pool) == 2:
            found.add((int(pool[0]), int(pool[1])))
    return frozenset(found) or None
