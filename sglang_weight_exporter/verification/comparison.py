# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Two sets of names and fingerprints: what is equal, what differs, what cannot be said."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Comparison:
    """Names of tensors, each in exactly one place, in the served order."""

    equal: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    #: Name to why it could not be compared.
    unverifiable: dict[str, str] = field(default_factory=dict)
    #: Expected and not served.
    missing: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 when all that can be compared is equal, 1 when something differs, 2 when nothing
        could be compared."""
        if self.differing:
            return 1
        return 0 if self.equal else 2


def compare(
    served: Mapping[str, str],
    expected: Mapping[str, str],
    *,
    unverifiable: Mapping[str, str] | None = None,
    inexact: Set[str] = frozenset(),
) -> Comparison:
    """Compare what a rank serves with what it should serve, both name to fingerprint.

    ``unverifiable``: why ``expected`` lacks a name; ``inexact``: names where equality is proof and
    a difference is none. A name that is expected and not served is no difference: a rank of a
    pipeline holds some layers only, and fused tensors go by other names.
    """
    reasons = unverifiable or {}
    equal, differing = [], []
    unknown: dict[str, str] = {}
    for name, text in served.items():
        if expected.get(name) == text:
            equal.append(name)
        elif name not in expected:
            unknown[name] = reasons.get(
                name, "there is no fingerprint of this name to compare with"
            )
        elif name in inexact:
            unknown[name] = "its bytes are others, which quantization in the engine may explain"
        else:
            differing.append(name)
    missing = tuple(name for name in expected if name not in served)
    return Comparison(tuple(equal), tuple(differing), unknown, missing)


def compare_replicas(one: Mapping[str, str], other: Mapping[str, str]) -> Comparison:
    """Compare two ranks that should hold the same: a name that only one has is a difference."""
    names = dict.fromkeys([*one, *other])
    return Comparison(
        equal=tuple(name for name in names if one.get(name) == other.get(name)),
        differing=tuple(name for name in names if one.get(name) != other.get(name)),
    )
