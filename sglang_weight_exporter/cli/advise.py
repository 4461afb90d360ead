# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``advise``: how much memory was really free, and what it could be.

SGLang sizes its KV pool as what is free after the weights were loaded, less
(1 - ``--mem-fraction-static``) of what was free before (read in 0.5.9, 0.5.17 and 0.5.23). So one
more byte of pool is one byte in the second term, whatever else the pool has to share with.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.cli.worst_moment import (
    Worst,
    duration,
    from_prometheus,
    seconds_of,
    since_the_start,
)
from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts, RankOnGpu
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.nvml import GpuMemory, Nvml
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Bytes that stay free where nobody says otherwise.
KEEP = 2**30

#: Of the fraction, as people write it; SGLang takes any.
_STEP = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "For each engine of this user on this host: what was free at the worst moment since it "
        "started, on its fullest GPU, how many tokens of KV that is, which --mem-fraction-static "
        "would use it, and what a replica, a draft or more adapters would cost. Exit status: 0, 1 "
        "when there is nothing to advise, 2 when the question cannot be answered."
    )
    add_flags(parser, "runtime_dir")
    parser.add_argument(
        "--prometheus",
        metavar="URL",
        help="a Prometheus that scrapes this exporter, asked for the worst moment; without it, the "
        "peaks that torch has kept since each engine started",
    )
    parser.add_argument(
        "--range",
        type=seconds_of,
        default=7 * 86400,
        metavar="DURATION",
        help="how far back to ask Prometheus, as 12h or 30d, and never further than the start of "
        "the engine (default: 7d)",
    )
    parser.add_argument(
        "--keep",
        type=_bytes,
        default=KEEP,
        metavar="BYTES",
        help="bytes that are to stay free at the worst moment (default: 1 GiB)",
    )
    parser.set_defaults(run=run)


