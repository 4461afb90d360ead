# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own pool classes, built small on the CPU in whatever release this runs beside.

`build_pools.py MODEL OUT` writes to OUT, for each pool by name, as JSON: what the hooks measure
(`pools`), the bytes of all tensors that torch made while it was built and that are still there
(`alive`), those of them that only find the others (`bookkeeping`), and what SGLang says
(`sglang`). `error` says why a pool cannot be built here.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache import memory_pool
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_weight_exporter.runners import pools

SIZE, PAGE, LAYERS, HEADS, DIM = 128, 16, 3, 2, 32
BUILDERS: dict[str, Callable[[], Any]] = {}


def builds(function: Callable[[], Any]) -> Callable[[], Any]:
    BUILDERS[function.__name__] = function
    return function


def first_that_fits(*attempts: Callable[[], Any]) -> Any:
    """Signatures change between releases."""
    for attempt in attempts[:-1]:
        try:
            return attempt()
        except TypeError:
            continue
    return attempts[-1]()


COMMON: dict[str, Any] = {"device": "cpu", "enable_memory_saver": False}
SHAPE: dict[str, Any] = {"head_num": HEADS, "head_dim": DIM, **COMMON}
PAGED: dict[str, Any] = {"size": SIZE, "page_size": PAGE, "layer_num": LAYERS, **SHAPE}
LATENT: dict[str, Any] = {
    "size": SIZE,
    "page_size": PAGE,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "layer_num": LAYERS,
    **COMMON,
}
SPARSE = {
    **LATENT,
    "dtype": torch.bfloat16,
    "page_size": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "kv_cache_dim": 576,
}
FP4 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)


@builds
def mha() -> Any:
    return memory_pool.MHATokenToKVPool(dtype=torch.bfloat16, **PAGED)


@builds
def mha_fp4() -> Any:
    return memory_pool.MHATokenToKVPoolFP4(dtype=FP4, **PAGED)


@builds
def mha_mxfp8() -> Any:
    return memory_pool.MHATokenToKVPoolMXFP8(dtype=torch.float8_e4m3fn, **PAGED)


@builds
def mha_keys_only() -> Any:
    return memory_pool.MHATokenToKOnlyPool(dtype=torch.bfloat16, **PAGED)


@builds
def mha_no_op() -> Any:
    return memory_pool.NoOpMHATokenToKVPool(dtype=torch.bfloat16, **PAGED)


@builds
def double_sparse() -> Any:
    return memory_pool.DoubleSparseTokenToKVPool(dtype=torch.bfloat16, heavy_channel_num=8, **PAGED)


@builds
def mla() -> Any:
    return memory_pool.MLATokenToKVPool(dtype=torch.bfloat16, **LATENT)


@builds
def mla_fp4() -> Any:
    return memory_pool.MLATokenToKVPoolFP4(dtype=FP4, **LATENT)


@builds
def sparse_attention() -> Any:
    """DSA, which was NSA until 0.5.12."""
    kind = getattr(memory_pool, "DSATokenToKVPool", None) or memory_pool.NSATokenToKVPool
    return kind(**SPARSE)


@builds
def sparse_attention_hisparse() -> Any:
    from sglang.srt.mem_cache.hisparse_memory_pool import HiSparseDSATokenToKVPool

    return HiSparseDSATokenToKVPool(**SPARSE)


@builds
def sparse_attention_layer_split() -> Any:
    from sglang.srt.mem_cache.dsa_cache_layer_split import LayerSplitDSATokenToKVPool
    from sglang.srt.runtime_context import get_parallel

    alone = SimpleNamespace(world_size=1, pynccl_comm=None)
    with get_parallel().override(attn_cp_group=alone):
        return LayerSplitDSATokenToKVPool(layer_shard_rank=0, layer_shard_size=2, **SPARSE)


def one_of_two(page_size: int) -> dict[str, Any]:
    """The first of two ranks that keep every other page. Their communicator needs NCCL, and so
    GPUs; a pool only keeps it."""
    from sglang.srt.mem_cache import page_interleave_pool
    from sglang.srt.mem_cache.page_interleave import PageShardSpec

    page_interleave_pool.PyNcclCommunicator = lambda **arguments: None
    group = SimpleNamespace(world_size=2, rank_in_group=0, cpu_group=None, device="cpu")
    shard = PageShardSpec(
        shard_rank=0,
        shard_size=2,
        page_size=page_size,
        max_prefix_tokens=2 * page_size,
        chunk_tokens=page_size,
    )
    return {"shard_spec": shard, "shard_group": group}


@builds
def mha_page_interleave() -> Any:
    from sglang.srt.mem_cache.page_interleave_pool import PageInterleaveMHATokenToKVPool

    return PageInterleaveMHATokenToKVPool(dtype=torch.bfloat16, **one_of_two(PAGE), **PAGED)


