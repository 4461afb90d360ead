# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``advise``: how much memory was really free, and what it could be.

SGLang sizes its KV pool as what is free after the weights were loaded, less
(1 - ``--mem-fraction-static``) of what was free before (read in 0.5.9, 0.5.17 and 0.5.23). So one
more byte of pool is one byte in the second term, whatever else the pool has to share with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts, RankOnGpu
from sglang_weight_exporter.export.nvml import Nvml
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Bytes that stay free where nobody says otherwise.
KEEP = 2**30

#: Of the fraction, as people write it; SGLang takes any.
_STEP = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "For each engine of this user on this host: what was free at the worst moment "
        "on its fullest GPU, how many tokens of KV that is, which --mem-fraction-static would use "
        "it, and what a replica, a draft or more adapters would cost."
    )
    add_flags(parser, "runtime_dir")
    parser.add_argument(
        "--prometheus",
        metavar="URL",
        help="a Prometheus that scrapes this exporter, asked for the worst moment; without it, the "
        "peaks that torch has kept since each engine started",
    )
    parser.add_argument(
        "--range", default="7d", help="how far back to look in Prometheus (default: 7d)"
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=KEEP,
        metavar="BYTES",
        help="bytes that are to stay free at the worst moment (default: 1 GiB)",
    )
    parser.set_defaults(run=run)


class UnanswerableError(Exception):
    """What is missing, as a sentence."""


def run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, os.environ)
    runtime_dir = RuntimeDir.find(settings.runtime_dir, os.environ)
    snapshots = [each for _, each in SnapshotReader(runtime_dir).read()]
    accounts = GpuAccounts().read(snapshots, Nvml().read(), time.monotonic())
    most_used: Callable[[GpuAccount], int] = _peaks
    if arguments.prometheus:

        def most_used(account: GpuAccount) -> int:
            return _from_prometheus(arguments.prometheus, arguments.range, account.gpu.uuid)

    engines: dict[str, list[tuple[RankOnGpu, GpuAccount]]] = {}
    for account in accounts:
        for rank in account.ranks:
            engines.setdefault(rank.snapshot.engine.name, []).append((rank, account))
    if not engines:
        print(
            "No engine with memory of an NVIDIA GPU is alive here, so there is nothing to advise. "
            "`sglang-weight-exporter status` says which ranks there are.",
            file=sys.stderr,
        )
        return 1
    try:
        for name, ranks in sorted(engines.items()):
            advices = [advice(rank, account, most_used(account)) for rank, account in ranks]
            worst = min(advices, key=lambda each: each.room)
            print("\n".join(lines(name, worst, len(ranks), arguments.keep)))
            print()
    except UnanswerableError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        "The worst moment is "
        + (
            f"the most in use in {arguments.range} by {arguments.prometheus}, looked at once a "
            "second."
            if arguments.prometheus
            else "what torch's peaks since the start add to what is in use now, as if those of "
            "all engines of a GPU came together. What libraries outside of torch needed for a "
            "moment is not in it; --prometheus URL knows more."
        )
    )
    return 0


@dataclass(frozen=True)
class Advice:
    """Of one rank on its GPU."""

    rank: RankOnGpu
    gpu: GpuAccount
    #: Bytes that nobody had at the worst moment.
    room: int
    #: Of all KV pools of the rank, for one token; ``None`` without a pool.
    token_bytes: float | None
    tokens: int | None


def advice(rank: RankOnGpu, account: GpuAccount, most_used: int) -> Advice:
    """``most_used``: bytes of the GPU at the worst moment that was seen."""
    gpu = account.gpu
    used = max(gpu.used_bytes, most_used)
    token_bytes, tokens = _tokens(rank.snapshot, rank.memory.device)
    return Advice(
        rank, account, gpu.total_bytes - (gpu.reserved_bytes or 0) - used, token_bytes, tokens
    )


def suggested(advice: Advice, keep: int) -> tuple[float, int] | None:
    """The fraction that leaves ``keep`` bytes, and the tokens it gives; ``None``: not known."""
    budget = advice.rank.snapshot.budget
    if not (budget.fraction and budget.before_load and advice.token_bytes and advice.tokens):
        return None
    exact = budget.fraction + (advice.room - keep) / budget.before_load
    fraction = min(math.floor(exact * _STEP) / _STEP, 1 - 1 / _STEP)
    more = (fraction - budget.fraction) * budget.before_load / advice.token_bytes
    return fraction, int(advice.tokens + more)


