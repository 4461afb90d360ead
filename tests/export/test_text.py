# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The text of a scrape is what prometheus_client's own encoders make of the same values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.instruments.base import DataPoint, Instrument
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.views import HostView, role_views
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram, UpdateCounts
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.simulation import Simulation
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

Buckets = list[tuple[str, float] | tuple[str, float, Exemplar]]


class Reference(Collector):
    """prometheus_client's own families of the instruments' values."""

    def __init__(self, view: HostView, *, exemplars: bool) -> None:
        self._view, self._exemplars = view, exemplars

    def collect(self) -> Iterable[Metric]:
        roles = list(role_views(self._view.snapshots, self._view.now))
        of_roles = [each for each in INSTRUMENTS if each.read_role is not None]
        for each in of_roles:
            yield self._family(each, each.of_roles(roles))
        for each in INSTRUMENTS:
            if each.read_role is None:
                yield self._family(each, each.of_host(self._view))

    def _family(self, instrument: Instrument, points: list[DataPoint]) -> Metric:
        names, about = instrument.label_names, instrument.description
        if instrument.kind == "gauge":
            gauge = GaugeMetricFamily(instrument.name, about, labels=names)
            for point in points:
                assert not isinstance(point.sample.value, Histogram)
                gauge.add_metric(point.labels, point.sample.value)
            return gauge
        if instrument.kind == "counter":
            counter = CounterMetricFamily(instrument.name, about, labels=names)
            for point in points:
                assert not isinstance(point.sample.value, Histogram)
                exemplar = self._exemplar(point, 1.0)
                counter.add_metric(point.labels, point.sample.value, exemplar=exemplar)
            return counter
        histogram = HistogramMetricFamily(instrument.name, about, labels=names)
        for point in points:
            assert isinstance(point.sample.value, Histogram)
            histogram.add_metric(point.labels, list(self._buckets(point)), point.sample.value.sum)
        return histogram

    def _exemplar(self, point: DataPoint, value: float | None) -> Exemplar | None:
        sample = point.sample
        if not self._exemplars or not sample.trace_id or sample.seconds is None or value is None:
            return None
        return Exemplar({"trace_id": sample.trace_id}, value, sample.at)

    def _buckets(
        self, point: DataPoint
    ) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
        value = point.sample.value
        assert isinstance(value, Histogram)
        exemplar = self._exemplar(point, point.sample.seconds)
        total, lower = 0, float("-inf")
        for bound, count in zip((*DURATION_BUCKETS, float("inf")), value.counts, strict=True):
            total += count
            name = "+Inf" if bound == float("inf") else str(bound)
            if exemplar is not None and lower < exemplar.value <= bound:
                yield name, float(total), exemplar
            else:
                yield name, float(total)
            lower = bound


def expected(view: HostView, *, openmetrics: bool) -> str:
    encode = generate_openmetrics if openmetrics else generate_latest
    return encode(Reference(view, exemplars=openmetrics)).decode()


def scraped(view: HostView, *, openmetrics: bool, names: Iterable[str] = ()) -> str:
    exposition = Exposition(
        lambda: view, CollectorRegistry(), exemplars=lambda: openmetrics, guard=Guard()
    )
    text = asyncio.run(
        exposition.scrape(openmetrics=openmetrics, gzip=False, names=frozenset(names))
    )
    return text.decode()


ODD = 'a \\ "b"\n100 %s of {c} ü €'


