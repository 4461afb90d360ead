# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank holds beside what was sent to it.

Equal sums are proof. Others are a difference where it is known that the loader takes such a tensor
as it is: by what the zoo has confirmed, or because another layer's tensor of the same name is equal
in this rank, or this one was equal at an earlier update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sglang_weight_exporter.fingerprint import sums
from sglang_weight_exporter.records.shares import Share, reasons_of, shares_of, sums_of
from sglang_weight_exporter.verification.comparison import Comparison
from sglang_weight_exporter.verification.confirmed_loaders import pattern
from sglang_weight_exporter.verification.names import (
    Candidate,
    Names,
    candidates,
    kept_in_one,
    made_of,
    nearest,
)
from sglang_weight_exporter.verification.sent import SentTensor, UnknownShareError
from sglang_weight_exporter.weight_table import Row, WeightTable, table_rows

_IN_PARTS = "it was sent in parts that the engine keeps in one tensor"
_OTHER = "the rank holds something else, and what its loader makes of this is confirmed by nothing"


@dataclass(frozen=True)
class SentComparison:
    """By the names under which tensors were sent; what was not sent by the engine's."""

    comparison: Comparison
    sent: Mapping[str, SentTensor]
    #: Names of what this rank holds of what was sent.
    held: frozenset[str]
    #: What it holds and nobody sent: name → the pattern of the name that it would have.
    unsent: Mapping[str, str]
    #: Patterns of names of which one was equal, now or before.
    proved: frozenset[str]


@dataclass
class _Found:
    """What is known of one name that was sent."""

    equal: bool = True
    nbytes: int = 0
    reasons: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = True

    def add(self, share: Share, row: Row, reason: str | None) -> None:
        """``reason``: as of ``_beside``."""
        self.rows.append(row.name)
        self.places.append((row.data_ptr, share.offset))
        self.nbytes += share.rows * share.columns * sums.WORD_BYTES
        self.whole = self.whole and share.is_whole
        if reason:
            self.reasons.append(reason)
        elif reason is None:
            self.equal = False


def compare_sent(
    table: WeightTable,
    sent: Mapping[str, SentTensor],
    *,
    confirmed: Callable[[str, bool], bool] = lambda row, whole: False,
    proved: Collection[str] = (),
) -> SentComparison | None:
    """``None``: the rank has taken no sums, or others. ``confirmed``: whether the loader is known
    to take the tensor of this name in the engine, whole or a share, as it is; ``proved``: patterns
    of names that were equal before."""
    if table.shares is None or not table.shares.sums:
        return None
    if table.shares.definition != sums.DEFINITION:
        return None
    rows = list(table_rows(table))
    shares = list(shares_of(table.shares))
    held = [candidates(rows[share.row].name, share.part) for share in shares]
    names = Names(sent, [each[0].name for each in held])
    found: dict[str, _Found] = {}
    unsent: dict[str, str] = {}
    alone: dict[str, tuple[int, int]] = {}
    parts: set[str] = set()
    for share, own, there in zip(shares, held, sums_of(table.shares), strict=True):
        row = rows[share.row]
        chosen = _chosen(own, names)
        if chosen is None and (kept := kept_in_one(row.name, names)):
            found.setdefault(row.name, _Found(nbytes=row.nbytes)).reasons.append(_IN_PARTS)
            parts |= kept
            continue
        if chosen is None:
            unsent[own[0].name] = names.pattern_of(own[0].name)
            alone[own[0].name] = row.data_ptr, share.offset
            continue
        name, otherwise = chosen
        reason = otherwise or _beside(share, row, sent[name], there)
        found.setdefault(name, _Found()).add(share, row, reason)
    unknown = _unexplained(table, rows, names, found)
    comparison, now_proved = _verdicts(
        found,
        lambda name: (
            pattern(name) in proved
            or all(confirmed(row, found[name].whole) for row in found[name].rows)
        ),
    )
    places = {place for one in found.values() for place in one.places}
    return SentComparison(
        comparison,
        sent,
        held=frozenset(found).union(unknown, parts).intersection(sent),
        # Tied weights have a name more than was sent.
        unsent={name: of for name, of in unsent.items() if alone[name] not in places},
        proved=now_proved.union(proved),
    )


def _unexplained(
    table: WeightTable, rows: Sequence[Row], names: Names, found: dict[str, _Found]
) -> set[str]:
    """Adds rows of which no share is known; names of what they may be made of."""
    assert table.shares is not None
    unknown: set[str] = set()
    for number, reason in reasons_of(table.shares).items():
        name = names.sent_as(rows[number].name) or rows[number].name
        found.setdefault(name, _Found(nbytes=rows[number].nbytes)).reasons.append(reason)
        unknown.update(made_of(rows[number].name, names))
    return unknown


def _verdicts(
    found: Mapping[str, _Found], is_proved: Callable[[str], bool]
) -> tuple[Comparison, frozenset[str]]:
    """And patterns of the names that are equal."""
    equal = [name for name, one in found.items() if one.equal and not one.reasons]
    proved = frozenset(map(pattern, equal))
    same_place = {place for name in equal for place in found[name].places}
    differing, unverifiable = [], {}
    for name, one in found.items():
        if one.reasons:
            unverifiable[name] = one.reasons[0]
        elif one.equal:
            continue
        elif same_place.issuperset(one.places):
            unverifiable[name] = "it shares memory with a tensor that is what was sent"
        elif pattern(name) in proved or is_proved(name):
            differing.append(name)
        else:
            unverifiable[name] = _OTHER
    nbytes = {name: one.nbytes for name, one in found.items()}
    return Comparison(tuple(equal), tuple(differing), unverifiable, nbytes), proved


def _chosen(own: Sequence[Candidate], names: Names) -> tuple[str, str] | None:
    """The name, and why its sums are not those of a share."""
    for candidate in own:
        name = names.sent_as(candidate.name)
        if name is not None:
            return name, candidate.otherwise
    return None


def _beside(share: Share, row: Row, tensor: SentTensor, there: str) -> str | None:
    """Why it cannot be compared; empty: it is equal; ``None``: it is not."""
    if tensor.dtype != row.dtype:
        return f"it was sent as {tensor.dtype} and is held as {row.dtype}"
    try:
        return "" if tensor.of(share) == there else None
    except UnknownShareError as why:
        return str(why)


def renamed(
    unheld: Collection[str],
    unsent: Mapping[str, str],
    sent: Mapping[str, SentTensor],
    proved: Collection[str],
) -> dict[str, str]:
    """Names that were sent and no rank holds → the name that they were meant to have: one that is
    like it, is held, and was not sent, while tensors of the same dtype and shape with its name in
    other layers were sent and are held. A loader that has names of its own has them in all."""
    kinds = {
        pattern(name): (tensor.dtype, tensor.shape)
        for name, tensor in sent.items()
        if pattern(name) in proved
    }
    found = {}
    for name in unheld:
        kind = (sent[name].dtype, sent[name].shape)
        meant = nearest(name, [each for each, of in unsent.items() if kinds.get(of) == kind])
        if meant is not None:
            found[name] = meant
    return found
