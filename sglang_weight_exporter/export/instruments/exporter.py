# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process itself, and the spans that it sends."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.instruments.base import Instrument, Sample, one
from sglang_weight_exporter.export.views import HostView


def _dropped(view: HostView) -> Iterator[Sample]:
    for reason, count in view.spans.dropped.items():
        yield Sample((reason,), count)


def _died_in_update(view: HostView) -> Iterator[Sample]:
    for labels, count in view.died_in_update.items():
        yield Sample(labels, count)


INSTRUMENTS = (
    Instrument(
        "sglang_weight_exporter_build_info",
        "gauge",
        "",
        "Version of this exporter; always 1. simulated: whether its ranks are made up.",
        ("version", "simulated"),
        read_host=lambda view: [Sample((__version__, str(view.simulated).lower()), 1)],
    ),
    Instrument(
        "sglang_weight_exporter_ranks",
        "gauge",
        "{rank}",
        "Ranks of this host that are alive and have published a snapshot.",
        read_host=lambda view: one(len(view.snapshots)),
    ),
    Instrument(
        "sglang_weight_exporter_ranks_died_in_update",
        "counter",
        "{rank}",
        "Ranks of this host that ended in the middle of an update.",
        ("model_name", "engine"),
        read_host=_died_in_update,
    ),
    Instrument(
        "sglang_weight_exporter_read_errors",
        "counter",
        "{error}",
        "Files of ranks that this exporter could not read.",
        read_host=lambda view: one(view.unreadable),
    ),
    Instrument(
        "sglang_weight_exporter_errors",
        "counter",
        "{error}",
        "Errors that the exporter process went on after, each of one rank, one GPU or one pass; "
        "its log says what they were.",
        read_host=lambda view: one(view.errors),
        preset="default",
    ),
    Instrument(
        "sglang_weight_exporter_scrape_duration_seconds",
        "gauge",
        "s",
        "What the scrape before this one took: reading what ranks have written, NVML, and making "
        "the text. Absent in the first.",
        read_host=lambda view: [] if view.scrape_seconds is None else one(view.scrape_seconds),
    ),
    Instrument(
        "sglang_weight_exporter_spans_exported",
        "counter",
        "{span}",
        "Spans of loads and updates that the collector has acknowledged.",
        read_host=lambda view: one(view.spans.exported),
    ),
    Instrument(
        "sglang_weight_exporter_spans_waiting",
        "gauge",
        "{span}",
        "Loads and updates whose span the collector has not acknowledged yet.",
        read_host=lambda view: one(view.spans.waiting),
    ),
    Instrument(
        "sglang_weight_exporter_spans_dropped",
        "counter",
        "{span}",
        "Loads and updates whose span was dropped: too many waited (queue_full), the collector "
        "took others and not this one (refused), or its file is damaged (unreadable).",
        ("reason",),
        read_host=_dropped,
    ),
    Instrument(
        "sglang_weight_exporter_span_failures",
        "counter",
        "{try}",
        "Tries at sending a span that the collector did not acknowledge.",
        read_host=lambda view: one(view.spans.failures),
        preset="default",
    ),
)
