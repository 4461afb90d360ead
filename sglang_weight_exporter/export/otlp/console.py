# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``OTEL_TRACES_EXPORTER=console``: messages as OTLP's JSON, one a line, for people to read."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToJson

from sglang_weight_exporter.export.otlp.client import ExportResult, Transport


class ConsoleTransport:
    """Standard output, which always takes what it is sent.

    ``request``: the type of the messages. ``after``: a collector that gets them first; what it is
    to get again is printed once it has it.
    """

    def __init__(self, request: type[Any], after: Transport | None = None) -> None:
        self._request = request
        self._after = after

    def send(self, body: bytes, seconds: float) -> ExportResult:
        result = ExportResult(True) if self._after is None else self._after.send(body, seconds)
        if result.settled:
            print(MessageToJson(self._request.FromString(body), indent=None), flush=True)
        return result

    def close(self) -> None:
        if self._after is not None:
            self._after.close()
