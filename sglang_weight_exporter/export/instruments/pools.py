# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""KV pools and the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_weight_exporter.export.instruments.base import (
    Instrument,
    RoleReader,
    Sample,
    by_device,
    one,
)
from sglang_weight_exporter.export.views import RoleView
from sglang_weight_exporter.records.pools import PAUSES, CacheCounts


def _cache(read: Callable[[CacheCounts], float | None]) -> RoleReader:
    def samples(view: RoleView) -> Iterator[Sample]:
        if view.is_target and view.snapshot.cache is not None:
            yield from one(read(view.snapshot.cache))

    return samples


def _pauses(view: RoleView) -> Iterator[Sample]:
    if view.is_target and view.snapshot.cache is not None:
        for how in PAUSES:
            if count := view.snapshot.cache.pauses.get(how, 0):
                yield Sample((how,), count)


def _kv_bytes(view: RoleView) -> Iterator[Sample]:
    for pool in view.role.kv_pools or ():
        yield Sample((pool.pool,), pool.nbytes, pool.device)


def _kv_tokens(view: RoleView) -> Iterator[Sample]:
    for pool in view.role.kv_pools or ():
        if pool.tokens is not None:
            yield Sample((pool.pool,), pool.tokens, pool.device)


INSTRUMENTS = (
    Instrument(
        "sglang_kv_pool_bytes",
        "gauge",
        "By",
        "Bytes of unique storages of the KV pools.",
        ("pool",),
        _kv_bytes,
    ),
    Instrument(
        "sglang_kv_pool_resident_bytes",
        "gauge",
        "By",
        "Bytes of KV pools backed by physical memory now; less what is released.",
        read_role=lambda view: by_device(view.role.kv_resident),
    ),
    Instrument(
        "sglang_kv_pool_tokens",
        "gauge",
        "{token}",
        "Capacity of the KV pools in tokens.",
        ("pool",),
        _kv_tokens,
    ),
    Instrument(
        "sglang_kv_cache_flushes",
        "counter",
        "{flush}",
        "Flushes of the prefix cache.",
        read_role=_cache(lambda cache: cache.flushes),
        preset="full",
    ),
    Instrument(
        "sglang_kv_cache_flush_failures",
        "counter",
        "{flush}",
        "Flushes that SGLang refused, because requests were running or queued.",
        read_role=_cache(lambda cache: cache.failures),
        preset="full",
    ),
    Instrument(
        "sglang_kv_cache_flushed_timestamp_seconds",
        "gauge",
        "s",
        "When the prefix cache was last flushed, in Unix time. Absent before the first flush.",
        read_role=_cache(lambda cache: cache.flushed_at),
        preset="full",
    ),
    Instrument(
        "sglang_kv_cache_stale",
        "gauge",
        "",
        "1 while the prefix cache holds tokens computed by weights that are gone, else 0. Absent "
        "where the cache could not be read.",
        read_role=_cache(lambda cache: None if cache.stale is None else float(cache.stale)),
    ),
    Instrument(
        "sglang_kv_cache_pauses",
        "counter",
        "{pause}",
        "Orders to pause generation, by what becomes of running requests: they keep their cache "
        "(in_place), are computed again (retract), or are all aborted (abort).",
        ("mode",),
        _pauses,
    ),
    Instrument(
        "sglang_kv_cache_paused",
        "gauge",
        "",
        "1 while generation is paused and its requests wait (in_place, retract), else 0.",
        read_role=_cache(lambda cache: float(cache.paused)),
    ),
)
