# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whose every byte is that torch's allocator has of a GPU: segments and known tensors → parts.

Each byte of each segment counts once, so the parts sum to what is reserved, less what the memory
saver has released. Reads nothing: recorded segments give the same account without a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_weight_exporter.capture.allocations import DEFAULT_POOL, Addresses, Segments
from sglang_weight_exporter.records.memory import MEMORY_PARTS, MemoryPart

Mask = npt.NDArray[np.bool_]

#: The memory saver's tags (`sglang.srt.constants`) → the parts that say which pool a tag's is.
#: A derived weight says nothing: scratch is taken for one until it is found to change.
_LIES_IN: dict[str, tuple[MemoryPart, ...]] = {
    "weights": ("weights",),
    "kv_cache": ("kv_pool", "kv_tables"),
}
GRAPHS = "cuda_graph"
_DISTINGUISHING = tuple(part for part in MEMORY_PARTS if part != "derived_weights")


@dataclass(frozen=True)
class OwnedStorages:
    """Storages of one part, by address and bytes."""

    part: MemoryPart
    start: Addresses
    nbytes: Addresses


@dataclass(frozen=True)
class Account:
    """Of one GPU. ``parts`` are ``None`` where ``reason`` says why they cannot be known."""

    parts: dict[MemoryPart, int] | None
    released: int = 0
    reason: str = ""


#: OwnedStorages bytes of each block, by part.
_Owned = dict[MemoryPart, npt.NDArray[np.int64]]


def account(
    segments: Segments,
    known: Iterable[OwnedStorages],
    *,
    device: int,
    released: Collection[str] = (),
    graph_pools: Collection[tuple[int, int]] | None = None,
) -> Account:
    """The account of the GPU with this index.

    ``released``: tags whose memory the saver has given back. ``graph_pools``: pools that CUDA
    graphs are captured into, where SGLang says which; ``None``: it does not.

    Pools are told apart by what lies in them. The memory saver has one for each of its tags, with
    weights or KV pool inside; tensors of a graph are freed once it is captured and belong to its
    replays all the same, so of a graph's pool everything counts.
    """
    owned = _owners(segments, known)
    here = segments.device == device
    of_graphs, reason = _graph_segments(segments, owned, graph_pools), ""
    gone = np.zeros(len(here), dtype=bool)
    for tag in released:
        if tag == GRAPHS:
            gone |= of_graphs
            continue
        holding = _segments_with(segments, owned, _LIES_IN[tag])
        if (holding & here & ~segments.private).any() and not (
            holding & here & segments.private
        ).any():
            # torch_memory_saver before 0.0.9.
            reason = "the memory saver's regions are not in pools of their own"
        gone |= segments.private & np.isin(segments.pool, segments.pool[holding & segments.private])
    for tag, parts in _LIES_IN.items():
        if tag not in released and (gone & here & _segments_with(segments, owned, parts)).any():
            reason = "one pool of the memory saver holds what is released and what is not"
    if reason:
        return Account(None, reason=reason)
    return Account(
        _parts(segments, owned, here & ~gone, of_graphs),
        released=int(segments.nbytes[here & gone].sum()),
    )


@dataclass(frozen=True)
class Rest:
    """What of one GPU's segments is no owner's."""

    #: Of each segment of all GPUs, whether CUDA graphs are captured into its pool.
    of_graphs: Mask
    #: The largest free block that a tensor outside of private pools could have; 0: there is none.
    largest_free: int
    #: Address and bytes of the largest live block that is of no known storage, if there is one.
    largest_live: tuple[int, int] | None


def rest(
    segments: Segments,
    known: Iterable[OwnedStorages],
    *,
    device: int,
    graph_pools: Collection[tuple[int, int]] | None = None,
) -> Rest:
    """``graph_pools``: as in :func:`account`."""
    owned = _owners(segments, known)
    of_graphs = _graph_segments(segments, owned, graph_pools)
    place = segments.block_segment
    here = (segments.device == device)[place]
    free = here & ~segments.block_active & ~segments.private[place]
    live = here & segments.block_active & ~of_graphs[place] & (_of_all(owned) == 0)
    largest = int(np.argmax(np.where(live, segments.block_nbytes, 0))) if live.any() else None
    return Rest(
        of_graphs=of_graphs,
        largest_free=int(segments.block_nbytes[free].max(initial=0)),
        largest_live=None
        if largest is None
        else (int(segments.block_start[largest]), int(segments.block_nbytes[largest])),
    )


