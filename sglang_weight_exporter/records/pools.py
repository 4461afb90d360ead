# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""KV pools, the prefix cache and adapter slots."""

from __future__ import annotations

from typing import Literal, get_args

from sglang_weight_exporter.records.base import Count, DeviceName, Record, Seconds


class KvPoolUsage(Record, frozen=True, kw_only=True):
    """Bytes and capacity of one KV pool on one device."""

    device: DeviceName
    pool: str
    nbytes: Count
    #: Capacity in tokens; ``None`` for state pools (Mamba), which hold requests, not tokens.
    tokens: Count | None = None


class LoraUsage(Record, frozen=True, kw_only=True):
    """Preallocated adapter slots on one device, and adapters that are loaded."""

    device: DeviceName
    nbytes: Count
    adapters: Count
    #: How many can be on the device at a time; ``None``: not known.
    slots: Count | None = None


#: How generation is interrupted: the running requests stay as they are and go on with what they
#: have in the cache; they go back to the queue and are computed again; all of them are aborted.
Pause = Literal["in_place", "retract", "abort"]
PAUSES: tuple[Pause, ...] = get_args(Pause)


class CacheCounts(Record, frozen=True, kw_only=True):
    """The prefix cache of a scheduler: what became of its keys and values as weights changed."""

    flushes: Count = 0
    #: Flushes that SGLang refused, because requests were running or queued.
    failures: Count = 0
    flushed_at: Seconds | None = None
    #: Whether it holds tokens that weights have computed which are gone; ``None``: not known.
    stale: bool | None = False
    pauses: dict[Pause, Count] = {}
    #: Between an order to pause that keeps its requests and the one to continue.
    paused: bool = False
