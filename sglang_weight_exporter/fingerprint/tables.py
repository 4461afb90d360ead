# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of weights with what their tensors hold.

The engine waits for these, so what follows from a table is worked out once and kept while the
table is the same: which rows are read by their addresses alone, and how a rank's names are sorted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sglang_weight_exporter.fingerprint.arrays import of_arrays, texts
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter, in_memory_order
from sglang_weight_exporter.weight_table import NO_FINGERPRINT, WeightTable, is_dense

_BYTES = len(NO_FINGERPRINT) // 2


class TableFingerprints:
    """Puts fingerprints into tables; keeps for each role what to read."""

    def __init__(self, fingerprinter: Fingerprinter) -> None:
        self._fingerprinter = fingerprinter
        self._rows: dict[str, _Rows] = {}
        self._names: dict[str, _Names] = {}
        self._parts: dict[str, _Parts] = {}

    def take(
        self,
        table: WeightTable,
        tensors: Callable[[], Sequence[torch.Tensor]],
        *,
        skip: frozenset[str],
        limit_seconds: float,
        after: torch.cuda.Stream | None = None,
        begun: bool = False,
    ) -> WeightTable:
        """The table with its tensors' fingerprints, in the order in which they lie in memory.

        ``tensors``: gives those of its rows, where addresses are not enough; ``skip``: names of
        rows that are no weights and get none; ``after``: the stream of forward passes; ``begun``:
        of what devices read by addresses since :meth:`begin`. Raises FingerprintError, and what
        ``tensors`` raises.
        """
        started = time.perf_counter()
        names, rows = self._prepared(table, skip)
        values = np.zeros((table.rows, 2), dtype=np.uint64)
        self._read(rows, values, tensors, limit_seconds, table.role, after, begun=begun)
        return _with(table, names, values, time.perf_counter() - started)

    def begin(
        self, table: WeightTable, *, skip: frozenset[str], after: torch.cuda.Stream | None = None
    ) -> Iterator[torch.cuda.Event]:
        """Have devices begin to read by their addresses what :meth:`take` of the same table takes,
        one after another; when each has ended. Raises FingerprintError."""
        for device, addressed in self._prepared(table, skip)[1].by_address.items():
            yield self._fingerprinter.begin(
                device, addressed.data_ptr, addressed.nbytes, owner=table.role, after=after
            )

    def reads_addresses(self, table: WeightTable, *, skip: frozenset[str]) -> bool:
        """Whether devices can read all of a table by themselves, with no tensor of it touched."""
        return not len(self._prepared(table, skip)[1].by_tensor)

    def take_part(
        self,
        table: WeightTable,
        tensors: Callable[[], Sequence[torch.Tensor]],
        *,
        part: int,
        parts: int,
        skip: frozenset[str],
        limit_seconds: float,
        after: torch.cuda.Stream | None = None,
    ) -> WeightTable | None:
        """The same in parts of about as many bytes, the first of which begins anew; ``None`` unless
        this was the last, and all before it were of the same table. A tensor is in one part."""
        started = time.perf_counter()
        names, rows = self._prepared(table, skip)
        if part == 0:
            values = np.zeros((table.rows, 2), dtype=np.uint64)
            self._parts[table.role] = _Parts(rows, values, rows.cuts(table, parts))
        taken = self._parts.pop(table.role, None)
        if taken is None or taken.rows is not rows or (taken.next, taken.parts) != (part, parts):
            return None
        some = rows.between(*taken.cuts[part : part + 2])
        self._read(some, taken.values, tensors, limit_seconds, f"{table.role} in parts", after)
        taken.next, taken.seconds = part + 1, taken.seconds + time.perf_counter() - started
        if taken.next == parts:
            return _with(table, names, taken.values, taken.seconds)
        self._parts[table.role] = taken
        return None

    def begin_anew(self, role: str) -> None:
        """Parts that were taken are of weights that may be others now."""
        self._parts.pop(role, None)

    def _read(
        self,
        rows: _Rows,
        values: NDArray[np.uint64],
        tensors: Callable[[], Sequence[torch.Tensor]],
        limit_seconds: float,
        owner: str,
        after: torch.cuda.Stream | None,
        *,
        begun: bool = False,
    ) -> None:
        started = time.perf_counter()
        for device, addressed in rows.by_address.items():
            values[addressed.rows] = self._fingerprinter.of_addresses(
                device,
                addressed.data_ptr,
                addressed.nbytes,
                limit_seconds=limit_seconds,
                owner=owner,
                after=after,
                begun=begun,
            )
        if len(rows.by_tensor):
            found = tensors()
            values[rows.by_tensor] = self._fingerprinter(
                [in_memory_order(found[row]) for row in rows.by_tensor.tolist()],
                limit_seconds=limit_seconds - (time.perf_counter() - started),
                owner=owner,
                after=after,
            )

    def _prepared(self, table: WeightTable, skip: frozenset[str]) -> tuple[_Names, _Rows]:
        rows = self._rows.get(table.role)
        if rows is None or rows.sha256 != table.sha256 or rows.skip != skip:
            has_kernels = self._fingerprinter.has_kernels
            rows = self._rows[table.role] = _Rows.of(table, skip, has_kernels=has_kernels)
        names = self._names.get(table.role)
        if names is None or not names.are_those_of(table, rows):
            names = self._names[table.role] = _Names.of(table, rows)
        return names, rows