def elsewhere(segments: Segments, start: Addresses, nbytes: Addresses) -> int:
    """Bytes of storages that lie in none of the allocator's segments."""
    order = np.argsort(segments.start)
    ordered, end = segments.start[order], (segments.start + segments.nbytes)[order]
    if not len(ordered):
        return int(nbytes.sum())
    index = np.searchsorted(ordered, start, side="right").astype(np.int64) - 1
    inside = (index >= 0) & (start < end[index])
    return int(nbytes[~inside].sum())


def _owners(segments: Segments, known: Iterable[OwnedStorages]) -> _Owned:
    """Which part owns how much of each block. What several claim counts for one of them; for a
    derived weight only where nobody else does: a module may refer to what is a pool's."""
    known = [each for each in known if len(each.start)]
    others = [each for each in known if each.part != "derived_weights"]
    owned = _claimed(segments, others)
    if len(others) < len(known):
        of_all, of_others = (_of_all(each) for each in (_claimed(segments, known), owned))
        owned["derived_weights"] = of_all - of_others
    return owned


def _of_all(owned: _Owned) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.sum(list(owned.values()), axis=0, dtype=np.int64)
    return total


def _claimed(segments: Segments, known: list[OwnedStorages]) -> _Owned:
    """How much of each block these own; what several of them claim is the first one's."""
    owned: _Owned = {part: np.zeros(len(segments.block_start), np.int64) for part in MEMORY_PARTS}
    if not known or not len(segments.block_start):
        return owned
    start = np.concatenate([each.start for each in known])
    end = start + np.concatenate([each.nbytes for each in known])
    part = np.repeat(np.arange(len(known)), [len(each.start) for each in known])
    order = np.lexsort((part, start))
    start, end, part = start[order], end[order], part[order]
    furthest = np.maximum.accumulate(end)
    start[1:] = np.maximum(start[1:], furthest[:-1])
    blocks = np.argsort(segments.block_start)
    ordered = segments.block_start[blocks]
    index = np.searchsorted(ordered, start, side="right").astype(np.int64) - 1
    block = blocks[index]
    inside = (index >= 0) & segments.block_active[block] & (start < end)
    block_end = segments.block_start[block] + segments.block_nbytes[block]
    inside &= start < block_end
    nbytes = (np.minimum(end, block_end)[inside] - start[inside]).astype(np.int64)
    for number, each in enumerate(known):
        mine = part[inside] == number
        np.add.at(owned[each.part], block[inside][mine], nbytes[mine])
    return owned


def _segments_with(segments: Segments, owned: _Owned, parts: Iterable[MemoryPart]) -> Mask:
    """Segments that hold something of these parts."""
    found = np.zeros(len(segments.start), dtype=bool)
    for part in parts:
        found[segments.block_segment[owned[part] > 0]] = True
    return found


def _graph_segments(
    segments: Segments, owned: _Owned, named: Collection[tuple[int, int]] | None
) -> Mask:
    """Segments of pools that graphs are captured into.

    torch numbers the pool of a single graph in the first place of its name; one that was made to
    be shared, and every other pool, in the second.
    """
    holding = _segments_with(segments, owned, _DISTINGUISHING)
    of_graphs = np.zeros(len(segments.start), dtype=bool)
    for code, pool in enumerate(segments.pools):
        if pool == DEFAULT_POOL:
            continue
        mine = segments.pool == code
        anonymous = not (holding & mine).any()
        if pool[0] or (pool in named if named is not None else anonymous):
            of_graphs |= mine
    return of_graphs


def _parts(
    segments: Segments, owned: _Owned, there: Mask, of_graphs: Mask
) -> dict[MemoryPart, int]:
    block_there, block_of_graphs = there[segments.block_segment], of_graphs[segments.block_segment]
    size = segments.block_nbytes.astype(np.int64)
    requested = np.minimum(segments.block_requested.astype(np.int64), size)
    covered = _of_all(owned)
    parts = {part: int(of_part[block_there].sum()) for part, of_part in owned.items()}
    parts["cuda_graphs"] += int((size - covered)[block_there & block_of_graphs].sum())
    plain = block_there & ~block_of_graphs
    live = plain & segments.block_active
    asked = np.maximum(requested, covered)
    parts["other_tensors"] += int((asked - covered)[live].sum())
    parts["rounding"] += int((size - asked)[live].sum())
    in_use = np.zeros(len(there), dtype=bool)
    in_use[segments.block_segment[segments.block_active]] = True
    free = plain & ~segments.block_active
    split = in_use[segments.block_segment]
    parts["fragments"] += int(size[free & split].sum())
    parts["cached"] += int(size[free & ~split].sum())
    return parts
