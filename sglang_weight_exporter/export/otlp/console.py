# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``OTEL_TRACES_EXPORTER=console``: messages as OTLP's JSON, one a line, for a look at them."""

from __future__ import annotations

from google.protobuf.json_format import MessageToJson

from sglang_weight_exporter.export.otlp.client import ExportResult, Request


class ConsoleConnection:
    """Standard output, which always takes what it is sent."""

    def send(self, request: Request) -> ExportResult:
        print(MessageToJson(request, indent=None), flush=True)
        return ExportResult(True)

    def close(self) -> None:
        """There is nothing to give up."""
