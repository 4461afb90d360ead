# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments in Prometheus' text formats."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.instruments.base import Instrument, Sample
from sglang_weight_exporter.export.views import HostView, RoleView, role_views, roles_of
from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram

#: zlib's name for gzip's container around the stream.
_GZIP = 31

#: Ends a scrape in OpenMetrics, and so each family that is encoded alone.
_EOF = b"# EOF\n"

#: No instrument is read from both roles and the host.
_OF_ROLES = [each for each in INSTRUMENTS if each.read_role is not None]

#: What choose_encoder is asked for. Escaping is not negotiated: all names are plain.
_ACCEPT = {True: "application/openmetrics-text; version=1.0.0", False: ""}


class Exposition:
    """The text of a scrape. What ranks say is encoded once a snapshot and kept.

    Encoding is nearly all that a scrape costs, and ranks say something new only when weights
    change. A rank that is gone is forgotten at the next scrape. Not safe from several threads.
    """

    def __init__(
        self,
        read: Callable[[], HostView],
        others: Collector,
        *,
        exemplars: Callable[[], bool],
        guard: Guard,
    ) -> None:
        self._read = read
        self._others = others
        self._exemplars = exemplars
        self._formats = {openmetrics: _Format(openmetrics, guard) for openmetrics in (True, False)}
        self._scrape_seconds: float | None = None

    def content_type(self, *, openmetrics: bool) -> str:
        return self._formats[openmetrics].content_type

    async def scrape(self, *, openmetrics: bool, gzip: bool) -> bytes:
        """Text of now. Between ranks that have to be encoded, others get their turn."""
        began = time.perf_counter()
        view = replace(self._read(), scrape_seconds=self._scrape_seconds)
        kept = self._formats[openmetrics]
        await kept.take(view, exemplars=openmetrics and self._exemplars())
        tail = kept.host(view, self._others)
        content = kept.compressed(tail) if gzip else b"".join((*kept.ranks(), tail))
        self._scrape_seconds = time.perf_counter() - began
        return content


#: What a rank's text depends on: its snapshot, and which of its roles have an idle update that
#: is over by now (nothing is written when that happens).
_Key = tuple[Snapshot, tuple[bool, ...], bool]


class _Format:
    """What is kept of one text format."""

    def __init__(self, openmetrics: bool, guard: Guard) -> None:
        self._guard = guard
        self._encode, self.content_type = choose_encoder(_ACCEPT[openmetrics])
        self._eof = _EOF if openmetrics else b""
        #: Each rank's samples of each instrument, in their order, by the identity of its
        #: snapshot, which the key keeps alive: what a file says of itself need not be unique.
        self._texts: dict[int, tuple[_Key, list[bytes]]] = {}
        self._comments = [self._text(_Family(each, exemplars=False).metric) for each in _OF_ROLES]
        self._compressed: tuple[bytes, zlib._Compress] | None = None

    async def take(self, view: HostView, *, exemplars: bool) -> None:
        """Encode what has changed."""
        texts: dict[int, tuple[_Key, list[bytes]]] = {}
        changed = list(self._texts) != [id(each) for each in view.snapshots]
        for snapshot in view.snapshots:
            roles = list(role_views((snapshot,), view.now))
            settled = tuple(
                each.role is not role for each, role in zip(roles, roles_of(snapshot), strict=True)
            )
            kept = self._texts.get(id(snapshot))
            if kept is None or kept[0][1:] != (settled, exemplars):
                samples = [b""] * len(_OF_ROLES)
                with self._guard.step(f"The text of the rank {snapshot.rank_id!r}"):
                    samples = self._samples(roles, exemplars)
                kept = ((snapshot, settled, exemplars), samples)
                changed = True
                await asyncio.sleep(0)
            texts[id(snapshot)] = kept
        self._texts = texts
        if changed:
            self._compressed = None

    def ranks(self) -> Iterator[bytes]:
        """Every family of ranks, part by part."""
        for number, comments in enumerate(self._comments):
            yield comments
            for _, samples in self._texts.values():
                yield samples[number]

    def host(self, view: HostView, others: Collector) -> bytes:
        """What is made anew at each scrape, and the end."""
        families = []
        for instrument in INSTRUMENTS:
            if instrument.read_role is None:
                family = _Family(instrument, exemplars=False)
                for each in instrument.of_host(view):
                    family.add(each.labels, each.sample)
                families.append(family.metric)
        return self._text(*families, *others.collect()) + self._eof

    def compressed(self, tail: bytes) -> bytes:
        """Ranks and tail in gzip; the ranks' part is kept, and continued from where it ended."""
        if self._compressed is None:
            compressor = zlib.compressobj(level=1, wbits=_GZIP)
            parts = [compressor.compress(part) for part in self.ranks()]
            self._compressed = b"".join((*parts, compressor.flush(zlib.Z_FULL_FLUSH))), compressor
        ranks, compressor = self._compressed
        compressor = compressor.copy()
        return b"".join((ranks, compressor.compress(tail), compressor.flush()))

    def _samples(self, roles: list[RoleView], exemplars: bool) -> list[bytes]:
        texts = []
        for instrument, comments in zip(_OF_ROLES, self._comments, strict=True):
            family = _Family(instrument, exemplars)
            for each in instrument.of_roles(roles):
                family.add(each.labels, each.sample)
            texts.append(self._text(family.metric).removeprefix(comments))
        return texts

    def _text(self, *families: Metric) -> bytes:
        return self._encode(_Families(families)).removesuffix(self._eof)


class _Families(Collector):
    """What prometheus_client's encoders take for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Family:
    def __init__(self, instrument: Instrument, exemplars: bool) -> None:
        make: dict[str, type[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]] = {
            "gauge": GaugeMetricFamily,
            "counter": CounterMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        self.metric = make[instrument.kind](
            instrument.name, instrument.description, labels=instrument.label_names
        )
        self._exemplars = exemplars

    def add(self, labels: tuple[str, ...], sample: Sample) -> None:
        exemplar = None
        if self._exemplars and sample.trace_id and sample.seconds is not None:
            in_histogram = isinstance(self.metric, HistogramMetricFamily)
            value = sample.seconds if in_histogram else 1.0
            exemplar = Exemplar({"trace_id": sample.trace_id}, value, sample.at)
        if isinstance(self.metric, HistogramMetricFamily):
            assert isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, _buckets(sample.value, exemplar), sample.value.sum)
        elif isinstance(self.metric, CounterMetricFamily):
            assert not isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, sample.value, exemplar=exemplar)
        else:
            assert not isinstance(sample.value, Histogram)
            self.metric.add_metric(labels, sample.value)


def _buckets(
    histogram: Histogram, exemplar: Exemplar | None
) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Cumulative buckets; the one that the exemplar fell into has it."""
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    total, lower = 0, float("-inf")
    for bound, count in zip((*DURATION_BUCKETS, float("inf")), histogram.counts, strict=True):
        total += count
        name = "+Inf" if bound == float("inf") else str(bound)
        if exemplar is not None and lower < exemplar.value <= bound:
            buckets.append((name, float(total), exemplar))
        else:
            buckets.append((name, float(total)))
        lower = bound
    return buckets
