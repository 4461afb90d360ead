# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""KV pools of every class, built from SGLang's own classes on a GPU, against torch's allocator.

Models that use most of them need more GPUs than a test machine has; the pools themselves do not.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_engines import Record, need_gpus

SIZE, DEVICE = 65536, "cuda"
HEADS = {"head_num": 4, "head_dim": 128, "device": DEVICE}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "layer_num": 3, "device": DEVICE}

#: A runner's `token_to_kv_pool` and its `req_to_token_pool`.
Pools = tuple[Any, Any]


def mha(name: str = "MHATokenToKVPool", dtype: str = "bfloat16", **more: Any) -> Pools:
    import torch
    from sglang.srt.mem_cache import memory_pool

    settings = {"page_size": 1, "enable_memory_saver": False, **HEADS, "layer_num": 3, **more}
    kind = getattr(memory_pool, name)
    return kind(size=SIZE, dtype=getattr(torch, dtype), **settings), None


def mla(name: str = "MLATokenToKVPool", dtype: str = "bfloat16", **more: Any) -> Pools:
    import torch
    from sglang.srt.mem_cache import memory_pool

    settings = {"page_size": 1, "enable_memory_saver": False, **LATENT, **more}
    kind = getattr(memory_pool, name)
    return kind(size=SIZE, dtype=getattr(torch, dtype), **settings), None


def swa() -> Pools:
    import torch
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool = SWAKVPool(
        size=SIZE,
        size_swa=SIZE // 4,
        page_size=1,
        dtype=torch.bfloat16,
        swa_attention_layer_ids=[0, 2],
        full_attention_layer_ids=[1, 3],
        enable_memory_saver=False,
        **HEADS,
    )
    return pool, None


def hybrid_linear() -> Pools:
    import torch
    from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool

    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=512,
        n_groups=1,
        num_heads=8,
        head_dim=64,
        state_size=128,
        conv_kernel=4,
    )
    requests = HybridReqToTokenPool(
        size=16,
        mamba_size=64,
        mamba_spec_state_size=16,
        max_context_len=64,
        device=DEVICE,
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=[0, 2]),
        mamba_layer_ids=[0, 2],
        enable_mamba_extra_buffer=False,
    )
    pool = HybridLinearKVPool(
        size=SIZE,
        dtype=torch.bfloat16,
        page_size=1,
        full_attention_layer_ids=[1, 3],
        mamba_pool=requests.mamba_pool,
        **HEADS,
    )
    return pool, requests


def minimax() -> Pools:
    import torch
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool

    pool = MiniMaxSparseKVPool(
        size=SIZE,
        page_size=64,
        dtype=torch.bfloat16,
        idx_head_dim=128,
        dense_layer_ids=[0],
        sparse_layer_ids=[1, 2],
        start_layer=0,
        end_layer=3,
        **HEADS,
    )
    return pool, None


def deepseek_v4() -> Pools:
    import torch
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="test")
    pool = DeepSeekV4TokenToKVPool(
        max_num_reqs=8,
        swa_size=SIZE // 4,
        c4_size=SIZE // 4,
        c128_size=SIZE // 128,
        c4_state_pool_size=512,
        c128_state_pool_size=512,
        page_size=256,
        swa_page_size=128,
        dtype=torch.float8_e4m3fn,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=3,
        device=DEVICE,
        enable_memory_saver=False,
        compression_ratios=[0, 4, 128],
    )
    return pool, None


BUILD: dict[str, Callable[[], Pools]] = {
    "MHA": mha,
    "MHA, FP8": lambda: mha(dtype="float8_e4m3fn"),
    "MHA, FP4": lambda: mha("MHATokenToKVPoolFP4", "float4_e2m1fn_x2"),
    "MHA, MXFP8": lambda: mha("MHATokenToKVPoolMXFP8", "float8_e4m3fn", page_size=64),
    "MHA, page-major": lambda: mha("PageMajorMHATokenToKVPool", page_size=64),
    "MHA, no-op": lambda: mha("NoOpMHATokenToKVPool"),
    "MLA": mla,
    "MLA, FP4": lambda: mla("MLATokenToKVPoolFP4", "float4_e2m1fn_x2"),
    "DSA": lambda: mla("DSATokenToKVPool", page_size=64, index_head_dim=128, kv_cache_dim=576),
    "SWA": swa,
    "hybrid linear with Mamba": hybrid_linear,
    "MiniMax sparse": minimax,
    "DeepSeek-V4": deepseek_v4,
}


@pytest.mark.parametrize("name", BUILD)
def test_a_pool_is_what_torch_allocated_for_it(name: str, record_property: Record) -> None:
    need_gpus()
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("needs SGLang 0.5.17 or later")
    import torch

    from sglang_weight_exporter.runners.pools import kv_storages, kv_usage

    gc.collect()
    before = torch.cuda.memory_allocated()
    pool, requests = BUILD[name]()
    gc.collect()
    grown = torch.cuda.memory_allocated() - before
    runner = SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=requests, max_total_num_tokens=SIZE
    )
    found = kv_storages(runner)
    assert found is not None
    usage = kv_usage(runner, found)
    storages = {storage.address for storage in found}
    published = sum(part.nbytes for part in usage)
    blocks = {
        block["address"]: block
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
    }
    held = sum(blocks[address]["size"] for address in storages)
    for part in usage:
        record_property(part.pool, part.nbytes)
    record_property("memory_allocated growth", grown)
    record_property("blocks of the published storages", held)
    try:
        record_property("SGLang's own figure", str(pool.get_kv_size_bytes()))
    except Exception as error:
        record_property("SGLang's own figure", repr(error))
    assert published == sum(blocks[address]["requested_size"] for address in storages)
    # Beside keys, values and states there are tables of addresses and the requests' tokens.
    assert held <= grown <= held + 65536
