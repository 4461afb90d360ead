# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes and tensors of weights, and the pointer table of a role."""

from __future__ import annotations

from typing import Literal, get_args

from sglang_weight_exporter.records.base import Record

Kind = Literal["parameter", "buffer", "derived"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Change = Literal["added", "removed", "resized", "device"]
CHANGES: tuple[Change, ...] = get_args(Change)


class WeightUsage(Record, frozen=True, kw_only=True):
    """Bytes and tensors of one device, kind and dtype.

    ``nbytes`` sums unique storages, each counted once, under the first tensor that uses it
    (parameters before buffers); ``tensors`` counts names, so a tied tensor counts twice here.
    """

    device: str
    kind: Kind
    dtype: str
    nbytes: int
    tensors: int
    #: Bytes of storages that these tensors use and that count elsewhere: at the target whose
    #: embeddings a draft uses, or at the weight-cache daemon that they are mapped from.
    shared: int = 0


class TableRef(Record, frozen=True, kw_only=True):
    """Where the pointer table of a role lies, and what is in it."""

    #: File name inside the rank's directory.
    file: str
    #: The table's fingerprint (`weight_table.table_sha256`), hexadecimal.
    sha256: str
    rows: int
    #: Device name to number of contiguous regions.
    regions: dict[str, int]
    captured_at: float
    #: What the tensors hold, as :func:`fingerprint.of_rank` says, in 32 hexadecimal digits, and
    #: how long it took; empty and ``None`` where it was not taken, or the memory is released.
    fingerprint: str = ""
    fingerprint_seconds: float | None = None
    #: Parameters and derived weights that hold other bytes than the last load or update left in
    #: them: how many, and the names of :data:`NAMED_CHANGES` of them.
    #: ``None``: not known, because nobody has looked at them when it ended, or looks now.
    modified: int | None = None
    modified_names: tuple[str, ...] = ()
    #: Tensors that looked like weights and that forward passes write: in no fingerprint, and where
    #: they are plain attributes of modules, in no table and no sum.
    scratch: int = 0
    scratch_names: tuple[str, ...] = ()


class TableChanges(Record, frozen=True, kw_only=True):
    """How the table after an update differs from the table before it.

    The name lists are cut at :data:`NAMED_CHANGES` entries; the counts are complete.
    """

    moved: int = 0
    added: int = 0
    removed: int = 0
    resized: int = 0
    device: int = 0
    names: dict[str, tuple[str, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self.moved or self.added or self.removed or self.resized or self.device)


#: How many names of changed tensors an event carries for each change.
NAMED_CHANGES = 100
