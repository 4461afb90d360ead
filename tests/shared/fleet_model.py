# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet that never was: what its exporters would have served, as promtool's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import yaml
from monitoring import RULES

MINUTE, HOUR, DAY = 60, 3600, 86400
GIB = 1 << 30

#: Begin and end in seconds since the model's start.
Span = tuple[float, float]
#: What a series is at a second; None where it is absent.
Value = Callable[[float], float | None]


def every(period: float, first: float, last: float, takes: float) -> list[Span]:
    """Spans at a steady rhythm."""
    count = int((last - first) // period) + 1
    return [(first + period * number, first + period * number + takes) for number in range(count)]


def inside(spans: Sequence[Span], second: float) -> bool:
    return any(begin <= second < end for begin, end in spans)


def ended(spans: Sequence[Span], second: float) -> int:
    return sum(end <= second for _, end in spans)


def counted(spans: Sequence[Span]) -> Value:
    """A counter of those that have ended."""
    return lambda second: ended(spans, second)


@dataclass
class Fleet:
    """Scraped every `step` seconds until `until`."""

    until: float
    step: int = 60
    series: dict[str, list[float | None]] = field(default_factory=dict)

    def put(self, name: str, labels: dict[str, str], value: Value) -> None:
        """One series; what is put twice is the larger of both."""
        pairs = ",".join(f'{label}="{text}"' for label, text in labels.items() if text)
        key = f"{name}{{{pairs}}}"
        new = [value(number * self.step) for number in range(int(self.until // self.step) + 1)]
        old = self.series.get(key, [None] * len(new))
        self.series[key] = [
            max((each for each in pair if each is not None), default=None)
            for pair in zip(old, new, strict=True)
        ]

    def test(self, *expectations: dict[str, Any], evaluated: int = 60) -> str:
        """A file for `promtool test rules`."""
        rows = [{"series": key, "values": notation(v)} for key, v in self.series.items()]
        scenario = {
            "interval": f"{self.step}s",
            "input_series": rows,
            "promql_expr_test": list(expectations),
        }
        return yaml.safe_dump(
            {
                "rule_files": [str(RULES)],
                "evaluation_interval": f"{evaluated}s",
                "tests": [scenario],
            },
            width=10**9,
        )

    def fired(self, alerts: set[str]) -> dict[str, Any]:
        """That these alerts, no other, fired at any time; what only informs is left out."""
        window = f"{int(self.until)}s"
        firing = f'ALERTS{{alertstate="firing",severity!="info"}}[{window}]'
        return {
            "expr": f"group by (alertname) (count_over_time({firing}))",
            "eval_time": window,
            "exp_samples": [
                {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)
            ],
        }

    def firing(self, minute: int, *alerts: str) -> dict[str, Any]:
        """That these alerts fire in this minute, and no other that does more than inform."""
        return {
            "expr": 'group by (alertname) (ALERTS{alertstate="firing",severity!="info"})',
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)
            ],
        }


def notation(values: Sequence[float | None]) -> str:
    """promtool's: `1x3` is four times 1, `stale` ends a series, `_` is a missing sample."""
    parts: list[str] = []
    for value, run in groupby(values):
        count = len(list(run))
        if value is None:
            parts += ["stale"] if parts else ["_"]
            parts += [f"_x{count - 1}"] if count > 1 else []
        else:
            parts.append(f"{value:.17g}x{count - 1}" if count > 1 else f"{value:.17g}")
    return " ".join(parts)


@dataclass
class Engine:
    """What one exporter serves of one engine. Seconds are the model's, loads may lie before it."""

    instance: str
    model: str = "m"
    ranks: Sequence[int] = (0,)
    engine: str = "30000"
    roles: Sequence[str] = ("target",)
    labels: dict[str, str] = field(default_factory=dict)
    loaded: float = -7200
    ended: float | None = None
    """When it is gone; its pod with it, unless it is a static target."""
    static: bool = False
    scraped: Callable[[float], bool] = lambda second: True
    """False where the scrape fails."""
    clock: float = 0
    """How far the host's is ahead."""
    updates: Sequence[Span] = ()
    of_rank: Mapping[tuple[int, str], Sequence[Span]] = field(default_factory=dict)
    """Updates of a rank and role that are others."""
    failures: Sequence[Span] = ()
    open: Sequence[Span] = ()
    """Updates that have not ended when they are seen last."""
    source: str = "distributed"
    version: Callable[[float], str] = lambda second: "default"
    released: Sequence[Span] = ()
    used: Value | None = None
    """Bytes in use on its GPU, of 140 GiB."""
    weights: float = 34 * GIB
    tokens: float = 700_000
    stale: Sequence[Span] = ()
    paused: Sequence[Span] = ()
    in_place: bool = False
    fingerprint: Value | None = None
    group: str = ""
    node_rank: int = 0
    nodes: int = 1
    expected: int | None = None
    """Ranks of the whole engine, where those of this host are not all."""

    def serve(self, fleet: Fleet) -> None:
        """Put all of it into the fleet."""
        target = {"instance": self.instance, "job": "weights", **self.labels}
        begin = max(0.0, self.loaded)

        def alive(second: float) -> bool:
            return begin <= second and (self.ended is None or second < self.ended)

        def up(second: float) -> float | None:
            if not alive(second):
                return 0 if self.static else None
            return float(self.scraped(second))

        fleet.put("up", target, up)
        self._seen: Callable[[float], bool] = lambda s: alive(s) and self.scraped(s)
        host = {**target, "version": "0.1.0", "simulated": "false"}
        self._put(fleet, "sglang_weight_exporter_build_info", host, lambda second: 1)
        for rank in self.ranks:
            for role in self.roles:
                self._serve_role(fleet, target, rank, role)

    def _put(self, fleet: Fleet, name: str, labels: dict[str, str], value: Value) -> None:
        fleet.put(name, labels, lambda second: value(second) if self._seen(second) else None)

    def _serve_role(self, fleet: Fleet, target: dict[str, str], rank: int, role: str) -> None:
        identity = {
            **target,
            "model_name": self.model,
            "engine": self.engine,
            "role": role,
            "tp_rank": str(rank),
            "pp_rank": "0",
            "device": f"cuda:{rank}",
            "gpu_uuid": f"GPU-{self.instance}-{rank}",
        }
        updates = self.of_rank.get((rank, role), self.updates)
        busy = [*updates, *self.failures, *self.open]

        def put(name: str, value: Value, **more: str) -> None:
            self._put(fleet, name, {**identity, **more}, value)

        loaded, clock = self.loaded, self.clock
        put("sglang_weight_loaded_timestamp_seconds", lambda second: loaded + clock)
        put(
            "sglang_weight_last_update_timestamp_seconds",
            lambda second: max([loaded, *(e for _, e in updates if e <= second)]) + clock,
        )
        put(
            "sglang_weight_last_update_start_timestamp_seconds",
            lambda second: max([loaded - 30, *(b for b, e in updates if e <= second)]) + clock,
        )
        put(
            "sglang_weight_last_update_duration_seconds",
            lambda second: next((e - b for b, e in reversed(updates) if e <= second), None),
        )
        put("sglang_weight_update_in_progress", lambda second: float(inside(busy, second)))
        self._serve_counters(put, updates)
        if updates:
            put(
                "sglang_weight_update_bytes_total",
                lambda second: (self.weights * ended(updates, second)) or None,
                source=self.source,
            )
        put("sglang_weight_bytes", lambda s: self.weights, kind="parameter", dtype="bfloat16")
        put(
            "sglang_weight_resident_bytes",
            lambda second: 1000 if inside(self.released, second) else self.weights,
        )
        put("sglang_weight_info", lambda second: 1, tp_size=str(len(self.ranks)), gpu_name="H200")
        put("sglang_weight_engine_info", lambda second: 1, nodes=str(self.nodes))
        if self.fingerprint is not None:
            put("sglang_weight_fingerprint", self.fingerprint)
        if role == self.roles[0]:
            self._serve_rank(put)
            if self.used is not None:
                gpu = {**target, "gpu": str(rank), "gpu_uuid": identity["gpu_uuid"]}
                self._serve_gpu(fleet, gpu, self.used)

    def _serve_gpu(self, fleet: Fleet, gpu: dict[str, str], used: Value) -> None:
        """While memory is released, 90 GiB of it are to come back."""

        def resume(second: float) -> float | None:
            return 90.0 * GIB if inside(self.released, second) else None

        self._put(fleet, "sglang_gpu_memory_total_bytes", gpu, lambda second: 140.0 * GIB)
        self._put(fleet, "sglang_gpu_memory_used_bytes", gpu, used)
        self._put(fleet, "sglang_gpu_memory_used_max_bytes", gpu, used)
        self._put(fleet, "sglang_gpu_memory_resume_bytes", gpu, resume)

    def _serve_counters(self, put: Callable[..., None], updates: Sequence[Span]) -> None:
        """By source: its own, and experts that are moved, of which there are none."""
        for source in {self.source, "eplb"}:
            had = updates if source == self.source else ()
            failed = self.failures if source == self.source else ()
            put("sglang_weight_updates_total", counted(had), source=source)
            put("sglang_weight_update_failures_total", counted(failed), source=source)

    def _serve_rank(self, put: Callable[..., None]) -> None:
        """What is a rank's and no role's."""
        put("sglang_weight_version_hash", lambda s: float(sum(self.version(s).encode()) % 9973))
        put("sglang_kv_pool_tokens", lambda second: self.tokens, pool="full")
        put("sglang_kv_cache_stale", lambda second: float(inside(self.stale, second)))
        put("sglang_kv_cache_paused", lambda second: float(inside(self.paused, second)))
        put("sglang_kv_cache_pauses_total", lambda second: float(self.in_place), mode="in_place")
        ranks = len(self.ranks) if self.expected is None else self.expected
        group = {"engine_group": self.group}
        put("sglang_weight_expected_ranks", lambda second: ranks, **group)
        if self.nodes > 1:
            labels = {**group, "node_rank": str(self.node_rank)}
            put("sglang_weight_engine_nodes", lambda second: self.nodes, **labels)
