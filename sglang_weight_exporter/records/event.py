# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One load or update that waits to be exported as a span."""

from __future__ import annotations

from sglang_weight_exporter.records.base import SCHEMA_VERSION, Count, Record
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.records.weights import TableRef, WeightUsage


class Event(Record, frozen=True, kw_only=True):
    """One ended load or update, waiting to be exported as a span."""

    schema: Count = SCHEMA_VERSION
    #: Numbers the events of one rank, from 1.
    number: Count
    rank_id: str
    pid: Count
    engine: Engine
    ranks: Ranks
    role: str
    device: Device
    update: Update
    weights: tuple[WeightUsage, ...] | None = None
    #: The table after the update.
    table: TableRef | None = None
    #: The table's in the event before this one of the same role; equal when nothing changed.
    previous_sha256: str = ""
