# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""An event of the store → OpenTelemetry spans, with the pointer table as span events.

Spans are built whole instead of being recorded by a tracer: they happened in another process, some
time ago, and must be the same spans when they are sent again. The limits that a tracer puts on
events and attributes (``OTEL_SPAN_EVENT_COUNT_LIMIT`` and so on, which drop the oldest) do not
apply; the limits here take their place, and what exceeds them goes to a further span.
"""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.following import Finding
from sglang_weight_exporter.records.base import SCHEMA_VERSION, Record
from sglang_weight_exporter.records.contents import ContentChanges
from sglang_weight_exporter.records.costs import DISCARDED, FATES, UpdateCost
from sglang_weight_exporter.records.engine import Device, Engine
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.weights import NAMED_CHANGES
from sglang_weight_exporter.weight_table import WeightTable, with_names, without_fingerprints
from sglang_weight_exporter.weight_table_events import (
    DEFAULT_LIMITS,
    TABLE_EVENT,
    Attributes,
    AttributeValue,
    Limits,
    encode_table,
)

#: The semantic conventions that names of attributes follow.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

SCOPE = InstrumentationScope("sglang_weight_exporter", __version__, SCHEMA_URL)

#: A message that is an exception, as hooks write it; what SGLang says in its own words has no type
#: (``_OTHER`` in the semantic conventions).
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Interrupt))[:(]")

#: What the attributes take that say which table a span has.
_TABLE_ATTRIBUTES_BYTES = 500

#: What a span says of its table: its rows are in the events here; they are the same as in an
#: earlier span; they are switched off; they could not be read.
TableState = Literal["included", "unchanged", "disabled", "missing"]


class SentTable(Record, frozen=True, kw_only=True):
    """A table that a collector has acknowledged, and the span that carries it."""

    #: Fingerprints of the whole table and of the rows that were sent (the same without a name
    #: filter).
    sha256: str
    sent_sha256: str
    rows: int
    trace_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    span_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]

    @property
    def link(self) -> Link:
        return Link(SpanContext(int(self.trace_id, 16), int(self.span_id, 16), is_remote=True))


@dataclass(frozen=True)
class EventSpans:
    """The spans of one event: one, and further ones for a table that is too large for it."""

    spans: tuple[ReadableSpan, ...]
    #: What later events may refer to; ``None`` when no table was sent.
    sent: SentTable | None


def selected(table: WeightTable, names: re.Pattern[str]) -> WeightTable:
    """The table with only the rows whose name the pattern finds; its SHA-256 is its own."""
    return with_names(table, lambda name: names.search(name) is not None)


def event_spans(
    event: Event,
    table: WeightTable | None,
    *,
    state: TableState,
    unchanged_since: SentTable | None = None,
    finding: Finding = Finding(),  # noqa: B008
    limits: Limits = DEFAULT_LIMITS,
) -> EventSpans:
    """The spans of an event, the same for the same arguments.

    ``table``: to be sent with it, for state "included". ``unchanged_since``: the span that has the
    rows already, for state "unchanged". ``finding``: the load beside its reference, the update
    beside its manifest.
    ``limits``: of the message that a span is.
    """
    held = "" if event.table is None else event.table.fingerprint
    if table is not None and table.fingerprint != held:
        # Events that wait share one file of a table whose rows are the same.
        table = without_fingerprints(table)
    # The table's file is not written anew when nothing in it has changed.
    captured_at = 0.0 if event.table is None else event.table.captured_at
    update = event.update
    common: dict[str, Any] = {
        "resource": rank_resource(event.rank_id, event.pid, event.engine, event.device),
        "start_time": nanoseconds(update.started_at),
        # A clock that was set back meanwhile makes no span that ends before it begins.
        "end_time": nanoseconds(max(update.started_at, update.ended_at)),
        "instrumentation_scope": SCOPE,
    }
    failed = Status(StatusCode.ERROR, update.message or "The update failed.")
    context = _context(event, 0)
    attributes = _attributes(event, state, unchanged_since)
    attributes |= _found(event, finding, names=state != "disabled")
    main = partial(
        ReadableSpan,
        f"sglang.weights.{update.action}",
        context=context,
        status=Status(StatusCode.UNSET) if update.succeeded else failed,
        **common,
    )
    if table is None:
        links = [] if unchanged_since is None else [unchanged_since.link]
        return EventSpans((main(attributes=attributes, links=links),), None)
    reserved = _TABLE_ATTRIBUTES_BYTES + encode_spans([main(attributes=attributes)]).ByteSize()
    packed = encode_table(table, captured_at=captured_at, limits=limits, reserved=reserved)
    attributes |= {
        "sglang.weights.table.sha256": table.sha256,
        "sglang.weights.table.rows": table.rows,
        "sglang.weights.table.chunks": sum(map(len, packed)),
        "sglang.weights.table.spans": max(1, len(packed)),
    }
    further = [
        _table_span(event, table, part, _span_events(events, captured_at), Link(context), common)
        for part, events in enumerate(packed[1:], start=1)
    ]
    first = main(
        attributes=attributes,
        events=_span_events(packed[0] if packed else [], captured_at),
        links=[Link(span.context) for span in further],
    )
    return EventSpans((first, *further), _sent(event, table, context))


def _table_span(
    event: Event,
    table: WeightTable,
    part: int,
    events: list[SpanEvent],
    link: Link,
    common: dict[str, Any],
) -> ReadableSpan:
    """A further span of a table that is too large for one."""
    return ReadableSpan(
        TABLE_EVENT,
        context=_context(event, part),
        attributes={
            "sglang.weights.schema_version": SCHEMA_VERSION,
            "sglang.weights.role": event.role,
            "sglang.weights.table.sha256": table.sha256,
            "sglang.weights.table.part": part,
        },
        events=events,
        links=[link],
        **common,
    )


def _sent(event: Event, table: WeightTable, context: SpanContext) -> SentTable | None:
    if event.table is None:
        return None
    return SentTable(
        sha256=event.table.sha256,
        sent_sha256=table.sha256,
        rows=table.rows,
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
    )


def _attributes(
    event: Event, state: TableState, unchanged_since: SentTable | None
) -> dict[str, AttributeValue]:
    """What a span says but for the table that is in it."""
    attributes = _summary(event, names=state != "disabled")
    attributes["sglang.weights.table.state"] = state
    if not event.update.succeeded:
        exception = _EXCEPTION.match(event.update.message)
        attributes["error.type"] = exception[1] if exception else "_OTHER"
    if unchanged_since is not None:
        attributes |= {
            "sglang.weights.table.sha256": unchanged_since.sent_sha256,
            "sglang.weights.table.rows": unchanged_since.rows,
            "sglang.weights.table.trace_id": unchanged_since.trace_id,
            "sglang.weights.table.span_id": unchanged_since.span_id,
        }
    return attributes


def _found(event: Event, found: Finding, *, names: bool) -> Attributes:
    if found.match is None:
        return {}
    beside = "sglang.weights.reference" if event.update.action == "load" else _MANIFEST
    attributes: Attributes = {
        f"{beside}.match": found.match,
        f"{beside}.differing": len(found.differing),
    }
    if names and found.differing:
        attributes[f"{beside}.differing.names"] = found.differing[:NAMED_CHANGES]
    if names and found.renamed:
        names_of = tuple(name for name, _ in found.renamed)
        attributes[f"{beside}.renamed.names"] = names_of[:NAMED_CHANGES]
    return attributes


_MANIFEST = "sglang.weights.manifest"


def _context(event: Event, part: int) -> SpanContext:
    """Ids that follow from the event, so that a span that is sent twice is the same span.

    Further spans of a large table are in traces of their own: backends limit the bytes of a trace
    (Tempo to 5 MB), and a trace holds the spans of all ranks.
    """
    digest = hashlib.sha256(f"{event.rank_id}|{event.number}|{part}".encode()).hexdigest()
    trace_id = event.update.trace_id if part == 0 else ""
    return SpanContext(
        trace_id=int(trace_id or digest[:32], 16),
        span_id=int(digest[32:48], 16),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def rank_resource(rank_id: str, pid: int, engine: Engine, device: Device | None = None) -> Resource:
    """The rank that a span is about; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``
    win."""
    attributes: dict[str, AttributeValue] = {
        "service.name": "sglang",
        "service.version": engine.sglang_version,
        "service.instance.id": rank_id,
        "process.pid": pid,
        "sglang.engine.name": engine.name,
        "sglang.engine.instance": engine.instance,
        "sglang.engine.group": engine.group,
        "sglang.engine.model_name": engine.model_name,
        "sglang.engine.model_path": engine.model_path,
        "sglang.engine.version": engine.sglang_version,
        "sglang.engine.torch_version": engine.torch_version,
    }
    if device is not None and device.uuid:
        # Semantic conventions for hardware.
        attributes |= {"hw.id": device.uuid, "hw.type": "gpu", "hw.name": device.product}
    return resource(attributes)


def resource(attributes: Mapping[str, AttributeValue]) -> Resource:
    """A resource of this host with these attributes; what the environment names wins."""
    return Resource.create({"host.name": socket.gethostname(), **attributes}, SCHEMA_URL).merge(
        OTELResourceDetector().detect()
    )


def _summary(event: Event, *, names: bool) -> Attributes:
    update = event.update
    facts: dict[str, AttributeValue | None] = {
        "schema_version": SCHEMA_VERSION,
        # These are of the resource too, which not every trace store keeps.
        "rank_id": event.rank_id,
        "pid": event.pid,
        "engine": event.engine.name,
        "engine_group": event.engine.group or None,
        "node_rank": event.engine.node_rank,
        "nodes": event.engine.nodes,
        "model_name": event.engine.model_name,
        "role": event.role,
        **event.ranks.labels,
        "device": event.device.name,
        "gpu_uuid": event.device.uuid or None,
        "source": update.source,
        "sequence": update.sequence,
        "event.number": event.number,
        "calls": update.calls,
        "succeeded": update.succeeded,
        "effect": update.effect,
        "message": update.message or None,
        "failed_phase": update.failed_in,
        "model_path": update.model_path or None,
        "version": update.weight_version or None,
        "bytes_brought": update.nbytes,
        **{f"phase.{phase}_seconds": seconds for phase, seconds in update.phases.items()},
    }
    if update.cost is not None:
        facts |= _cost(update.cost)
    if event.weights is not None:
        parts = event.weights
        facts |= {
            "bytes": sum(part.nbytes for part in parts),
            "tensors": sum(part.tensors for part in parts),
            # Sums by device, kind and dtype, as parallel arrays.
            "usage.device": [part.device for part in parts],
            "usage.kind": [part.kind for part in parts],
            "usage.dtype": [part.dtype for part in parts],
            "usage.bytes": [part.nbytes for part in parts],
            "usage.tensors": [part.tensors for part in parts],
        }
    if event.table is not None:
        facts |= {
            "sha256": event.table.sha256,
            "regions": sum(event.table.regions.values()),
            "fingerprint": event.table.fingerprint or None,
        }
    if event.previous_sha256:
        facts["previous_sha256"] = event.previous_sha256
    if update.contents is not None:
        facts |= _contents(update.contents, names=names)
    changes = update.changes
    for change in ("moved", "added", "removed", "resized", "device"):
        facts[f"changes.{change}"] = getattr(changes, change)
        if names and changes.names.get(change):
            facts[f"changes.{change}.names"] = changes.names[change]
    return {f"sglang.weights.{key}": value for key, value in facts.items() if value is not None}


def _contents(contents: ContentChanges, *, names: bool) -> Attributes:
    """Sums by class of layer as parallel arrays."""
    attributes: Attributes = {
        "changed.layers": list(contents.tensors),
        "changed.tensors": list(contents.tensors.values()),
        "changed.bytes": list(contents.nbytes.values()),
    }
    if names and contents.names:
        attributes["changed.names"] = contents.names
    return attributes


def _cost(cost: UpdateCost) -> Attributes:
    return {
        "cost.paused_seconds": cost.paused_seconds,
        "cost.straddling_requests": cost.straddling,
        **{f"cost.requests.{fate}": cost.requests.get(fate, 0) for fate in FATES},
        **{f"cost.discarded.{kind}": cost.discarded.get(kind, 0) for kind in DISCARDED},
    }


def _span_events(events: list[Attributes], captured_at: float) -> list[SpanEvent]:
    timestamp = nanoseconds(captured_at)
    return [SpanEvent(TABLE_EVENT, attributes=each, timestamp=timestamp) for each in events]
