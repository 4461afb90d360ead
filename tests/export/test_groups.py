# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which metrics are served: all that dashboards and rules ask for, and what was chosen besides."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from engines import Scrape
from serving import Exporter

from sglang_weight_exporter.export.instruments import GROUPS, INSTRUMENTS, chosen
from sglang_weight_exporter.export.instruments.base import Sample
from sglang_weight_exporter.export.views import HostView, role_views
from sglang_weight_exporter.records.adapters import Adapters, Aspect
from sglang_weight_exporter.records.engine import Engine, HookState
from sglang_weight_exporter.records.pools import LoraUsage
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import OperationCounts
from sglang_weight_exporter.settings import METRIC_GROUPS, METRIC_PRESETS, Settings
from sglang_weight_exporter.store.rank import RankStore

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
SUFFIXES = re.compile(r"_(total|bucket|sum|count)$")

MOST_LABELS = 15


def test_groups_are_those_of_the_setting() -> None:
    assert tuple(GROUPS) == METRIC_GROUPS
    assert chosen(("full",)) == INSTRUMENTS
    assert chosen(("lora", "phases")) == (*GROUPS["phases"], *GROUPS["lora"])
    default = {each.name for each in chosen(("default",))}
    assert default < {each.name for each in INSTRUMENTS}
    both = {each.name for each in chosen(("default", "memory"))}
    assert both == default | {each.name for each in GROUPS["memory"]}


def test_each_preset_has_all_of_the_one_before() -> None:
    lean, default, full = ({each.name for each in chosen((name,))} for name in METRIC_PRESETS)
    assert lean < default < full == {each.name for each in INSTRUMENTS}
    assert chosen(("lean", "default")) == chosen(("default",))


@pytest.mark.parametrize(
    "file", ["sglang-engine.json", "sglang-fleet.json", "sglang-weights.rules.yml"]
)
def test_lean_has_all_that_dashboards_and_rules_ask_for(file: str) -> None:
    text = (DASHBOARDS / file).read_text(encoding="utf-8")
    known = {each.name for each in INSTRUMENTS}
    asked = {SUFFIXES.sub("", name) for name in re.findall(r"\bsglang_[a-z_]+\b", text)} & known
    assert len(asked) > 10
    assert asked <= {each.name for each in chosen(("lean",))}


def test_what_is_deprecated_says_what_takes_its_place_and_can_be_left_out() -> None:
    instruments = {each.name: each for each in INSTRUMENTS}
    deprecated = [each for each in INSTRUMENTS if each.replaced_by]
    assert deprecated == [each for each in INSTRUMENTS if "eprecated" in each.description]
    for each in deprecated:
        successor = instruments[each.replaced_by]
        assert each.replaced_by in each.description
        assert (each.preset, successor.preset) in {("default", "lean"), ("full", "lean")}


@pytest.mark.parametrize("text", ["core,everything", "everything", ","])
def test_what_is_no_group_is_named(text: str) -> None:
    settings, complaints = Settings.from_environ({"SGLANG_WEIGHT_EXPORTER_METRICS": text})
    assert settings.metrics == ("default",)
    (complaint,) = complaints
    assert "core, memory, phases" in complaint


def scrape(exporter: Exporter, query: str = "") -> Scrape:
    return Scrape.of(f"http://127.0.0.1:{exporter.port}/metrics{query}")


def test_a_group_alone_is_served(serve: Callable[..., Exporter], rank: RankStore) -> None:
    exporter = serve("--metrics", "process")
    exporter.line("metrics are at")
    names = scrape(exporter).names()
    assert "process_open_fds" in names
    assert "sglang_weight_exporter_ranks" in names
    assert "sglang_weight_bytes" not in names


