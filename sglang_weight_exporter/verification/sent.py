# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer sent, as sums of a grid of blocks for each tensor: those of any share that ends on
the grid follow, and parts that several processes wrote add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec

from sglang_weight_exporter.fingerprint import sums
from sglang_weight_exporter.records.shares import Share

#: Into how many parts a manifest allows a tensor to be cut.
CUTS = (1, 2, 4, 8)
#: ``DEFAULT_VOCAB_PADDING_SIZE`` of SGLang's ``layers/vocab_parallel_embedding.py``.
_VOCABULARY_PADDING = 64


#: 32 hexadecimal digits.
Sum = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class UnknownShareError(Exception):
    """A share's sum does not follow from the grid; the message says why."""


class SentTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor that was sent, or the part of it that one process has.

    ``rows`` and ``columns``: where blocks begin, and where the last ends; columns are words of
    eight bytes. The sums are of the blocks between.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    row_sums: tuple[Sum, ...]
    columns: tuple[int, ...]
    column_sums: tuple[Sum, ...]
    #: Words that the sums are of: fewer than the tensor has where others have the rest.
    words: int
    #: Where the block of those words begins, for each dimension.
    offset: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.words == self.rows[-1] * self.columns[-1]

    def of(self, share: Share) -> str:
        """The sum of an engine's share. Raises UnknownShareError."""
        rows, columns = self.rows[-1], self.columns[-1]
        top, left = share.first_row, share.first_column
        bottom, right = min(top + share.rows, rows), min(left + share.columns, columns)
        if (top, bottom) == (0, rows):
            return _between(self.columns, self.column_sums, left, right, "columns")
        if (left, right) == (0, columns):
            return _between(self.rows, self.row_sums, top, bottom, "rows")
        raise UnknownShareError(
            f"the engine has {share.rows} rows of {share.columns} words of it, and {rows} of "
            f"{columns} were sent"
        )


def _between(cuts: Sequence[int], found: Sequence[str], start: int, stop: int, axis: str) -> str:
    if start >= stop:
        return sums.NOTHING
    try:
        first, after = cuts.index(start), cuts.index(stop)
    except ValueError:
        parts = cuts[-1] // math.gcd(start, stop, cuts[-1])
        raise UnknownShareError(
            f"the engine has {axis} {start} to {stop} of {cuts[-1]}, and the manifest has no sum "
            f"of them: write it with {parts} among its cuts"
        ) from None
    return sums.added(found[first:after])


def grid(
    shape: Sequence[int], itemsize: int, cuts: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where blocks of a tensor begin, by rows and by columns, so that each share of each number of
    cuts ends on them."""
    rows, nbytes = sums.matrix(shape, itemsize)
    words = sums.words_of(nbytes)
    elements = shape[-1] if shape else 1
    of_rows, of_columns = {0, rows}, {0, words}
    for cut in cuts:
        if len(shape) > 1:
            of_rows |= _even(rows, cut) | _padded(rows, cut)
        places = _even(elements, cut) | (set() if len(shape) > 1 else _padded(elements, cut))
        of_columns |= {
            at * itemsize // sums.WORD_BYTES
            for at in places
            if not at * itemsize % sums.WORD_BYTES and not nbytes % sums.WORD_BYTES
        }
    return tuple(sorted(of_rows)), tuple(sorted(of_columns))


def _even(size: int, cut: int) -> set[int]:
    return set() if size % cut else {size // cut * part for part in range(cut)}


def _padded(size: int, cut: int) -> set[int]:
    """Of a vocabulary (``VocabParallelEmbedding.__init__``): as if it were filled up."""
    step = _VOCABULARY_PADDING
    if -(-size // step) * step % cut:
        step *= cut
    own = -(-size // step) * step // cut
    return {min(own * part, size) for part in range(cut)}


class JoinError(Exception):
    """Parts do not make a whole; the message says why."""


def joined(parts: Sequence[Mapping[str, SentTensor]]) -> dict[str, SentTensor]:
    """Of each tensor the sums of all parts together. One that several wrote whole is taken once.
    Raises JoinError."""
    held: dict[str, list[SentTensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            held.setdefault(name, []).append(tensor)
    return {name: _joined(name, tensors) for name, tensors in sorted(held.items())}


def _joined(name: str, tensors: Sequence[SentTensor]) -> SentTensor:
    whole = [tensor for tensor in tensors if tensor.is_whole]
    if whole:
        if any(tensor != whole[0] for tensor in whole):
            raise JoinError(
                f"{name} was written whole by several processes that hold different ones."
            )
        return whole[0]
    first = tensors[0]
    alike = {(each.dtype, each.shape, each.rows, each.columns) for each in tensors}
    words = sum(tensor.words for tensor in tensors)
    if len(alike) > 1:
        raise JoinError(f"{name} has another shape, dtype or grid in some of its parts.")
    blocks = [tensor.offset for tensor in tensors if tensor.words]
    if len(set(blocks)) < len(blocks) or words != first.rows[-1] * first.columns[-1]:
        raise JoinError(
            f"{name} has {first.rows[-1] * first.columns[-1]:,} words of eight bytes, and its "
            f"parts have {words:,}: one is missing, or one was written twice."
        )
    return msgspec.structs.replace(
        first,
        words=words,
        offset=(0,) * len(first.shape),
        row_sums=tuple(map(sums.added, zip(*(each.row_sums for each in tensors), strict=True))),
        column_sums=tuple(
            map(sums.added, zip(*(each.column_sums for each in tensors), strict=True))
        ),
    )


def check(name: str, tensor: SentTensor) -> None:
    """Raises ValueError where it is no grid of its shape."""
    for cuts, found in ((tensor.rows, tensor.row_sums), (tensor.columns, tensor.column_sums)):
        ascending = all(one < other for one, other in itertools.pairwise(cuts))
        if not cuts or cuts[0] != 0 or len(found) != len(cuts) - 1 or not ascending:
            raise ValueError(f"{name} has no grid of sums")
    if tensor.rows[-1] != (math.prod(tensor.shape[:-1]) if tensor.shape else 1):
        raise ValueError(f"{name} has a grid of another shape")