def odd_view() -> HostView:
    """What has to be escaped, in labels of every kind, and numbers of every form."""
    numbers = (0, 7, 10**6, 10**7, 123456789, 2**53)
    usages = tuple(
        WeightUsage(device="cuda:0", kind="parameter", dtype=f"{ODD}{each}", nbytes=each, tensors=1)
        for each in numbers
    )
    counts = UpdateCounts(
        updates=3,
        duration=Histogram(counts=(1, 0, 1, 0, 0, 0, 0, 0, 1), sum=1234567.25),
        trace_id="ab" * 16,
        updated_at=1.7e9 + 0.125,
        seconds=0.75,
    )
    role = Role(
        name="target",
        device="cuda:0",
        quantization=ODD,
        weights=usages,
        updated_at=1795299145.9349,
        load_seconds=1e-7,
        updates={"disk": counts},
    )
    snapshot = Snapshot(
        rank_id="rank",
        pid=1,
        started_at=1.0,
        engine=Engine(name=ODD, instance="one", model_name=ODD, model_path="%d"),
        ranks=Ranks(tp=1, dp=2),
        devices=(Device(name="cuda:0", uuid="GPU-%s"),),
        roles=(role, Role(name="draft", device="cuda:0")),
    )
    return HostView(
        snapshots=(
            snapshot,
            Snapshot(
                rank_id="loads", pid=2, started_at=2.0, engine=Engine(name="1", instance="two")
            ),
        ),
        started_at=1.0,
        now=1.8e9,
    )


def simulated_view(tmp_path: Path, engines: int = 4) -> HostView:
    runtime_dir = RuntimeDir.open(tmp_path / "simulated", {})
    simulation = Simulation(runtime_dir, engines, 2, start=1e9)
    simulation.advance(1e9 + 100.0)
    snapshots = tuple(each for _, each in SnapshotReader(runtime_dir).read())
    simulation.close()
    assert len(snapshots) == 2 * engines
    return HostView(snapshots=snapshots, started_at=1.0, now=1e9 + 100.0)


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize("which", ["odd", "simulated"])
def test_byte_for_byte(which: str, openmetrics: bool, tmp_path: Path) -> None:
    view = odd_view() if which == "odd" else simulated_view(tmp_path)
    assert scraped(view, openmetrics=openmetrics) == expected(view, openmetrics=openmetrics)
    assert (" # {trace_id=" in scraped(view, openmetrics=openmetrics)) == openmetrics


class Made(Collector):
    """Families that are there already, so that encoding them is all that is measured."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


@pytest.mark.parametrize("openmetrics", [False, True])
def test_when_every_rank_has_changed_it_costs_no_more_than_encoding_alone(
    openmetrics: bool, tmp_path: Path
) -> None:
    """Against `generate_latest` over families that somebody else has made: processor time of this
    thread, the least of several tries in turn. Both grow with the ranks."""
    view = simulated_view(tmp_path, engines=8)
    families = list(Reference(view, exemplars=openmetrics).collect())
    encode = generate_openmetrics if openmetrics else generate_latest

    def seconds(do: Callable[[], object]) -> float:
        began = time.thread_time()
        do()
        return time.thread_time() - began

    tries = [
        (
            seconds(lambda: scraped(view, openmetrics=openmetrics)),  # Nothing is kept of the last.
            seconds(lambda: encode(Made(families))),
        )
        for _ in range(7)
    ]
    ours, theirs = map(min, zip(*tries, strict=True))
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize(
    ("names", "families"),
    [
        (["sglang_weight_bytes"], ["sglang_weight_bytes"]),
        (["sglang_weight_updates_total"], ["sglang_weight_updates"]),
        (
            ["sglang_weight_updates", "sglang_weight_exporter_ranks"],
            ["sglang_weight_updates", "sglang_weight_exporter_ranks"],
        ),
        (["sglang_weight_update_duration_seconds_sum"], ["sglang_weight_update_duration_seconds"]),
        (["no_such_metric"], []),
    ],
)
def test_only_what_is_named(names: list[str], families: list[str], tmp_path: Path) -> None:
    view = simulated_view(tmp_path)
    blocks = expected(view, openmetrics=True).split("# HELP ")[1:]
    wanted = [f"# HELP {block}" for block in blocks if block.split(" ")[0] in families]
    text = scraped(view, openmetrics=True, names=names)
    assert text.removesuffix("# EOF\n") == "".join(wanted).removesuffix("# EOF\n")
    assert text.endswith("# EOF\n")
