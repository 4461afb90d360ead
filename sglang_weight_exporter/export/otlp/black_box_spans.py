# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is new in a rank's black box → spans of no length, each an error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from sglang_weight_exporter.export.otlp.spans import SCOPE, nanoseconds, rank_resource
from sglang_weight_exporter.records.black_box import BlackBox, Crash, Doing, OutOfMemory
from sglang_weight_exporter.weight_table_events import Attributes, AttributeValue


def black_box_spans(box: BlackBox) -> Iterator[ReadableSpan]:
    """The same for the same box. Without addresses."""
    found: list[tuple[str, float, str, Mapping[str, AttributeValue | None]]] = [
        ("sglang.rank.out_of_memory", error.at, str(error), _out_of_memory(error, box.count))
        for error in box.errors
    ]
    if box.crash is not None:
        crash = box.crash
        text = f"{crash.error}: {crash.message}"
        found.append(("sglang.rank.crash", crash.at, text, _crash(crash, box.count)))
    common = {
        f"sglang.rank.{name}": value
        for name, value in {
            "rank_id": box.rank_id,
            "pid": box.pid,
            "engine": box.engine.name,
            "engine_group": box.engine.group or None,
            "model_name": box.engine.model_name,
            **box.ranks.labels,
        }.items()
    }
    resource = rank_resource(box.rank_id, box.pid, box.engine)
    for part, (name, at, text, attributes) in enumerate(found):
        yield ReadableSpan(
            name,
            context=_context(box, part),
            status=Status(StatusCode.ERROR, text),
            attributes=_present({**common, **attributes}),
            resource=resource,
            start_time=nanoseconds(at),
            end_time=nanoseconds(at),
            instrumentation_scope=SCOPE,
        )


def _out_of_memory(error: OutOfMemory, count: int) -> dict[str, AttributeValue | None]:
    facts: dict[str, AttributeValue | None] = {
        "device": error.device,
        "out_of_memory": count,
        "requested_bytes": error.requested,
        "free_bytes": error.free,
        "limit_bytes": error.limit,
        "largest_free_block_bytes": error.largest_free,
        "elsewhere_bytes": error.elsewhere,
        "owners.name": [owner.name for owner in error.owners],
        "owners.part": [owner.part for owner in error.owners],
        "owners.bytes": [owner.nbytes for owner in error.owners],
        "took_seconds": error.seconds,
        **_doing(error.doing),
    }
    if error.memory is not None:
        facts |= {"reserved_bytes": error.memory.reserved, "released_bytes": error.memory.released}
        facts |= {f"memory.{part}_bytes": size for part, size in (error.memory.parts or {}).items()}
    found = {f"sglang.rank.{name}": value for name, value in facts.items()}
    return {**found, "error.type": "OutOfMemoryError"}


def _crash(crash: Crash, count: int) -> dict[str, AttributeValue | None]:
    facts = {**_doing(crash.doing), "out_of_memory": count}
    return {
        **{f"sglang.rank.{name}": value for name, value in facts.items()},
        # Semantic conventions for errors and exceptions.
        "error.type": crash.error,
        "exception.type": crash.error,
        "exception.message": crash.message,
        "exception.stacktrace": "\n".join(crash.where),
    }


def _doing(doing: Doing) -> dict[str, AttributeValue | None]:
    updates = doing.updates.values()
    return {
        "updates.role": list(doing.updates),
        "updates.source": [update.source or "" for update in updates],
        "updates.phase": [update.phase for update in updates],
        "operations": list(doing.operations),
    }


def _present(attributes: Mapping[str, AttributeValue | None]) -> Attributes:
    return {name: value for name, value in attributes.items() if value not in (None, [])}


def _context(box: BlackBox, part: int) -> SpanContext:
    """Ids that follow from the box, so that a span that is sent twice is the same span."""
    digest = hashlib.sha256(f"{box.rank_id}|black box|{box.number}|{part}".encode()).hexdigest()
    return SpanContext(
        trace_id=int(digest[:32], 16),
        span_id=int(digest[32:48], 16),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
