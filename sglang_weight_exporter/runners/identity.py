# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank of which engine this process is, read from a model runner of any release, or from
what holds a model without one: an encoder server's ``MMEncoder``, a ``WeightCacheDaemon``."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.memory import MemoryBudget
from sglang_weight_exporter.runners.sglang_version import sglang_version

_ENCODER, _WEIGHT_CACHE = "encoder", "weight_cache"

#: Classes that load a model and are no model runners, and the role of it.
_WITHOUT_RUNNER = {"MMEncoder": _ENCODER, "WeightCacheDaemon": _WEIGHT_CACHE}


#: Settings by which a loader makes other bytes of a checkpoint, packs them, or places experts
#: (``arg_groups/fields`` of 0.5.23; earlier releases have them in ``server_args.py``).
_LOAD_SETTINGS = (
    "disable_shared_experts_fusion",
    "dtype",
    "enable_dp_attention",
    "enable_dp_lm_head",
    "enable_eplb",
    "enable_fp32_lm_head",
    "enable_shared_experts_attn_tp",
    "ep_num_redundant_experts",
    "fp4_gemm_runner_backend",
    "fp8_gemm_runner_backend",
    "init_expert_location",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "model_loader_extra_config",
    "moe_a2a_backend",
    "moe_dense_tp_size",
    "moe_runner_backend",
    "quantization",
    "quantization_param_path",
    "revision",
    "rl_quant_profile",
    "speculative_draft_model_path",
    "speculative_draft_model_quantization",
    "torchao_config",
)


def ranks_of(runner: Any, dp_rank: int | None) -> Ranks:
    """Ranks of the process, from its **target** runner; ``dp_rank`` as it was passed to the runner
    (0.5.1 to 0.5.11 pass it to ``__init__``, where it is not kept).

    Drafts must not be asked: SGLang builds them with a pipeline rank of 0 and, from 0.5.21, with
    a narrowed tensor-parallel rank.
    """
    return Ranks(
        tp=_rank(runner, "rank" if role_of(runner) == _ENCODER else "tp_rank") or 0,
        pp=_rank(runner, "pp_rank") or 0,
        dp=_rank(runner, "dp_rank") if dp_rank is None else dp_rank,
        moe_ep=_rank(runner, "moe_ep_rank"),
    )


def _rank(runner: Any, name: str) -> int | None:
    # On the runner until 0.5.15 (and in 0.5.21), on `runner.ps` until 0.5.20, in the process's
    # context after that. The context raises errors of several types when it is not set up.
    context = sys.modules.get("sglang.srt.runtime_context")
    for owner in (runner, getattr(runner, "ps", None), _parallel(context)):
        try:
            value = getattr(owner, name)
        except Exception:  # noqa: S112
            continue
        if value is not None:
            return int(value)
    if name == "dp_rank" and os.environ.get("SGLANG_DP_RANK", "").isdigit():
        return int(os.environ["SGLANG_DP_RANK"])  # Until 0.5.11 it is not passed to the runner.
    return None


def _parallel(context: Any) -> Any:
    try:
        return context.get_parallel()
    except Exception:
        return None


def role_of(runner: Any) -> str:
    """``target``, ``draft`` or, with several draft layers, ``draft_0``, ``draft_1``, …;
    ``encoder`` and ``weight_cache`` where there is no model runner."""
    without_runner = _WITHOUT_RUNNER.get(type(runner).__name__)
    if without_runner is not None:
        return without_runner
    if not getattr(runner, "is_draft_worker", False):
        return "target"
    index = getattr(runner, "draft_model_idx", None)
    return "draft" if index is None else f"draft_{index}"


def device_of(runner: Any) -> str:
    """torch's name of the runner's device; a weight-cache daemon's is where its model is."""
    if role_of(runner) == _WEIGHT_CACHE:
        return str(next(runner.model.parameters()).device)
    kind = str(getattr(runner, "device", "cpu"))
    if kind in {"cpu", "mps"} or ":" in kind:
        return kind
    return f"{kind}:{int(getattr(runner, 'gpu_id', 0))}"


def server_setting(runner: Any, name: str) -> Any:
    """A launch setting; ``None`` where this release has none or keeps it unresolved."""
    return getattr(getattr(runner, "server_args", None), name, None)


def instance_of(runner: Any) -> str:
    """The same for all ranks of one engine on this host, and for no other engine.

    Ranks are children of one process (the engine's, or its data-parallel controller), which may
    have several engines; those differ in the port that their ranks meet at. In Ray all are children
    of the host's raylet; an engine has a placement group, and where several share one, a random
    seed, which they draw before their actors start.
    """
    parent = os.getppid()
    role = role_of(runner)
    if role == _ENCODER and multiprocessing.parent_process() is None:
        parent = os.getpid()  # Rank 0 is the server itself, and the other ranks' parent.
    facts = [str(parent), _start_time(parent), str(server_setting(runner, "port"))]
    if placement_group := _placement_group():
        facts += [placement_group, str(_decided(runner, "get_device", "random_seed"))]
    if role in _WITHOUT_RUNNER.values():
        facts.append(role)
    elif (server_setting(runner, "dp_size") or 1) == 1:
        facts.append(str(getattr(runner, "dist_port", None)))
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


