# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The instruments in Prometheus' text formats."""

from __future__ import annotations

import asyncio
import gzip as gzip_format
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import chosen
from sglang_weight_exporter.export.instruments.base import Instrument
from sglang_weight_exporter.export.text import Labels, host_lines, role_lines
from sglang_weight_exporter.export.views import HostView, RoleView, role_views, roles_of
from sglang_weight_exporter.records.snapshot import Snapshot

#: zlib's name for gzip's container around the stream.
_GZIP = 31

#: Ends a scrape in OpenMetrics, and so each family that is encoded alone.
_EOF = b"# EOF\n"

#: What choose_encoder is asked for. Escaping is not negotiated: all names are plain.
_ACCEPT = {True: "application/openmetrics-text; version=1.0.0", False: ""}

#: With these prometheus_client's own metrics of a process are served.
_WITH_PROCESS = {"default", "full", "process"}

#: Names of samples of a family, behind the family's own.
_SUFFIXES = ("_total", "_bucket", "_count", "_sum")


def content_type(*, openmetrics: bool) -> str:
    """Of what :meth:`Exposition.scrape` gives."""
    content_type: str = choose_encoder(_ACCEPT[openmetrics])[1]
    return content_type


class Exposition:
    """The text of a scrape. What ranks say is encoded once a snapshot and kept.

    Encoding is nearly all that a scrape costs, and ranks say something new only when weights
    change. A rank that is gone is forgotten at the next scrape. Not safe from several threads.

    ``others`` are the process's own, in ``default``, ``full`` and ``process``. ``metrics`` is what
    is served where a scrape does not choose: presets and groups.
    """

    def __init__(
        self,
        read: Callable[[], HostView],
        others: Collector,
        *,
        exemplars: Callable[[], bool],
        guard: Guard,
        metrics: Collection[str] = ("full",),
    ) -> None:
        self._read = read
        self._others = others
        self._exemplars = exemplars
        self._guard = guard
        self._metrics = tuple(metrics)
        self._formats: dict[tuple[tuple[str, ...], bool], _Format] = {}
        self._scrape_seconds: float | None = None

    async def scrape(
        self,
        *,
        openmetrics: bool,
        gzip: bool,
        names: Collection[str] = (),
        preset: str = "",
    ) -> bytes:
        """Text of now. Between ranks that have to be encoded, others get their turn.

        ``names``: only these families are wanted, by their own name or that of a sample.
        ``preset``: what is served in place of what the setting says.
        """
        began = time.perf_counter()
        view = replace(self._read(), scrape_seconds=self._scrape_seconds)
        kept = self._format((preset,) if preset else self._metrics, openmetrics)
        await kept.take(view, exemplars=openmetrics and self._exemplars())
        if names:
            content = kept.chosen(frozenset(names), view)
            return gzip_format.compress(content, 1) if gzip else content
        tail = kept.host(view)
        content = kept.compressed(tail) if gzip else b"".join((*kept.ranks(), tail))
        self._scrape_seconds = time.perf_counter() - began
        return content

    def _format(self, metrics: tuple[str, ...], openmetrics: bool) -> _Format:
        """Made when it is first asked for."""
        kept = self._formats.get((metrics, openmetrics))
        if kept is None:
            others = self._others if _WITH_PROCESS & set(metrics) else _Families(())
            kept = _Format(openmetrics, self._guard, chosen(metrics), others)
            self._formats[metrics, openmetrics] = kept
        return kept


#: What a rank's text depends on: its snapshot, and which of its roles have an idle update that
#: is over by now (nothing is written when that happens).
_Key = tuple[Snapshot, tuple[bool, ...], bool]


class _Format:
    """What is kept of one text format."""

    def __init__(
        self, openmetrics: bool, guard: Guard, instruments: Sequence[Instrument], others: Collector
    ) -> None:
        self._guard = guard
        self._others = others
        self._encode, _ = choose_encoder(_ACCEPT[openmetrics])
        self._eof = _EOF if openmetrics else b""
        self._of_roles = [each for each in instruments if each.read_role is not None]
        self._of_host = [each for each in instruments if each.read_role is None]
        #: Each rank's samples of each instrument, in their order, by the identity of its
        #: snapshot, which the key keeps alive: what a file says of itself need not be unique.
        self._texts: dict[int, tuple[_Key, list[bytes]]] = {}
        self._comments = {
            each.name: self._text([Metric(each.name, each.description, each.kind)])
            for each in instruments
        }
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
                samples = [b""] * len(self._of_roles)
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
        for number in range(len(self._of_roles)):
            yield from self._family(number)

    def _family(self, number: int) -> Iterator[bytes]:
        yield self._comments[self._of_roles[number].name]
        for _, samples in self._texts.values():
            yield samples[number]

    def host(self, view: HostView) -> bytes:
        """What is made anew at each scrape, and the end."""
        parts = [self._of_the_host(each, view) for each in self._of_host]
        return b"".join((*parts, self._text(self._others.collect()), self._eof))

    def chosen(self, names: frozenset[str], view: HostView) -> bytes:
        """The families that are named, and the end."""
        parts: list[bytes] = []
        for number, instrument in enumerate(self._of_roles):
            if _is_named(instrument.name, names):
                parts += self._family(number)
        parts += [
            self._of_the_host(each, view) for each in self._of_host if _is_named(each.name, names)
        ]
        others_named = [each for each in self._others.collect() if _is_named(each.name, names)]
        return b"".join((*parts, self._text(others_named), self._eof))

    def compressed(self, tail: bytes) -> bytes:
        """Ranks and tail in gzip; the ranks' part is kept, and continued from where it ended."""
        if self._compressed is None:
            compressor = zlib.compressobj(level=1, wbits=_GZIP)
            parts = [compressor.compress(part) for part in self.ranks()]
            self._compressed = b"".join((*parts, compressor.flush(zlib.Z_FULL_FLUSH))), compressor
        ranks, compressor = self._compressed
        compressor = compressor.copy()
        return b"".join((ranks, compressor.compress(tail), compressor.flush()))

    def _of_the_host(self, instrument: Instrument, view: HostView) -> bytes:
        samples = () if instrument.read_host is None else instrument.read_host(view)
        lines = "".join(host_lines(instrument, samples, Labels()))
        return self._comments[instrument.name] + lines.encode()

    def _samples(self, roles: list[RoleView], exemplars: bool) -> list[bytes]:
        labels = Labels()
        return [
            "".join(role_lines(each, roles, labels, exemplars=exemplars)).encode()
            for each in self._of_roles
        ]

    def _text(self, families: Iterable[Metric]) -> bytes:
        return self._encode(_Families(families)).removesuffix(self._eof)


def _is_named(family: str, names: frozenset[str]) -> bool:
    return family in names or any(f"{family}{suffix}" in names for suffix in _SUFFIXES)


class _Families(Collector):
    """What prometheus_client's encoders take for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
