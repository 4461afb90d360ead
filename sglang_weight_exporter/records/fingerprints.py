# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights: what became of them, and what they have shown."""

from __future__ import annotations

from typing import Literal, get_args

from sglang_weight_exporter.records.base import Count, Record
from sglang_weight_exporter.records.weights import Kind

#: Why a fingerprint was not taken: memory is released or may be; it would have taken too long; a
#: CUDA graph was being captured, or a tensor has no bytes that could be read; it failed.
Skip = Literal["released", "time_limit", "unsupported", "error"]
SKIPS: tuple[Skip, ...] = get_args(Skip)

#: When tensors changed that no update had written: between two updates; while memory was released
#: that SGLang keeps a copy of.
During = Literal["serving", "release"]
DURINGS: tuple[During, ...] = get_args(During)


#: What `verify` names in a request of ``set_internal_state``: which part of the fingerprints it
#: asks for, and of how many. No release has settings of these names.
PART, PARTS = "sglang_weight_exporter_part", "sglang_weight_exporter_parts"


class FingerprintCounts(Record, frozen=True, kw_only=True):
    """What became of the fingerprints of a role, and what they have shown."""

    skipped: dict[Skip, Count] = {}
    #: Tensors found with other bytes than the last load or update had left, at each capture.
    modified: dict[During, dict[Kind, Count]] = {}
