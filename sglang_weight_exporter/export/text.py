# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The lines of samples in Prometheus' text formats, byte for byte as prometheus_client writes them.

Its encoders take objects made for each sample and each label, which is most of what a scrape costs.
Here what the series of a role have in common is made once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from prometheus_client.utils import floatToGoString

from sglang_weight_exporter.export.instruments.base import Instrument, Sample
from sglang_weight_exporter.export.views import IDENTITY, RoleView, identity
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, Histogram

_BOUNDS = (*DURATION_BUCKETS, float("inf"))
_BOUND_NAMES = (*map(str, DURATION_BUCKETS), "+Inf")


@lru_cache(maxsize=4096)
def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class Labels:
    """Label sets as text. Keeps, for each identity, a template with places for other labels."""

    def __init__(self) -> None:
        self._templates: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
        self._orders: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._identities: dict[tuple[int, str], tuple[str, ...]] = {}

    def identity(self, view: RoleView, device: str) -> tuple[str, ...]:
        key = (id(view), device)
        found = self._identities.get(key)
        if found is None:
            found = self._identities[key] = identity(view, device)
        return found

    def text(
        self, of_role: tuple[str, ...], names: tuple[str, ...], values: tuple[str, ...]
    ) -> str:
        """``{…}``, its labels sorted. ``of_role``: values of ``IDENTITY``, or none."""
        template = self._templates.get((of_role, names))
        if template is None:
            template = self._templates[of_role, names] = _template(of_role, names)
            self._orders.setdefault(names, _order(names))
        if not names:
            return template
        return template % tuple(_escaped(values[index]) for index in self._orders[names])


def _order(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(names)), key=names.__getitem__))


def _template(of_role: tuple[str, ...], names: tuple[str, ...]) -> str:
    """With ``%s`` for each of the names, in their sorted order."""
    if not (of_role or names):
        return ""
    # What is never filled in has its percent signs as they are.
    percent = "%%" if names else "%"
    labels = {
        name: _escaped(value).replace("%", percent)
        for name, value in zip(IDENTITY, of_role, strict=False)
    } | dict.fromkeys(names, "%s")
    return "{" + ",".join(f'{name}="{labels[name]}"' for name in sorted(labels)) + "}"


def role_lines(
    instrument: Instrument, roles: Iterable[RoleView], labels: Labels, *, exemplars: bool
) -> Iterator[str]:
    """Lines of the values of these roles."""
    assert instrument.read_role is not None
    for role in roles:
        if role.role.name or instrument.of_rank:
            for sample in instrument.read_role(role):
                of_role = labels.identity(role, sample.device)
                yield from _lines(instrument, sample, labels, of_role, exemplars=exemplars)


def host_lines(instrument: Instrument, samples: Iterable[Sample], labels: Labels) -> Iterator[str]:
    """Lines of the host's values."""
    for sample in samples:
        yield from _lines(instrument, sample, labels, (), exemplars=False)


def _lines(
    instrument: Instrument,
    sample: Sample,
    labels: Labels,
    of_role: tuple[str, ...],
    *,
    exemplars: bool,
) -> Iterator[str]:
    value = sample.value
    if isinstance(value, Histogram):
        yield from _histogram(instrument, value, sample, labels, of_role, exemplars=exemplars)
        return
    text = labels.text(of_role, instrument.labels, sample.labels)
    if instrument.kind == "counter":
        exemplar = _exemplar(sample, 1.0) if exemplars else ""
        yield f"{instrument.name}_total{text} {floatToGoString(value)}{exemplar}\n"
    else:
        yield f"{instrument.name}{text} {floatToGoString(value)}\n"


def _histogram(
    instrument: Instrument,
    value: Histogram,
    sample: Sample,
    labels: Labels,
    of_role: tuple[str, ...],
    *,
    exemplars: bool,
) -> Iterator[str]:
    """Cumulative buckets, the count and the sum; the bucket that the last observation fell into
    has the exemplar."""
    seconds = sample.seconds if exemplars else None
    total, lower = 0, float("-inf")
    names = (*instrument.labels, "le")
    for bound, bound_name, count in zip(_BOUNDS, _BOUND_NAMES, value.counts, strict=True):
        total += count
        if bound not in instrument.bounds and bound != _BOUNDS[-1]:
            continue
        text = labels.text(of_role, names, (*sample.labels, bound_name))
        fell = seconds is not None and lower < seconds <= bound
        exemplar = _exemplar(sample, seconds) if fell else ""
        yield f"{instrument.name}_bucket{text} {floatToGoString(total)}{exemplar}\n"
        lower = bound
    text = labels.text(of_role, instrument.labels, sample.labels)
    yield f"{instrument.name}_count{text} {floatToGoString(total)}\n"
    yield f"{instrument.name}_sum{text} {floatToGoString(value.sum)}\n"


def _exemplar(sample: Sample, value: float | None) -> str:
    if not sample.trace_id or sample.seconds is None or value is None:
        return ""
    at = "" if sample.at is None else f" {sample.at}"
    return f' # {{trace_id="{sample.trace_id}"}} {floatToGoString(value)}{at}'