def group_of(owner: Any, engine: Engine) -> str:
    """The same for all ranks of one engine, on however many hosts, and for no other engine; empty
    until they have agreed.

    On one host that is the instance. On several, ranks have in common where they meet
    (``--dist-init-addr``, to be spelled the same on all hosts; Ray's placement group) and the
    random seed, which SGLang broadcasts among them before it makes their scheduler, the ``owner``.
    """
    placement_group = _placement_group()
    if (engine.nodes or 1) == 1 and not placement_group:
        return engine.instance
    seed = getattr(owner, "random_seed", None)
    meets_at = _meets_at(owner, placement_group)
    if seed is None or not meets_at:
        return ""
    return hashlib.sha256(f"{meets_at}|{seed}".encode()).hexdigest()[:16]


def _meets_at(owner: Any, placement_group: str) -> str:
    if placement_group:
        return f"{placement_group}|{server_setting(owner, 'port')}"
    return str(_decided(owner, "get_parallel", "dist_init_addr") or "")


def _decided(owner: Any, bag: str, name: str) -> Any:
    """A setting as SGLang has completed it: from 0.5.17 on in the process's context, from 0.5.19 on
    only there."""
    context = sys.modules.get("sglang.srt.runtime_context")
    try:
        return getattr(getattr(context, bag)(), name)
    except Exception:  # Of several types, as with ranks.
        return server_setting(owner, name)


def _placement_group() -> str:
    """Ray's identifier of it, where Ray has started this process."""
    ray = sys.modules.get("ray")
    try:
        # Asked for its context, a Ray that was only imported would start a cluster.
        if ray is not None and ray.is_initialized():
            return str(ray.get_runtime_context().get_placement_group_id())
    except Exception:
        return ""  # Ray's errors are of many types. Engines then differ in their ports.
    return ""


def _start_time(pid: int) -> str:
    """In clock ticks since boot (proc_pid_stat(5), field 22): distinguishes reused pids."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def engine_of(runner: Any) -> Engine:
    """Facts about the engine; its name is the HTTP port, which the store makes unique."""
    path = str(server_setting(runner, "model_path") or getattr(runner, "model_path", None) or "")
    name = str(server_setting(runner, "port") or "0")
    if role_of(runner) == _WEIGHT_CACHE:
        name = "weight-cache"  # It serves no HTTP; its settings are those of an engine beside it.
    nodes = _size(runner, "nnodes")
    return Engine(
        name=name,
        instance=instance_of(runner),
        model_name=str(server_setting(runner, "served_model_name") or path),
        model_path=path,
        sglang_version=sglang_version(),
        torch_version=str(getattr(sys.modules.get("torch"), "__version__", "")),
        tp_size=_size(runner, "tp_size"),
        pp_size=_size(runner, "pp_size"),
        ep_size=_size(runner, "ep_size"),
        load_settings=_load_settings(runner),
        url=_url(runner),
        meets_at="" if (nodes or 1) == 1 else _meets_at(runner, _placement_group()),
        node_rank=_size(runner, "node_rank"),
        nodes=nodes,
        expected_ranks=_expected_ranks(runner),
    )


def _expected_ranks(runner: Any) -> int | None:
    """As many as SGLang starts, see :attr:`Engine.expected_ranks`."""
    if role_of(runner) == _WEIGHT_CACHE:
        return None  # Its settings are those of an engine beside it.
    sizes = [_decided(runner, "get_parallel", name) for name in ("tp_size", "pp_size")]
    if _decided(runner, "get_parallel", "enable_dp_attention") is not True:
        sizes.append(_decided(runner, "get_parallel", "dp_size"))
    # Releases that have no such setting have one of each.
    known = [1 if size is None else size for size in sizes]
    return math.prod(known) if all(type(size) is int for size in known) else None


def _load_settings(runner: Any) -> dict[str, str]:
    """What was not given is SGLang's own choice, which follows from the rest and the device."""
    given = {name: server_setting(runner, name) for name in _LOAD_SETTINGS}
    return {name: str(value) for name, value in given.items() if value not in (None, False, "")}


def _url(runner: Any) -> str:
    """As ``ServerArgs.url`` has it; of an address that stands for all of them, this host's own."""
    port = server_setting(runner, "port")
    if not port or role_of(runner) == _WEIGHT_CACHE:
        return ""
    host = str(server_setting(runner, "host") or "")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    scheme = "https" if server_setting(runner, "ssl_certfile") else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _size(runner: Any, name: str) -> int | None:
    value = server_setting(runner, name)
    return value if isinstance(value, int) else None


def budget_of(runner: Any, free_before_load: float | None) -> MemoryBudget:
    """What SGLang made the size of its KV pool from.

    ``free_before_load``: in GiB, as SGLang counts, where the runner does not keep it (until 0.5.9).
    """
    fraction = getattr(runner, "mem_fraction_static", None)
    free = getattr(runner, "pre_model_load_memory", free_before_load)
    limit = server_setting(runner, "max_total_tokens")
    return MemoryBudget(
        fraction=float(fraction) if isinstance(fraction, float | int) else None,
        before_load=int(free * 2**30) if isinstance(free, float | int) else None,
        token_limit=limit if isinstance(limit, int) else None,
    )


def cpu_packing() -> str:
    """What SGLang packs weights for on this CPU, which takes its kernels for CPUs as well
    (``cpu_has_amx_support``, by which ``layers/amx_utils.py`` goes)."""
    has_amx = getattr(sys.modules.get("sglang.srt.utils"), "cpu_has_amx_support", None)
    return "AMX" if has_amx is not None and has_amx() else ""
