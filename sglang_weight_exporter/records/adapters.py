# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that are loaded."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from sglang_weight_exporter.records.base import Count, Fingerprint, Record, Seconds

#: How many adapters a snapshot names: those that were loaded last.
NAMED_ADAPTERS = 100

#: What ranks that should serve the same adapters are compared by: their names; names, ranks,
#: scaling and the modules that they are for; and, with fingerprints, what their tensors hold.
Aspect = Literal["names", "settings", "content"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)


class Adapter(Record, frozen=True, kw_only=True):
    """One of them: its tensors are in the host's memory, and a copy is in a slot on the device
    once a request has asked for it, until another needs the slot."""

    name: str
    #: Of its matrices (``r``); ``None``: its configuration does not say.
    rank: Count | None = None
    #: Of its tensors in the host's memory.
    nbytes: Count
    #: When it was first seen; after a load at runtime that is the load's end.
    loaded_at: Seconds
    #: Whether it keeps its slot.
    pinned: bool = False
    #: Index of its slot when this was written; ``None``: it is in none.
    slot: Count | None = None
    #: What its tensors hold, 32 hexadecimal digits; empty where it was not taken.
    fingerprint: Fingerprint = ""


class Adapters(Record, frozen=True, kw_only=True):
    """All of them."""

    count: Count = 0
    nbytes: Count = 0
    #: When one was loaded or unloaded last; ``None``: never.
    changed_at: Seconds | None = None
    #: In the order in which they were loaded, the last :data:`NAMED_ADAPTERS`.
    named: Annotated[tuple[Adapter, ...], msgspec.Meta(max_length=NAMED_ADAPTERS)] = ()
    #: By aspect, 32 hexadecimal digits each; one that is not known is not there.
    hashes: dict[Aspect, Fingerprint] = {}
