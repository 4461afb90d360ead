# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes and tensors of weights, and the pointer table of a role."""

from __future__ import annotations

from typing import Literal, get_args

from sglang_weight_exporter.records.base import (
    Count,
    DeviceName,
    FileName,
    Fingerprint,
    Record,
    Seconds,
    Sha256,
)

Kind = Literal["parameter", "buffer", "derived"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Change = Literal["added", "removed", "resized", "device"]
CHANGES: tuple[Change, ...] = get_args(Change)


class WeightUsage(Record, frozen=True, kw_only=True):
    """Bytes and tensors of one device, kind and dtype.

    ``nbytes`` sums unique storages, each counted once, under the first tensor that uses it
    (parameters before buffers); ``tensors`` counts names, so a tied tensor counts twice here.
    """

    device: DeviceName
    kind: Kind
    dtype: str
    nbytes: Count
    tensors: Count
    #: Bytes of storages that these tensors use and that count elsewhere: at the target whose
    #: embeddings a draft uses, or at the weight-cache daemon that they are mapped from.
    shared: Count = 0


class TableRef(Record, frozen=True, kw_only=True):
    """Where the pointer table of a role lies, and what is in it."""

    #: File name inside the rank's directory.
    file: FileName
    #: The table's fingerprint (`weight_table.table_sha256`), hexadecimal.
    sha256: Sha256
    rows: Count
    #: Device name to number of contiguous regions.
    regions: dict[DeviceName, Count]
    captured_at: Seconds
    #: What the tensors hold, as :func:`fingerprint.of_rank` says, in 32 hexadecimal digits, and
    #: how long it took; empty and ``None`` where it was not taken, or the memory is released.
    fingerprint: Fingerprint = ""
    fingerprint_seconds: Seconds | None = None
    #: Parameters and derived weights that hold other bytes than the last load or update left in
    #: them: how many, and the names of :data:`NAMED_CHANGES` of them.
    #: ``None``: not known, because they were not captured when it ended, or are not now.
    modified: Count | None = None
    modified_names: tuple[str, ...] = ()
    #: Tensors that looked like weights and that forward passes write: in no fingerprint, and where
    #: they are plain attributes of modules, in no table and no sum.
    scratch: Count = 0
    scratch_names: tuple[str, ...] = ()


class TableChanges(Record, frozen=True, kw_only=True):
    """How the table after an update differs from the table before it.

    The name lists are cut at :data:`NAMED_CHANGES` entries; the counts are complete.
    """

    moved: Count = 0
    added: Count = 0
    removed: Count = 0
    resized: Count = 0
    device: Count = 0
    names: dict[str, tuple[str, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self.moved or self.added or self.removed or self.resized or self.device)


#: How many names of changed tensors an event carries for each change.
NAMED_CHANGES = 100