def _with(
    table: WeightTable, names: _Names, values: NDArray[np.uint64], seconds: float
) -> WeightTable:
    content = values.astype(">u8")
    return msgspec.structs.replace(
        table,
        fingerprints=content.tobytes(),
        fingerprint=names.of_rank(content),
        fingerprint_seconds=seconds,
    )


def without_rows(before: WeightTable, after: WeightTable, skip: frozenset[str]) -> WeightTable:
    """``after``, which has some of the rows of ``before``, with the fingerprints of that one;
    ``skip``: names of rows that get none any more."""
    digits = dict(
        zip(
            before.names.split(b"\n"),
            np.frombuffer(before.fingerprints, dtype=f"V{_BYTES}").tolist(),
            strict=True,
        )
    )
    skipped = {name.encode() for name in skip}
    content = b"".join(
        bytes(_BYTES) if name in skipped else digits.get(name, bytes(_BYTES))
        for name in after.names.split(b"\n")
    )
    values = np.frombuffer(content, dtype=">u8").reshape(-1, 2)
    rows = _Rows.of(after, skip, has_kernels=lambda device: False)
    return msgspec.structs.replace(
        after,
        fingerprints=content,
        fingerprint=_Names.of(after, rows).of_rank(values),
        fingerprint_seconds=before.fingerprint_seconds,
    )