@builds
def mla_page_interleave() -> Any:
    from sglang.srt.mem_cache.page_interleave_pool import PageInterleaveMLATokenToKVPool

    return PageInterleaveMLATokenToKVPool(dtype=torch.bfloat16, **one_of_two(PAGE), **LATENT)


@builds
def sparse_attention_page_interleave() -> Any:
    from sglang.srt.mem_cache.page_interleave_pool import PageInterleaveDSATokenToKVPool

    return PageInterleaveDSATokenToKVPool(**one_of_two(64), **SPARSE)


@builds
def swa() -> Any:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    arguments: dict[str, Any] = {
        "size": SIZE,
        "size_swa": SIZE // 2,
        "page_size": 1,
        "dtype": torch.bfloat16,
        "head_num": HEADS,
        "head_dim": DIM,
        "swa_attention_layer_ids": [0, 1],
        "full_attention_layer_ids": [2],
        "device": "cpu",
        "token_to_kv_pool_class": memory_pool.MHATokenToKVPool,
    }
    return first_that_fits(
        lambda: SWAKVPool(enable_kvcache_transpose=False, **arguments),
        lambda: SWAKVPool(enable_memory_saver=False, **arguments),
    )


def mamba_parameters() -> Any:
    from sglang.srt.configs import mamba_utils

    shape = mamba_utils.Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=64,
        n_groups=1,
        num_heads=4,
        head_dim=16,
        state_size=8,
        conv_kernel=4,
    )
    dtype = mamba_utils.Mamba2StateDType(conv=torch.bfloat16, temporal=torch.float32)
    return mamba_utils.Mamba2CacheParams(shape=shape, dtype=dtype, layers=[0, 2])


def mamba_pool(draft_tokens: int | None) -> Any:
    arguments: dict[str, Any] = {
        "size": 5,
        "spec_state_size": 5,
        "cache_params": mamba_parameters(),
        "speculative_num_draft_tokens": draft_tokens,
        **COMMON,
    }
    return first_that_fits(
        lambda: memory_pool.MambaPool(mamba_layer_ids=[0, 2], **arguments),
        lambda: memory_pool.MambaPool(**arguments),
    )


@builds
def mamba() -> Any:
    return mamba_pool(None)


@builds
def mamba_speculative() -> Any:
    return mamba_pool(2)


@builds
def mamba_checkpoints() -> Any:
    from sglang.srt.mem_cache.mamba_checkpoint_pool import MambaCheckpointPool

    return MambaCheckpointPool(
        num_layers=2,
        num_slots=7,
        num_heads=4,
        head_v_dim=16,
        head_k_dim=8,
        conv_shapes=[(80, 3)],
        conv_dtype=torch.bfloat16,
        device="cpu",
    )


HYBRID: dict[str, Any] = {
    "size": SIZE,
    "page_size": PAGE,
    "dtype": torch.bfloat16,
    "full_attention_layer_ids": [1, 3],
    **SHAPE,
}


@builds
def hybrid_linear() -> Any:
    return first_that_fits(
        lambda: memory_pool.HybridLinearKVPool(mamba_pool=mamba(), **HYBRID),
        lambda: memory_pool.HybridLinearKVPool(
            mamba_pool=mamba(), enable_kvcache_transpose=False, **HYBRID
        ),
    )


@builds
def qsa() -> Any:
    from sglang.srt.mem_cache.qsa_kv_pool import QSATokenToKVPool

    return QSATokenToKVPool(
        mamba_pool=mamba(),
        qsa_index_kv_heads=1,
        qsa_index_head_dim=32,
        qsa_compress_ratio=4,
        qsa_token_topk=16,
        num_request_slots=4,
        **HYBRID,
    )


@builds
def minimax() -> Any:
    return memory_pool.MiniMaxSparseKVPool(
        size=SIZE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        idx_head_dim=16,
        dense_layer_ids=[0],
        sparse_layer_ids=[1, 2],
        disable_value_sparse_layer_ids=[2],
        start_layer=0,
        end_layer=3,
        **SHAPE,
    )


SPARSE_ONLY: dict[str, Any] = {
    "dense_layer_ids": [],
    "sparse_layer_ids": [0, 1, 2],
    "disable_value_sparse_layer_ids": [0, 1, 2],
    "start_layer": 0,
    "end_layer": 3,
    "dtype": torch.bfloat16,
    **SHAPE,
}


@builds
def minimax_hisparse() -> Any:
    from sglang.srt.mem_cache.hisparse_memory_pool import HiSparseMHAMainPool

    return memory_pool.MiniMaxSparseKVPool(
        size=SIZE, page_size=PAGE, idx_head_dim=16, main_pool_cls=HiSparseMHAMainPool, **SPARSE_ONLY
    )


@builds
def minimax_nvfp4() -> Any:
    from sglang.srt.mem_cache.minimax_m3_nvfp4_pool import MiniMaxM3Nvfp4KVPool

    arguments = SPARSE_ONLY | {"head_dim": 128}
    return MiniMaxM3Nvfp4KVPool(size=2 * SIZE, page_size=128, idx_head_dim=128, **arguments)


