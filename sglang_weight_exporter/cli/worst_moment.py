# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The most that was in use of a GPU: by torch's peaks, or by what Prometheus has kept."""

from __future__ import annotations

import argparse
import http.client
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

import msgspec

from sglang_weight_exporter.cli.choice import CommandError
from sglang_weight_exporter.export.gpu_account import GpuAccount

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


@dataclass(frozen=True)
class Worst:
    """The most that was in use of a GPU, and for how long it was watched."""

    used: int
    seconds: int | None = None


def since_the_start(account: GpuAccount) -> Worst:
    """What is in use now and what torch once had more of."""
    assert account.gpu.used_bytes is not None
    return Worst(
        account.gpu.used_bytes
        + sum(
            max(0, rank.memory.reserved_peak - rank.memory.reserved + rank.memory.released)
            for rank in account.ranks
        )
    )


class _Sample(msgspec.Struct):
    value: tuple[float, str]


class _Data(msgspec.Struct):
    result: list[_Sample]


class _Answer(msgspec.Struct):
    data: _Data


def most_used_query(uuid: str, seconds: int) -> str:
    """The most that was in use of a GPU while it had the engines that it has now, and none had its
    memory released: what another process takes meanwhile it gives back. The gauge is of the last
    minute, so what was so within that counts too."""
    gpu = f'{{gpu_uuid="{uuid}"}}'
    there = f"sglang_weight_loaded_timestamp_seconds{gpu}"
    count = "count(count by (engine, role, tp_rank, pp_rank, dp_rank)"
    others = f"{count} (max_over_time({there}[2m]))) != {count} ({there} @ end()))"
    released = " or ".join(
        f"max(max_over_time({metric}{gpu}[2m])) > 0"
        for metric in ("sglang_rank_memory_released_bytes", "sglang_gpu_memory_resume_bytes")
    )
    return (
        f"max(max_over_time((max(sglang_gpu_memory_used_max_bytes{gpu}) unless on () "
        f"({released}) unless on () ({others}))[{seconds}s:30s]))"
    )


def from_prometheus(url: str, span: int, account: GpuAccount, now: float) -> Worst:
    """Since the youngest engine of the GPU was started: before, it was shared in another way, and
    whoever was there and left is in what Prometheus has.
    Raises :class:`CommandError`."""
    started = max(rank.snapshot.started_at for rank in account.ranks)
    # The first minute still has what was there before.
    seconds = min(span, int(now - started) - 60)
    if seconds < 60:
        return since_the_start(account)
    query = urllib.parse.urlencode({"query": most_used_query(account.gpu.uuid, seconds)})
    address = f"{url.rstrip('/')}/api/v1/query?{query}"
    if urllib.parse.urlsplit(address).scheme not in {"http", "https"}:
        raise CommandError(f"{url} is no address of a Prometheus: give http:// or https://.")
    try:
        with urllib.request.urlopen(address, timeout=60) as response:  # noqa: S310
            found = msgspec.json.decode(response.read(), type=_Answer).data.result
        most = [float(each.value[1]) for each in found]
        if not all(map(math.isfinite, most)):
            raise ValueError(f"{most[0]} is no number of bytes")
    except urllib.error.HTTPError as error:
        raise CommandError(
            f"{url} refused the question ({error.read(500).decode(errors='replace')})."
        ) from error
    except (OSError, ValueError, msgspec.DecodeError, http.client.HTTPException) as error:
        raise CommandError(f"{url} gave no answer that could be read ({error}).") from error
    if not most:
        raise CommandError(
            f"{url} has no sglang_gpu_memory_used_max_bytes of {account.gpu.uuid} in the last "
            f"{duration(seconds)} in which no memory was released and no other engine was there: "
            "does it scrape this exporter?"
        )
    return Worst(int(most[0]), seconds)


# Durations, as Prometheus writes them.


def seconds_of(text: str) -> int:
    parts = re.fullmatch(
        r"(?:(\d+)y)?(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text
    )
    found = (
        0
        if parts is None
        else sum(
            int(number or 0) * _UNITS[unit]
            for number, unit in zip(parts.groups(), ("y", "w", "d", "h", "m", "s"), strict=True)
        )
    )
    if not 0 < found < 10**10:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 90m, 12h or 7d")
    return found


def duration(seconds: int) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"
