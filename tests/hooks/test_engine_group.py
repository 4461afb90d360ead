# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks of one engine on several hosts: a group of stand-ins that have, as ranks have once they
have met, an address and a random seed in common. A real one is in ``e2e/test_hosts.py``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from monitoring import Monitoring
from ranks import ExporterProcess
from standins import Rank, Request
from waiting import eventually

from sglang_weight_exporter.hooks.targets import SCHEDULER
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.runners import identity

ADDRESS = "10.0.0.1:5000"


class Host:
    """One host of an engine, with a rank on it. Its launcher draws a seed of its own, and the ranks
    take the first host's."""

    def __init__(self, directory: Path, node_rank: int, *, seed: int, **settings: Any) -> None:
        self.rank = Rank(directory)
        self.runner: Any = None
        launched = SimpleNamespace(
            port=30000,
            model_path="tiny",
            dp_size=1,
            nnodes=2,
            node_rank=node_rank,
            dist_init_addr=ADDRESS,
            random_seed=1000 + node_rank,
        )
        vars(launched).update(settings)
        host = self

        class Scheduler:
            """Of 0.5.21 and later."""

            def __init__(self, server_args: Any, port_args: Any = None) -> None:
                self.server_args = server_args
                host.runner = host.rank.runner(server_args=server_args)
                host.before = host.rank.snapshot().engine
                self.random_seed = seed

        self.before = Engine(name="", instance="")
        self.rank.hook(SCHEDULER, Scheduler)(launched)

    @property
    def engine(self) -> Engine:
        return self.rank.snapshot().engine

    def traces(self) -> list[str]:
        """Of its first load, and of an update some time later."""
        self.rank.clock.now += 600
        self.rank.scheduler(self.runner).update_weights_from_disk(Request())
        return [event.update.trace_id for event in self.rank.events()]


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"tp_size": 4, "pp_size": 2}, 8),
        ({"tp_size": 4, "pp_size": 2, "dp_size": 3}, 24),
        # Attention-DP is inside the tensor-parallel group (`compute_world_size`).
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, 4),
        ({}, 1),
        ({"tp_size": "auto"}, None),
    ],
)
def test_an_engine_says_how_many_ranks_it_has(
    tmp_path: Path, settings: dict[str, Any], ranks: int | None
) -> None:
    assert Host(tmp_path, 0, seed=7, **settings).engine.expected_ranks == ranks


