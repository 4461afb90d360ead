# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether what comes next fits on a GPU: what is released comes back, and updates need room."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from sglang_weight_exporter.export.gpu_account import GpuAccount, GpuAccounts, RankOnGpu
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.nvml import Nvml
from sglang_weight_exporter.records.snapshot import Snapshot


def lines(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    """Of each GPU on which something was released, or an update needed more than there was."""
    snapshots = list(snapshots)
    if any(snapshot.memory for snapshot in snapshots):
        for account in GpuAccounts().read(snapshots, Nvml(Guard()).read(), time.monotonic()):
            yield from of_gpu(account)


def of_gpu(account: GpuAccount) -> Iterator[str]:
    ranks = [rank for rank in account.ranks if rank.memory.update_peak]
    found = [*_resume(account), *(f"  update    {_update(account, rank)}" for rank in ranks)]
    if found:
        free = "" if account.free is None else f": {account.free:,} bytes free"
        yield f"GPU {account.gpu.index}, {account.gpu.uuid}{free}"
        yield from found


def _resume(account: GpuAccount) -> Iterator[str]:
    if account.resume is None:
        reasons = {rank.memory.reason for rank in account.ranks if rank.memory.reason}
        if any(role.released for rank in account.ranks for role in rank.snapshot.roles):
            yield f"  resume    takes what is not known: {'; '.join(sorted(reasons))}"
    elif account.resume:
        yield f"  resume    takes {account.resume:,} bytes{_of(account.resume, account.free)}"


def _of(needed: int, room: int | None) -> str:
    if room is None:
        return ""
    return f", {needed - room:,} more than there are" if needed > room else ", and they fit"


def _update(account: GpuAccount, rank: RankOnGpu) -> str:
    """What was released in the update that needed most is so again in the next one, and what torch
    has cached it takes first."""
    memory = rank.memory
    needed = memory.update_peak or 0
    back = max(0, memory.update_peak_released - memory.released)
    cached = (memory.parts or {}).get("cached", 0)
    there = [
        f"{nbytes:,} {what}"
        for nbytes, what in (
            (account.free or 0, "free"),
            (cached, "in torch's cache"),
            (back, "that were released then"),
        )
        if nbytes
    ]
    who = f"engine {rank.snapshot.engine.name}, {rank.snapshot.ranks}"
    line = f"{who}: one has needed {needed:,} bytes more than torch had"
    if account.free is None:
        return line
    verdict = _of(needed, account.free + cached + back)
    return f"{line}{verdict}" + (f": {', '.join(there)}" if there else "")
