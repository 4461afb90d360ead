# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Pointer tables out of spans: what a collector or a trace store has, put together and verified.

Understood are OTLP as JSON (collectors' file exporters, one request a line; Tempo's API), Jaeger's
API, and spans as OpenTelemetry's SDKs and Phoenix write them. Spans of other programs, and members
that are not known here, are passed over.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableRef
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import WeightTable, without_fingerprints
from sglang_weight_exporter.weight_table_events import (
    MissingRowsError,
    TableEventsError,
    decode_table,
)

_PREFIX = "sglang.weights."


class TraceError(Exception):
    """A file does not hold the whole table; the message says what is missing."""


@dataclass(frozen=True)
class _Span:
    name: str
    trace_id: str
    span_id: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    #: Attributes of its events with a part of a table.
    chunks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def order(self) -> int:
        return int(self.attributes.get(_PREFIX + "event.number", 0))

    def get(self, name: str, default: Any = "") -> Any:
        return self.attributes.get(_PREFIX + name, default)


def tables_from_trace(path: Path, *, trace_id: str = "") -> list[Table]:
    """The newest table of each role of each rank in a file, or those of one trace.

    Raises ``OSError``, and :class:`TraceError` when there is none, or when one is not complete or
    not what was sent.
    """
    try:
        return _tables(path, list(_read(path)), trace_id)
    except RecursionError as error:
        raise TraceError(f"{path} is nested more deeply than any trace, so it is not read.") from (
            error
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(
            f"{path} has a span of ours with an attribute that is none of ours ({error}). "
            "Something on the way changed it."
        ) from error


def _tables(path: Path, spans: list[_Span], trace_id: str) -> list[Table]:
    chunks: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        for chunk in span.chunks:
            chunks.setdefault(str(chunk.get("table.sha256", "")), []).append(chunk)
    newest: dict[tuple[str, str], _Span] = {}
    for span in spans:
        if span.name not in {"sglang.weights.load", "sglang.weights.update"}:
            continue
        if trace_id and span.trace_id != trace_id.lower().removeprefix("0x"):
            continue
        key = (str(span.get("rank_id")), str(span.get("role")))
        if key not in newest or newest[key].order <= span.order:
            newest[key] = span
    if not newest:
        raise TraceError(
            f"{path} holds no span of a load or an update of weights"
            + (f" in the trace {trace_id}" if trace_id else "")
            + f"; it holds {sum(bool(span.name) for span in spans)} spans in all. Spans are "
            "understood in OTLP as JSON and as the APIs of Tempo, Jaeger and Phoenix give them."
        )
    return [_table(path, span, chunks) for span in newest.values()]


def _table(path: Path, span: _Span, chunks: Mapping[str, list[dict[str, Any]]]) -> Table:
    columns = _columns(path, span, chunks)
    resource, name = span.resource, str(span.get("role"))
    fingerprint = str(span.get("fingerprint"))
    if columns.fingerprint != fingerprint:
        # The rows are those of an earlier span; what the tensors hold is not.
        columns = without_fingerprints(columns)
    return Table(
        rank_id=str(span.get("rank_id")),
        pid=int(span.get("pid", 0)),
        started_at=0.0,
        engine=Engine(
            name=str(span.get("engine")),
            instance=str(resource.get("sglang.engine.instance", "")),
            model_name=str(span.get("model_name")),
            model_path=str(resource.get("sglang.engine.model_path", "")),
            sglang_version=str(resource.get("sglang.engine.version", "")),
            torch_version=str(resource.get("sglang.engine.torch_version", "")),
        ),
        ranks=Ranks(
            tp=_rank(span, "tp") or 0,
            pp=_rank(span, "pp") or 0,
            dp=_rank(span, "dp"),
            moe_ep=_rank(span, "moe_ep"),
        ),
        role=Role(
            name=name,
            device=str(span.get("device")),
            table=TableRef(
                file="",
                sha256=columns.sha256,
                rows=columns.rows,
                regions={},
                captured_at=columns.captured_at,
                fingerprint=fingerprint,
            ),
            last_update=Update(
                action="load" if span.name.endswith("load") else "update",
                sequence=int(span.get("sequence", 0)),
                started_at=0.0,
                ended_at=0.0,
                succeeded=bool(span.get("succeeded", True)),
                effect="changed",
            ),
        ),
        weight_version=str(span.get("version")),
        columns=columns,
    )


def _columns(path: Path, span: _Span, chunks: Mapping[str, list[dict[str, Any]]]) -> WeightTable:
    sha256 = str(span.get("table.sha256"))
    whose = f"The span {span.span_id} of the trace {span.trace_id}"
    if not sha256:
        reason = {
            "disabled": "spans were set to carry none (SGLANG_WEIGHT_EXPORTER_SPAN_TABLE)",
            "missing": "it could not be read when the span was made",
        }.get(str(span.get("table.state")), "its attributes do not name one")
        raise TraceError(f"{whose} has no table: {reason}.")
    if sha256 not in chunks and span.get("table.span_id"):
        raise TraceError(
            f"{whose} says that the table is the same as in the span {span.get('table.span_id')} "
            f"of the trace {span.get('table.trace_id')}, which is not in {path}. Get that trace."
        )
    try:
        return decode_table(
            chunks.get(sha256, ()),
            role=str(span.get("role")),
            rows=int(span.get("table.rows", 0)),
            sha256=sha256,
            chunks=span.get("table.chunks", None),
        )
    except MissingRowsError as error:
        further = int(span.get("table.spans", 1)) - 1
        raise TraceError(
            f"{whose} {error}"
            + (
                f" The table continues in {further} further spans, which this span links to and "
                "which are in traces of their own."
                if further > 0
                else ""
            )
        ) from error
    except TableEventsError as error:
        raise TraceError(f"{whose} {error}") from error


def _rank(span: _Span, name: str) -> int | None:
    value = span.get(f"{name}_rank", None)
    return None if value is None else int(value)


# Finding spans.


def _read(path: Path) -> Iterator[_Span]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is no text in UTF-8 ({error}), so it is no JSON.") from error
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    position = space.match(text).end()  # type: ignore[union-attr]
    while position < len(text):
        try:
            document, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise TraceError(f"{path} is not JSON ({error}).") from error
        yield from _spans(document, {}, {})
        position = space.match(text, position).end()  # type: ignore[union-attr]


def _spans(node: Any, resource: dict[str, Any], processes: Mapping[str, Any]) -> Iterator[_Span]:
    if isinstance(node, list):
        for each in node:
            yield from _spans(each, resource, processes)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("resource"), dict):
        resource = _attributes(node["resource"].get("attributes"))
    if isinstance(node.get("processes"), dict):
        processes = node["processes"]
    span_id = _first(node, "spanId", "span_id", "spanID") or _first(node.get("context"), "span_id")
    if span_id and ("name" in node or "operationName" in node):
        if "processID" in node:
            resource = _process(processes.get(str(node["processID"])))
        yield _Span(
            name=str(_first(node, "name", "operationName")),
            trace_id=_hex(
                _first(node, "traceId", "trace_id", "traceID")
                or _first(node.get("context"), "trace_id")
            ),
            span_id=_hex(span_id),
            attributes=_attributes(_first(node, "attributes", "tags")),
            resource=resource,
            chunks=[
                attributes
                for event in _list(_first(node, "events", "logs"))
                if "row.offset"
                in (attributes := _attributes(_first(event, "attributes", "fields")))
            ],
        )
        return
    if "row.offset" in (chunk := _attributes(node.get("attributes"))):
        # A log record with a part of a table, which belongs to the span that the record names.
        yield _Span("", "", _hex(span_id or ""), {}, resource, [chunk])
        return
    for each in node.values():
        yield from _spans(each, resource, processes)