def test_the_number_of_ranks_is_that_which_sglang_has_decided_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 0.5.19 on the settings hold what the user gave."""
    context = ModuleType("sglang.srt.runtime_context")
    decided = SimpleNamespace(tp_size=8, pp_size=1, dp_size=1, dist_init_addr=ADDRESS)
    vars(context)["get_parallel"] = lambda: decided
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    assert Host(tmp_path, 0, seed=7, tp_size=1).engine.expected_ranks == 8


def test_two_hosts_of_an_engine_are_one_group_and_one_trace(tmp_path: Path) -> None:
    first = Host(tmp_path / "0", 0, seed=7)
    second = Host(tmp_path / "1", 1, seed=7)
    assert first.engine.group == second.engine.group != ""
    assert [host.engine.node_rank for host in (first, second)] == [0, 1]
    assert [host.engine.nodes for host in (first, second)] == [2, 2]
    # Before the ranks have met nobody can know; a load that is told later has the right trace.
    assert first.before.group == second.before.group == ""
    assert first.before.meets_at == second.before.meets_at == ADDRESS  # By which they have a name.
    assert first.traces() == second.traces()


def test_engines_that_differ_in_address_or_in_seed_are_two_groups(tmp_path: Path) -> None:
    hosts = [
        Host(tmp_path / "0", 0, seed=7),
        Host(tmp_path / "1", 0, seed=8),
        Host(tmp_path / "2", 0, seed=7, dist_init_addr="10.0.0.2:5000"),
    ]
    assert len({host.engine.group for host in hosts}) == 3


def test_an_engine_whose_address_is_not_known_is_no_group(tmp_path: Path) -> None:
    """Started by an orchestrator of its own (``SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE``)."""
    assert Host(tmp_path, 0, seed=7, dist_init_addr=None).engine.group == ""


def test_an_engine_on_one_host_is_a_group_at_once(tmp_path: Path) -> None:
    host = Host(tmp_path, 0, seed=7, nnodes=1, dist_init_addr=None)
    assert host.before.group == host.engine.group == host.engine.instance
    assert host.engine.meets_at == ""


@pytest.fixture
def hosts(tmp_path: Path) -> list[Host]:
    return [Host(tmp_path / str(number), number, seed=7, pp_size=2) for number in range(2)]


@pytest.fixture
def exporters(hosts: list[Host], tmp_path: Path) -> Iterator[list[ExporterProcess]]:
    """One a host, as on hosts of their own."""
    started = [ExporterProcess(host.rank.directory).start() for host in hosts]
    try:
        for exporter in started:
            eventually(exporter.scrape, what="metrics of the exporter process")
        yield started
    finally:
        for exporter in started:
            with contextlib.suppress(ProcessLookupError):
                exporter.end(signal.SIGKILL)


def test_a_host_that_is_behind_or_gone_is_one_alert(
    hosts: list[Host], exporters: list[ExporterProcess], tmp_path: Path
) -> None:
    """A real Prometheus over both, with the shipped rules."""
    group = hosts[0].engine.group
    targets = " ".join(f"127.0.0.1:{exporter.port}" for exporter in exporters)
    (tmp_path / "monitoring").mkdir()
    monitoring = Monitoring(
        tmp_path / "monitoring",
        {"sglang-weights": targets},
        hastened={"SGLangWeightRanksDisagree", "SGLangWeightRanksMissing"},
    ).start()

    def raised(name: str) -> list[dict[str, Any]]:
        return [each for each in monitoring.active_alerts(name) if each["state"] == "firing"]

    try:
        nodes = f'sglang_weight_engine_nodes{{engine_group="{group}"}}'
        seen = f"count(count by (instance) ({nodes})) == 2"
        eventually(lambda: monitoring.query(seen), what="both hosts are scraped")
        name = "SGLangWeightRanksDisagree"
        hosts[0].traces()
        (alert,) = eventually(lambda: raised(name), what=name)
        assert {"engine_group": group, "role": "target"}.items() <= alert["labels"].items()
        hosts[1].traces()
        eventually(lambda: not monitoring.active_alerts(name), what=f"{name} resolves")
        assert raised("SGLangWeightRanksMissing") == []
        exporters[1].end(signal.SIGKILL)
        (alert,) = eventually(
            lambda: raised("SGLangWeightRanksMissing"), what="SGLangWeightRanksMissing"
        )
        assert alert["labels"]["engine_group"] == group
        assert alert["annotations"]["summary"].startswith("1 rank(s) of an engine")
    finally:
        monitoring.stop()


def ray(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    module: Any = ModuleType("ray")
    module.is_initialized = lambda: True
    context = SimpleNamespace(get_placement_group_id=lambda: group)
    module.get_runtime_context = lambda: context
    monkeypatch.setitem(sys.modules, "ray", module)


def test_ray_engines_that_share_a_placement_group_and_a_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With data parallelism they do not even differ in the port that their ranks meet at; each has
    drawn a seed before its actors started."""
    ray(monkeypatch, "group-1")

    def actor(seed: int) -> Any:
        settings = SimpleNamespace(port=30000, model_path="tiny", dp_size=2, random_seed=seed)
        return SimpleNamespace(server_args=settings, random_seed=seed)

    one, same, other = (identity.engine_of(actor(seed)) for seed in (7, 7, 8))
    assert one.instance == same.instance != other.instance
    groups = [identity.group_of(actor(seed), one) for seed in (7, 7, 8)]
    assert groups[0] == groups[1] != groups[2]


def test_a_setting_that_sglang_completes_is_read_where_it_is_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 0.5.19 on the settings have what the operator wrote; Ray's actors are told later."""
    context: Any = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: SimpleNamespace(dist_init_addr=ADDRESS)
    engine = Engine(name="30000", instance="0" * 16, nodes=2)
    settings = SimpleNamespace(port=30000, dist_init_addr=None)
    scheduler = SimpleNamespace(server_args=settings, random_seed=7)
    assert identity.group_of(scheduler, engine) == ""
    monkeypatch.setitem(sys.modules, context.__name__, context)
    assert identity.group_of(scheduler, engine) != ""