def _bytes(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes such as 1073741824")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, os.environ)
    runtime_dir = RuntimeDir.find(settings.runtime_dir, os.environ)
    snapshots = [each for _, each in SnapshotReader(runtime_dir).read()]
    nvml = Nvml(Guard())
    of_host = _of_host(snapshots)
    gpus = [of_host.get(each.uuid, each) for each in nvml.read()]
    gpus = [each for each in gpus if each.used_bytes is not None]
    accounts = GpuAccounts().read(snapshots, gpus, time.monotonic())

    def worst(account: GpuAccount) -> Worst:
        if arguments.prometheus is None or account.gpu.uuid in of_host:
            return since_the_start(account)
        return from_prometheus(arguments.prometheus, arguments.range, account, time.time())

    advices: dict[str, list[Advice]] = {}
    for account in accounts:
        for rank in account.ranks:
            advices.setdefault(rank.snapshot.engine.name, []).append(
                advice(rank, account, worst(account))
            )
    unmeasured = _unmeasured(snapshots, accounts)
    for name, found in sorted(advices.items()):
        # SGLang cuts the pool of all ranks to that of the worst.
        for line in lines(
            name, min(found, key=lambda each: each.share), len(found), arguments.keep
        ):
            print_line(line)
        print()
    for snapshot, memory in unmeasured:
        for line in _of_torch(snapshot, memory, nvml.problem):
            print_line(line)
        print()
    if not (advices or unmeasured):
        print(
            "No engine with memory of an NVIDIA GPU is alive here, so there is nothing to advise. "
            "`sglang-weight-exporter status` says which ranks there are.",
            file=sys.stderr,
        )
        return 1
    if advices:
        print(_source(arguments.prometheus))
    return 0


def _source(prometheus: str | None) -> str:
    if prometheus:
        return (
            f"The worst moment is the most in use, looked at once a second, that {prometheus} has "
            "seen since the engines of the GPU were started as they are, while no other was on it "
            "and none had its memory released."
        )
    return (
        "The worst moment is what torch's peaks since the start add to what is in use now, as if "
        "those of all engines of a GPU came together. What libraries outside of torch needed for a "
        "moment is not in it; --prometheus URL knows more."
    )


@dataclass(frozen=True)
class Advice:
    """Of one rank on its GPU."""

    rank: RankOnGpu
    gpu: GpuAccount
    #: Bytes that nobody had at the worst moment.
    room: int
    #: Seconds of it; ``None``: since the start.
    seconds: int | None
    #: Of all KV pools of the rank, for one token; ``None`` without a pool.
    token_bytes: float | None
    tokens: int | None

    @property
    def share(self) -> int:
        """Of the room, where several ranks are on the GPU."""
        return self.room // len(self.gpu.ranks)

    @property
    def started_before(self) -> int:
        """Ranks on the GPU that took their pool before this one."""
        mine = self.rank.snapshot
        return sum(
            (each.snapshot.started_at, each.snapshot.rank_id) < (mine.started_at, mine.rank_id)
            for each in self.gpu.ranks
        )


def advice(rank: RankOnGpu, account: GpuAccount, worst: Worst) -> Advice:
    """``account``: of a GPU whose memory the driver says."""
    gpu = account.gpu
    assert gpu.total_bytes is not None
    assert gpu.used_bytes is not None
    used = max(gpu.used_bytes, worst.used)
    token_bytes, tokens = _tokens(rank.snapshot, rank.memory.device)
    room = gpu.total_bytes - (gpu.reserved_bytes or 0) - used
    return Advice(rank, account, room, worst.seconds, token_bytes, tokens)


def suggested(advice: Advice, keep: int) -> tuple[float, int] | None:
    """The fraction that leaves ``keep`` bytes, and the tokens it gives; ``None``: not known.

    Of several ranks on a GPU each gets the same. Those that start before this one then leave it
    less to start from.
    """
    budget = advice.rank.snapshot.budget
    if not (budget.fraction and budget.before_load and advice.token_bytes and advice.tokens):
        return None
    share = (advice.room - keep) // len(advice.gpu.ranks)
    before = budget.before_load - share * advice.started_before
    if before <= 0:
        return 0.0, 0
    left = (1 - budget.fraction) * budget.before_load - share * (advice.started_before + 1)
    exact = 1 - left / before
    fraction = min(math.floor(exact * _STEP) / _STEP, 1 - 1 / _STEP)
    more = share - (exact - fraction) * before
    return fraction, int(advice.tokens + more / advice.token_bytes)


def lines(engine: str, advice: Advice, ranks: int, keep: int) -> list[str]:
    """What is said of an engine; its worst rank stands for all, as the pool is cut to it."""
    rank, gpu = advice.rank, advice.gpu.gpu
    seen = "" if advice.seconds is None else f", in {duration(advice.seconds)}"
    found = [
        _title(engine, rank.snapshot, ranks),
        f"  worst rank      {rank.snapshot.ranks} on GPU {gpu.index}, {gpu.uuid}",
        f"  free at worst   {advice.room:,} bytes of {gpu.total_bytes:,}{seen}",
    ]
    if _is_integrated(advice.rank.snapshot, gpu.uuid):
        found.append(
            "                  of the host's memory, which is this GPU's: SGLang reckons with what "
            "the host has available when it starts, and so does this, with what it has now"
        )
    together = len(advice.gpu.ranks)
    if together > 1:
        engines = sorted({each.snapshot.engine.name for each in advice.gpu.ranks})
        found.append(
            f"                  shared by {together} ranks (of {' and '.join(engines)}), "
            f"{advice.share:,} bytes each: what follows holds if all are changed, and started in "
            "the same order"
        )
    if advice.token_bytes:
        found.append(
            f"  as KV           {max(0, int(advice.share / advice.token_bytes)):,} tokens of "
            f"{advice.token_bytes:,.0f} bytes; the pool has {advice.tokens:,}"
        )
    found += _of_fraction(advice, keep)
    found += _costs(advice)
    return found


def _title(engine: str, snapshot: Snapshot, ranks: int) -> str:
    return (
        f"engine {engine}  ({snapshot.engine.model_name}, SGLang {snapshot.engine.sglang_version}, "
        f"{ranks} rank{'s' * (ranks > 1)})"
    )


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


# GPUs of which the driver does not say how much memory they have.


def _unmeasured(
    snapshots: Iterable[Snapshot], accounts: Iterable[GpuAccount]
) -> list[tuple[Snapshot, DeviceMemory]]:
    known = {
        (rank.snapshot.rank_id, rank.memory.device)
        for account in accounts
        for rank in account.ranks
    }
    return [
        (snapshot, memory)
        for snapshot in sorted(snapshots, key=lambda each: each.order)
        for memory in snapshot.memory
        if (snapshot.rank_id, memory.device) not in known
    ]


def _of_torch(snapshot: Snapshot, memory: DeviceMemory, problem: str) -> list[str]:
    """``problem``: why NVML knows no GPU at all."""
    token_bytes, tokens = _tokens(snapshot, memory.device)
    found = [
        _title(snapshot.engine.name, snapshot, 1),
        f"  rank            {snapshot.ranks} on {memory.device}",
        f"  in torch        {memory.physical:,} bytes, {memory.reserved_peak:,} at its peak",
    ]
    if token_bytes:
        found.append(f"  KV pool         {tokens:,} tokens of {token_bytes:,.0f} bytes")
    if problem:
        return [
            *found,
            f"  not known       what was free at worst: NVML cannot be read ({problem}). No "
            "fraction is advised.",
        ]
    available = _host_memory()
    if available is not None:
        found.append(f"  host's memory   {available[1]:,} bytes available now")
    found.append(
        "  not known       what was free at worst: the driver does not say how much memory this "
        "GPU has in use, or does not know this GPU here. No fraction is advised."
    )
    return found


# GPUs whose memory is the host's.


def _of_host(snapshots: Iterable[Snapshot]) -> dict[str, GpuMemory]:
    """Each of them by its UUID, with the host's memory in place of what no driver says. SGLang does
    the same: ``get_available_gpu_memory`` asks the host there (read in 0.5.23)."""
    host = _host_memory()
    if host is None:
        return {}
    total, available = host
    return {
        device.uuid: GpuMemory(device.uuid, 0, total, total - available)
        for snapshot in snapshots
        for device in snapshot.devices
        if device.integrated
    }


def _is_integrated(snapshot: Snapshot, uuid: str) -> bool:
    return any(each.integrated for each in snapshot.devices if each.uuid == uuid)


def _host_memory() -> tuple[int, int] | None:
    """All of it, and what is available, as the kernel reckons that."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", file.read(), re.MULTILINE))
        return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return None