@builds
def ngram() -> Any:
    from sglang.srt.mem_cache.ple_state_pool import NGramPool

    return NGramPool(
        size=9,
        context_len=3,
        eos_token_id=1,
        spec_state_size=4,
        speculative_num_draft_tokens=None,
        **COMMON,
    )


@builds
def short_conv() -> Any:
    from sglang.srt.mem_cache.ple_state_pool import ShortConvPool

    return ShortConvPool(
        size=9,
        state_shape=(16, 3),
        layer_ids=[0, 1],
        dtype=torch.bfloat16,
        spec_state_size=4,
        speculative_num_draft_tokens=None,
        **COMMON,
    )


@builds
def deepseek_v4() -> Any:
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    return DeepSeekV4TokenToKVPool(
        max_num_reqs=4,
        swa_size=512,
        c4_size=256,
        c128_size=64,
        c4_state_pool_size=16,
        c128_state_pool_size=16,
        page_size=256,
        swa_page_size=128,
        dtype=torch.float8_e4m3fn,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=4,
        compression_ratios=[0, 4, 128, 4],
        sliding_window=128,
        **COMMON,
    )


@builds
def unified() -> Any:
    from sglang.srt.mem_cache import unified_memory_pool

    def spec(name: str, direction: str) -> Any:
        return unified_memory_pool.MHASubPoolSpec(
            name=name,
            layer_num=2,
            grow_direction=direction,
            head_num=HEADS,
            head_dim=DIM,
            store_dtype=torch.bfloat16,
        )

    buffer = unified_memory_pool.UnifiedKVPool(
        total_bytes=2**20, sub_pool_specs=[spec("full", "up"), spec("swa", "down")], **COMMON
    )
    views = unified_memory_pool.UnifiedMHATokenToKVPool(
        unified_buffer=buffer, sub_pool_name="full", enable_alt_stream=False
    )
    return SimpleNamespace(_unified_memory_pool=buffer, token_to_kv_pool=views)


#: Pools of state hang on the pool of requests.
ON_REQUESTS = {
    "mamba": "mamba_pool",
    "mamba_speculative": "mamba_pool",
    "mamba_checkpoints": "mamba_ckpt_pool",
    "ngram": "ngram_pool",
    "short_conv": "short_conv_pool",
}


def runner_of(name: str, pool: Any) -> Any:
    if isinstance(pool, SimpleNamespace):
        return pool
    if name in ON_REQUESTS:
        request_pool = SimpleNamespace(**{ON_REQUESTS[name]: pool})
        return SimpleNamespace(token_to_kv_pool=SimpleNamespace(), req_to_token_pool=request_pool)
    return SimpleNamespace(token_to_kv_pool=pool)


class Made(TorchDispatchMode):
    """Every tensor that torch makes inside."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor):
                self._tensors.append(weakref.ref(item))
        return result

    def kept(self) -> list[torch.Tensor]:
        """One tensor for each storage that somebody still has."""
        gc.collect(0)
        alive = [tensor for tensor in (ref() for ref in self._tensors) if tensor is not None]
        return list({tensor.untyped_storage().data_ptr(): tensor for tensor in alive}.values())


def is_bookkeeping(tensor: torch.Tensor) -> bool:
    """Pointers, strides, slots and indices: whole numbers of 64 or 32 bits in one dimension."""
    return tensor.dim() == 1 and tensor.dtype in {torch.int64, torch.uint64, torch.int32}


def measure(name: str, build: Callable[[], Any]) -> dict[str, Any]:
    torch_made = Made()
    try:
        with torch_made:
            pool = build()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    made = torch_made.kept()
    runner = runner_of(name, pool)
    usage = pools.kv_usage(runner, pools.kv_storages(runner) or [])
    says: Any = None
    if hasattr(pool, "get_kv_size_bytes"):
        answer = pool.get_kv_size_bytes()
        says = int(sum(answer)) if isinstance(answer, tuple) else int(answer)
    return {
        "class": type(pool).__name__,
        "pools": {part.pool: part.nbytes for part in usage},
        "alive": sum(tensor.untyped_storage().nbytes() for tensor in made),
        "bookkeeping": sum(
            tensor.untyped_storage().nbytes() for tensor in made if is_bookkeeping(tensor)
        ),
        "sglang": says,
    }


def publish(model: str) -> None:
    """From 0.5.17 on, pools read the process's configuration."""
    try:
        from sglang.srt.runtime_context import SpawnRanks
        from sglang.srt.runtime_context import publish as publish_it
        from sglang.srt.server_args import prepare_server_args
    except ImportError:
        return
    server_args = prepare_server_args(["--model-path", model, "--device", "cpu"])
    publish_it(
        server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    )


if __name__ == "__main__":
    publish(sys.argv[1])
    found = {name: measure(name, build) for name, build in BUILDERS.items()}
    Path(sys.argv[2]).write_text(json.dumps(found))