def _process(process: Any) -> dict[str, Any]:
    return {"service.name": _first(process, "serviceName"), **_attributes(_first(process, "tags"))}


def _first(node: Any, *names: str) -> Any:
    """The first of these members that says something; none where there are no members."""
    if not isinstance(node, dict):
        return None
    return next((node[name] for name in names if node.get(name)), None)


def _list(node: Any) -> list[Any]:
    return node if isinstance(node, list) else []


def _hex(value: Any) -> str:
    """An id in hexadecimal digits; protobuf's own JSON has it in base64."""
    text = str(value).removeprefix("0x")
    if len(text) in {16, 32}:
        return text.lower()
    try:
        return base64.b64decode(text, validate=True).hex()
    except ValueError:
        return text


def _attributes(node: Any) -> dict[str, Any]:
    """Attributes as a list of keys and values, or as an object, which may be nested."""
    if isinstance(node, list):
        return {
            str(each["key"]): _value(each.get("value"))
            for each in node
            if isinstance(each, dict) and "key" in each
        }
    flat: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in _attributes(value).items()}
        else:
            flat[key] = _text(value)
    return flat


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return _text(value)
    for kind, content in value.items():
        if content is None:
            continue  # Phoenix names the kinds that a value is not.
        if kind in {"arrayValue", "array_value"}:
            return [_value(each) for each in _list(_first(content, "values"))]
        if kind in {"intValue", "int_value"}:
            with contextlib.suppress(ValueError, TypeError):
                return int(content)  # 64-bit integers are text in protobuf's JSON.
        return _text(content)
    return None


def _text(value: Any) -> Any:
    """The same; JSON can have half of a surrogate pair, which cannot be printed."""
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="backslashreplace").decode()
    return value
