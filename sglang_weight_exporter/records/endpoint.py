# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the exporter process says of itself."""

from __future__ import annotations

from sglang_weight_exporter.records.base import SCHEMA_VERSION, Count, Record, Seconds


class ExporterEndpoint(Record, frozen=True, kw_only=True):
    """What the exporter process says of itself in ``exporter.json``."""

    schema: Count = SCHEMA_VERSION
    pid: Count
    started_at: Seconds
    version: str
    #: ``None`` until the port could be bound.
    url: str | None = None
    #: Why there is no URL, or not as it was configured, as one sentence.
    problem: str = ""
