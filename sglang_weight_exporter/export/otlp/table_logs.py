# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The pointer table as log records beside a span, or in place of its events.

OpenTelemetry deprecates span events for new code: what happens in a span is a log record with its
context. The attributes are the same, and so is the size: a message of logs for a message of spans.
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber


def table_logs(spans: Any, context: Any) -> ExportLogsServiceRequest:
    """The events of the spans in an ``ExportTraceServiceRequest`` as log records.

    ``context``: the span whose table it is, which may be another one than has the events.
    """
    logs = ExportLogsServiceRequest()
    for part in spans.resource_spans:
        resource = logs.resource_logs.add(resource=part.resource, schema_url=part.schema_url)
        for scope in part.scope_spans:
            records = resource.scope_logs.add(scope=scope.scope, schema_url=scope.schema_url)
            for span in scope.spans:
                for event in span.events:
                    records.log_records.append(
                        LogRecord(
                            event_name=event.name,
                            time_unix_nano=event.time_unix_nano,
                            observed_time_unix_nano=time.time_ns(),
                            severity_number=SeverityNumber.SEVERITY_NUMBER_INFO,
                            trace_id=context.trace_id,
                            span_id=context.span_id,
                            attributes=event.attributes,
                        )
                    )
    return logs


def without_table(spans: Any) -> Any:
    """The same request with the table nowhere in its span: no event, and no link to another."""
    (span,) = spans.resource_spans[0].scope_spans[0].spans
    span.ClearField("events")
    span.ClearField("links")
    for attribute in span.attributes:
        if attribute.key == "sglang.weights.table.spans":
            attribute.value.int_value = 1
    return spans