def lines(engine: str, advice: Advice, ranks: int, keep: int) -> list[str]:
    """What is said of an engine; its worst rank stands for all, as the pool is cut to it."""
    rank, gpu = advice.rank, advice.gpu.gpu
    snapshot = rank.snapshot
    found = [
        f"engine {engine}  ({snapshot.engine.model_name}, SGLang {snapshot.engine.sglang_version}, "
        f"{ranks} rank{'s' * (ranks > 1)})",
        f"  worst rank      {snapshot.ranks} on GPU {gpu.index}, {gpu.uuid}",
        f"  free at worst   {advice.room:,} bytes of {gpu.total_bytes:,}",
    ]
    others = len(advice.gpu.ranks) - 1
    if others:
        found.append(f"                  shared with {others} more rank{'s' * (others > 1)}")
    if advice.token_bytes:
        found.append(
            f"  as KV           {max(0, int(advice.room / advice.token_bytes)):,} tokens of "
            f"{advice.token_bytes:,.0f} bytes; the pool has {advice.tokens:,}"
        )
    found += _of_fraction(advice, keep)
    found += _costs(advice)
    return found


def _of_fraction(advice: Advice, keep: int) -> list[str]:
    budget = advice.rank.snapshot.budget
    new = suggested(advice, keep)
    if new is None:
        return [
            "  fraction        not known: this release does not say what was free before the load, "
            "or there is no pool of tokens"
        ]
    fraction, tokens = new
    found = [
        f"  fraction        --mem-fraction-static {fraction:.3f} instead of {budget.fraction:.3f} "
        f"would give {tokens:,} tokens and leave {keep:,} bytes free"
    ]
    if fraction <= 0 or tokens <= 0:
        found[0] = (
            f"  fraction        none: to keep {keep:,} bytes free, something else has to go first"
        )
    if budget.token_limit is not None and budget.token_limit < tokens:
        found.append(
            f"                  but --max-total-tokens {budget.token_limit:,} limits the pool: the "
            "fraction matters only below it"
        )
    return found


def _costs(advice: Advice) -> list[str]:
    snapshot, memory = advice.rank.snapshot, advice.rank.memory
    found = []
    if advice.rank.used is not None:
        fits = "fits" if advice.rank.used <= advice.room else "does not fit"
        found.append(
            f"  one replica     {advice.rank.used:,} bytes as this rank has them now: {fits}"
        )
    else:
        found.append(
            f"  one replica     {memory.physical:,} bytes in torch, and what the process has "
            "beside it, which is not known: the driver does not show which process it is"
        )
    for role in snapshot.roles:
        if role.name.startswith("draft"):
            weights = [each.nbytes for each in role.weights or () if each.device == memory.device]
            pools = [each.nbytes for each in role.kv_pools or () if each.device == memory.device]
            found.append(
                f"  {role.name:<15} {sum(weights):,} bytes of weights and {sum(pools):,} of KV "
                "pool now; a larger one takes what it has more of both"
            )
    if advice.token_bytes:
        found.append(
            f"  1 GiB of draft  {int(2**30 / advice.token_bytes):,} tokens less, and the draft's "
            "own share of the KV pool besides"
        )
    for role in snapshot.roles:
        for lora in role.lora:
            if lora.device == memory.device and lora.slots:
                each = lora.nbytes // lora.slots
                found.append(
                    f"  one adapter     {each:,} bytes more in --max-loras-per-batch, of the same "
                    f"rank and modules; {max(0, advice.room // each):,} fit"
                )
    if memory.parts is None:
        found.append(f"  not known       what torch's memory holds: {memory.reason}")
    return found


def _tokens(snapshot: Snapshot, device: str) -> tuple[float | None, int | None]:
    """Bytes of a token in all pools of the device, and how many there are room for."""
    pools = [
        pool for role in snapshot.roles for pool in role.kv_pools or () if pool.device == device
    ]
    counts = [pool.tokens for pool in pools if pool.pool in {"full", "unified"} and pool.tokens]
    if not counts:
        return None, None
    return sum(pool.nbytes for pool in pools) / max(counts), max(counts)


def _peaks(account: GpuAccount) -> int:
    """What is in use now and what torch once had more of."""
    return account.gpu.used_bytes + sum(
        max(0, rank.memory.reserved_peak - rank.memory.reserved + rank.memory.released)
        for rank in account.ranks
    )


def _from_prometheus(url: str, span: str, uuid: str) -> int:
    """Raises :class:`UnanswerableError`."""
    query = f'max(max_over_time(sglang_gpu_memory_used_max_bytes{{gpu_uuid="{uuid}"}}[{span}]))'
    address = f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    if urllib.parse.urlsplit(address).scheme not in {"http", "https"}:
        raise UnanswerableError(f"{url} is no address of a Prometheus: give http:// or https://.")
    try:
        with urllib.request.urlopen(address, timeout=60) as response:  # noqa: S310
            answer = json.load(response)
        found = answer["data"]["result"]
    except urllib.error.HTTPError as error:
        raise UnanswerableError(
            f"{url} refused the question ({error.read(500).decode(errors='replace')})."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnanswerableError(f"{url} gave no answer that could be read ({error}).") from error
    if not found:
        raise UnanswerableError(
            f"{url} has no sglang_gpu_memory_used_max_bytes of {uuid} in {span}: does it scrape "
            "this exporter?"
        )
    return int(float(found[0]["value"][1]))