@dataclass(frozen=True)
class _Addressed:
    """Rows of one device whose bytes lie one after another, in the order of the table."""

    rows: NDArray[np.int64]
    data_ptr: NDArray[np.int64]
    nbytes: NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """How each row of a table is read. Rows without memory are not."""

    sha256: str
    skip: frozenset[str]
    by_address: dict[torch.device, _Addressed]
    #: Rows that are read through their tensors.
    by_tensor: NDArray[np.int64]
    #: All of them, in order.
    taken: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        table: WeightTable,
        skip: frozenset[str],
        *,
        has_kernels: Callable[[torch.device], bool],
    ) -> _Rows:
        column = {
            name: np.frombuffer(getattr(table, name), dtype="<u8").astype(np.int64)
            for name in ("data_ptr", "nbytes", "storage_ptr", "storage_nbytes")
        }
        devices = [torch.device(name) for name in table.device_values]
        device = np.frombuffer(table.device, dtype="<u4")
        real = np.array([each.type != "meta" for each in devices], dtype=bool)[device]
        taken = real & ((column["storage_nbytes"] > 0) | (column["nbytes"] == 0))
        if skip:
            names = table.names.decode().split("\n")
            taken &= np.fromiter((name not in skip for name in names), bool, len(names))
        # Conjugates are complex, and their bytes are others than their elements.
        is_real = np.array(["complex" not in name for name in table.dtype_values], dtype=bool)
        end = column["storage_ptr"] + column["storage_nbytes"]
        lies = taken & _dense(table) & is_real[np.frombuffer(table.dtype, dtype="<u4")]
        lies &= column["data_ptr"] + column["nbytes"] <= end
        by_address = {}
        for code, each in enumerate(devices):
            rows = np.flatnonzero(lies & (device == code))
            if len(rows) and has_kernels(each):
                by_address[each] = _Addressed(
                    rows, column["data_ptr"][rows], column["nbytes"][rows]
                )
                taken[rows] = False
        by_tensor = np.flatnonzero(taken)
        addressed = [each.rows for each in by_address.values()]
        return cls(
            table.sha256,
            skip,
            by_address,
            by_tensor,
            np.sort(np.concatenate([by_tensor, *addressed])),
        )

    def cuts(self, table: WeightTable, parts: int) -> list[int]:
        """Rows at which parts of about as many bytes begin, and where the last ends."""
        nbytes = np.zeros(table.rows)
        nbytes[self.taken] = np.frombuffer(table.nbytes, dtype="<u8")[self.taken]
        before = np.concatenate([[0.0], np.cumsum(nbytes)])
        shares = before[-1] * np.arange(1, parts) / parts
        return [0, *np.searchsorted(before, shares).tolist(), table.rows]

    def between(self, first: int, after: int) -> _Rows:
        """Those rows alone."""
        by_address = {}
        for device, all_of in self.by_address.items():
            there = slice(*np.searchsorted(all_of.rows, [first, after]).tolist())
            if there.start < there.stop:
                by_address[device] = _Addressed(
                    all_of.rows[there], all_of.data_ptr[there], all_of.nbytes[there]
                )
        by_tensor, taken = (
            rows[slice(*np.searchsorted(rows, [first, after]).tolist())]
            for rows in (self.by_tensor, self.taken)
        )
        return _Rows(self.sha256, self.skip, by_address, by_tensor, taken)


@dataclass
class _Parts:
    """What was taken of a table whose fingerprints are taken in parts."""

    rows: _Rows
    values: NDArray[np.uint64]
    cuts: list[int]
    next: int = 0
    seconds: float = 0.0

    @property
    def parts(self) -> int:
        return len(self.cuts) - 1


def _dense(table: WeightTable) -> NDArray[np.bool_]:
    """Of each row, whether its elements fill a run of memory."""
    shape = np.frombuffer(table.shape, dtype="<u4").astype(np.uint64)
    strides = max(1, len(table.stride_values))
    pairs = shape * np.uint64(strides) + np.frombuffer(table.stride, dtype="<u4")
    unique, inverse = np.unique(pairs, return_inverse=True)
    dense = [
        is_dense(table.shape_values[pair // strides], table.stride_values[pair % strides])
        for pair in unique.tolist()
    ]
    found: NDArray[np.bool_] = np.array(dense, dtype=bool)[inverse.reshape(-1)]
    return found


@dataclass(frozen=True)
class _Names:
    """What a rank's fingerprint is of, with room for those of its tensors."""

    names: bytes
    rows: NDArray[np.int64]
    #: Rows by name, the bytes of all, and where in them each one's fingerprint belongs.
    order: NDArray[np.int64]
    content: NDArray[np.uint8]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, table: WeightTable, rows: _Rows) -> _Names:
        names = table.names.split(b"\n")
        order = sorted(rows.taken.tolist(), key=names.__getitem__)
        parts = [names[row] + b"\0" + bytes(_BYTES) for row in order]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        return cls(
            names=table.names,
            rows=rows.taken,
            order=np.array(order, dtype=np.int64),
            content=np.frombuffer(b"".join(parts), dtype=np.uint8),
            places=(ends - _BYTES)[:, None] + np.arange(_BYTES),
        )

    def are_those_of(self, table: WeightTable, rows: _Rows) -> bool:
        return (
            self.rows is rows.taken or np.array_equal(self.rows, rows.taken)
        ) and self.names == table.names

    def of_rank(self, values: NDArray[np.uint64]) -> str:
        """``fingerprint.of_rank`` of these tensors. ``values``: big-endian, two a row."""
        content = self.content.copy()
        content[self.places] = values[self.order].view(np.uint8).reshape(-1, _BYTES)
        return texts(of_arrays([content]))[0]