def test_names_in_the_query_are_served_alone(
    serve: Callable[..., Exporter], rank: RankStore
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    query = "?name[]=sglang_weight_bytes&name%5B%5D=process_open_fds"
    assert scrape(exporter, query).names() == {"sglang_weight_bytes", "process_open_fds"}
    assert "sglang_weight_exporter_ranks" in scrape(exporter, "?name=x").names()


def test_a_scrape_chooses_a_preset(serve: Callable[..., Exporter], rank: RankStore) -> None:
    """One Prometheus takes all, and another what its rules need, of one exporter."""
    exporter = serve("--metrics", "lean")
    exporter.line("metrics are at")
    lean = scrape(exporter).names()
    assert "process_open_fds" not in lean
    assert scrape(exporter, "?metrics=lean").names() >= lean
    default = scrape(exporter, "?metrics=default").names()
    assert default - lean >= {"process_open_fds", "sglang_weight_exporter_errors_total"}
    full = scrape(exporter, "?metrics=full").names()
    assert full - default >= {"sglang_weight_update_calls_total"}
    one = scrape(exporter, "?metrics=full&name[]=sglang_weight_update_calls_total").names()
    assert one == {"sglang_weight_update_calls_total"}
    status, _, body = exporter.request("/metrics?metrics=all")
    assert (status, body) == (400, b"metrics is one of lean, default, full.\n")


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        # As Prometheus 3 asks, one that takes native histograms, and one that offers OpenMetrics 2.
        (
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;"
            "encoding=delimited;q=0.6,"
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,"
            "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,"
            "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
        (
            "application/openmetrics-text;version=2.0.0;q=0.6,"
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2",
            True,
        ),
        ("application/openmetrics-text;version=2.0.0,text/plain;q=0.5", False),
        ("text/plain;version=0.0.4;q=0.5,application/openmetrics-text;version=1.0.0;q=0.2", False),
        ("application/openmetrics-text;q=0", False),
        ("*/*", False),
    ],
)
def test_every_version_that_is_offered_counts(
    accept: str, openmetrics: bool, serve: Callable[..., Exporter]
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    _, headers, body = exporter.request("/metrics", accept=accept)
    assert headers["content-type"].startswith("application/openmetrics-text") == openmetrics
    assert body.endswith(b"# EOF\n") == openmetrics


def test_no_series_has_more_labels_than_a_store_takes() -> None:
    """Mimir takes 30, of which a scrape in Kubernetes adds a dozen and an operator some more."""
    labels = {each.name: len(each.label_names) for each in INSTRUMENTS}
    assert {name: count for name, count in labels.items() if count > MOST_LABELS} == {}


def test_both_infos_say_different_things() -> None:
    infos = [
        each for each in INSTRUMENTS if re.fullmatch("sglang_weight_(engine_)?info", each.name)
    ]
    first, second = (set(each.labels) for each in infos)
    assert first.isdisjoint(second)


def read(name: str, snapshot: Snapshot, metrics: str) -> list[Sample]:
    """Samples of one instrument of one rank."""
    (instrument,) = (each for each in chosen((metrics,)) if each.name == name)
    roles = list(role_views((snapshot,), 0.0))
    if instrument.read_host is not None:
        return list(instrument.read_host(HostView(snapshots=(snapshot,))))
    return [point.sample for point in instrument.of_roles(roles)]


def a_rank(**more: Any) -> Snapshot:
    engine = Engine(name="1", instance="one", group="g", expected_ranks=16)
    found = {name: more.pop(name) for name in ("lora", "adapters") if name in more}
    role = Role(name="target", device="cuda:0", **found)
    return Snapshot(rank_id="a", pid=1, started_at=0.0, engine=engine, roles=(role,), **more)


def test_an_engine_says_how_many_ranks_it_has() -> None:
    (sample,) = read("sglang_weight_expected_ranks", a_rank(), "default")
    assert (sample.labels, sample.value) == (("g",), 16)


def test_hooks_that_failed_are_named_and_the_others_counted() -> None:
    states = {"a": "installed", "b": "installed", "c": "failed", "d": "absent"}
    hooks = tuple(HookState(target=name, status=cast(Any, state)) for name, state in states.items())
    name = "sglang_weight_exporter_hooks"
    lean = {each.labels: each.value for each in read(name, a_rank(hooks=hooks), "default")}
    assert lean == {("", "installed"): 2, ("c", "failed"): 1, ("", "absent"): 1}
    full = {each.labels for each in read(name, a_rank(hooks=hooks), "full")}
    assert full == set(states.items())


def test_operations_come_with_their_first_call_and_those_of_adapters_before() -> None:
    name = "sglang_weight_operation_failures"
    assert read(name, a_rank(), "full") == []
    done = a_rank(operations={"check_weights": OperationCounts(calls=2, failures=1)})
    assert [(each.labels, each.value) for each in read(name, done, "default")] == [
        (("check_weights",), 1)
    ]
    slots = (LoraUsage(device="cuda:0", nbytes=1, adapters=0),)
    known = {each.labels[0]: each.value for each in read(name, a_rank(lora=slots), "default")}
    assert known == {"load_lora_adapter": 0, "load_lora_adapter_from_tensors": 0}


def test_adapters_are_counted_where_lora_is_on_from_their_first_load_to_those_that_fail() -> None:
    names = ("bytes", "last_change_timestamp_seconds", "changes", "failures")
    of_adapters = [f"sglang_lora_adapter_{name}" for name in names] + ["sglang_lora_adapters_hash"]

    def values(snapshot: Snapshot) -> list[list[float]]:
        return [
            [cast(float, each.value) for each in read(name, snapshot, "full")]
            for name in of_adapters
        ]

    calls = {
        "load_lora_adapter": OperationCounts(calls=5, failures=2),
        "load_lora_adapter_from_tensors": OperationCounts(calls=3, failures=1),
        "unload_lora_adapter": OperationCounts(calls=4, failures=1),
        "save_remote_model": OperationCounts(calls=7, failures=7),
    }
    assert values(a_rank(operations=calls)) == [[], [], [], [], []]
    assert values(a_rank(adapters=Adapters())) == [[0], [], [0], [0], []]
    hashes: dict[Aspect, str] = {"names": f"{1:032x}", "settings": "f" * 32, "content": ""}
    loaded = Adapters(count=2, nbytes=64, changed_at=5.0, hashes=hashes)
    assert values(a_rank(adapters=loaded, operations=calls)) == [
        *([64], [5.0], [3 + 2 + 3], [2 + 1]),
        [0, 2**53 - 1],
    ]
