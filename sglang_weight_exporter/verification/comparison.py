# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Two sets of names and fingerprints: what is equal, what differs, what cannot be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Comparison:
    """Names of tensors, each in exactly one place, in the served order."""

    equal: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    #: Name to why it could not be compared.
    unverifiable: dict[str, str] = field(default_factory=dict)
    #: Bytes of each that is served.
    nbytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def equal_bytes(self) -> int:
        return sum(self.nbytes.get(name, 0) for name in self.equal)

    @property
    def all_bytes(self) -> int:
        """Of what is equal, different, and not comparable."""
        names = (*self.equal, *self.differing, *self.unverifiable)
        return sum(self.nbytes.get(name, 0) for name in names)

    def is_enough(self, required: float) -> bool:
        """Whether so great a share of the bytes is equal, and any at all."""
        return 0 < self.equal_bytes >= required * self.all_bytes


def compare(
    served: Mapping[str, str],
    expected: Mapping[str, str],
    nbytes: Mapping[str, int],
    *,
    unverifiable: Mapping[str, str] | None = None,
    doubted: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare what a rank serves with what it should serve, both name to fingerprint.

    ``unverifiable``: why ``expected`` lacks a name; ``doubted``: names where equality is proof and
    a difference is none, and why. A name that is expected and not served is no difference: a rank
    of a pipeline holds some layers only, and fused tensors go by other names.
    """
    reasons, doubts = unverifiable or {}, doubted or {}
    equal, differing = [], []
    unknown: dict[str, str] = {}
    for name, text in served.items():
        if expected.get(name) == text:
            equal.append(name)
        elif name not in expected:
            unknown[name] = reasons.get(
                name, "there is no fingerprint of this name to compare with"
            )
        elif name in doubts:
            unknown[name] = doubts[name]
        else:
            differing.append(name)
    return Comparison(tuple(equal), tuple(differing), unknown, nbytes)


def compare_replicas(
    one: Mapping[str, str],
    other: Mapping[str, str],
    nbytes: Mapping[str, int],
    *,
    doubted: Callable[[str], str] = lambda name: "",
) -> Comparison:
    """Compare two ranks that should hold the same: a name that only one has is a difference.
    ``doubted``: why a name's difference is none; empty where it is one."""
    names = dict.fromkeys([*one, *other])
    unequal = [name for name in names if one.get(name) != other.get(name)]
    return Comparison(
        equal=tuple(name for name in names if one.get(name) == other.get(name)),
        differing=tuple(name for name in unequal if not doubted(name)),
        unverifiable={name: doubted(name) for name in unequal if doubted(name)},
        nbytes=nbytes,
    )
