# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""For a trainer's process, which has torch and no SGLang: what it sends, as a manifest.

from sglang_weight_exporter import sum_tensors, write_manifest

tensors = {}
for bucket in buckets:  # (name, tensor) pairs, as they are sent
    tensors |= sum_tensors(bucket)
write_manifest("manifest_100.json", tensors, weight_version="100")
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint import sums, tensor_sums
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter, FingerprintError, has_memory
from sglang_weight_exporter.verification import manifest
from sglang_weight_exporter.verification.checkpoint_layout import FusedTensor, fuse
from sglang_weight_exporter.verification.manifest import Manifest, ManifestTensor, Shard
from sglang_weight_exporter.verification.megatron import Cut, hugging_face
from sglang_weight_exporter.verification.sent import CUTS, SentTensor, grid


class Sharded(NamedTuple):
    """The part of a tensor that this process has: a block of it."""

    local: torch.Tensor
    #: Of the whole tensor.
    shape: tuple[int, ...]
    #: Where the block begins in it, for each dimension.
    offset: tuple[int, ...]


def sum_tensors(
    named_tensors: Mapping[str, torch.Tensor | Sharded]
    | Iterable[tuple[str, torch.Tensor | Sharded]],
    *,
    cuts: Sequence[int] = CUTS,
) -> dict[str, SentTensor]:
    """What tensors on any device hold, by name, so that each share of an engine which cuts them
    into so many parts can be compared; read where they lie.

    Of a ``DTensor`` that is in pieces, and of ``Sharded``, the piece that is here; one that another
    process has as well is left to the first of them. Each process writes its own with
    ``write_manifest(..., part=(rank, ranks))``, and pieces add up. Raises FingerprintError where a
    piece is no block of its tensor, or has no bytes.
    """
    found = {}
    for name, tensor in dict(named_tensors).items():
        block = _block(name, tensor)
        if block is not None:
            found[name] = _sums(name, block, cuts)
    return found


def megatron_tensors(
    named_parameters: Iterable[tuple[str, torch.Tensor]], cut: Cut
) -> dict[str, Sharded]:
    """The shards of a Megatron-Core GPT that are here, under the names of Hugging Face under which
    they are sent. ``cut``: how they are cut. Raises UnknownParameterError."""
    return {
        block.name: Sharded(block.local, block.shape, block.offset)
        for name, tensor in named_parameters
        for block in hugging_face(name, tensor.detach(), cut)
    }


def _block(name: str, tensor: torch.Tensor | Sharded) -> Sharded | None:
    """What is here of a tensor; ``None``: another process has the same and writes it."""
    if isinstance(tensor, Sharded):
        return tensor
    if not hasattr(tensor, "placements"):
        return Sharded(tensor, tuple(tensor.shape), (0,) * tensor.dim())
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    placements, mesh = tensor.placements, tensor.device_mesh
    if any(type(each) not in {Replicate, Shard} for each in placements):
        raise FingerprintError(
            f"{name} is placed as {placements}, so what is here is no block of it. Make it whole "
            "first (full_tensor()), or sum what is sent."
        )
    place = mesh.get_coordinate()
    if place is None or any(
        at for at, each in zip(place, placements, strict=True) if each.is_replicate()
    ):
        return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return Sharded(tensor.to_local(), tuple(tensor.shape), tuple(offset))


def _sums(name: str, block: Sharded, cuts: Sequence[int]) -> SentTensor:
    local = block.local.detach()
    if hasattr(type(local), "__tensor_flatten__") or not has_memory(local):
        raise FingerprintError(f"{name} ({type(local).__name__}) has no bytes to read.")
    rows, columns = grid(block.shape, local.element_size(), cuts)
    of_rows = np.zeros((len(rows) - 1, 2), dtype=np.uint64)
    of_columns = np.zeros((len(columns) - 1, 2), dtype=np.uint64)
    words = 0
    for matrix, row, column in _matrices(name, local, block.shape, block.offset):
        by_row, by_column = tensor_sums.grid(matrix, row, column, rows, columns)
        of_rows += by_row
        of_columns += by_column
        words += matrix.numel()
    return SentTensor(
        dtype=str(local.dtype).removeprefix("torch."),
        shape=block.shape,
        rows=rows,
        row_sums=tuple(tensor_sums.texts(of_rows)),
        columns=columns,
        column_sums=tuple(tensor_sums.texts(of_columns)),
        words=words,
        offset=tuple(block.offset),
    )


def _matrices(
    name: str, local: torch.Tensor, shape: Sequence[int], offset: Sequence[int], row: int = 0
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Words of the block, and where each matrix of them begins in the whole."""
    if not local.numel():
        return
    inner = shape[1:-1]
    if local.dim() > 2 and tuple(local.shape[1:-1]) != tuple(inner):
        below = math.prod(inner)
        for number, part in enumerate(local.unbind()):
            yield from _matrices(
                name, part, shape[1:], offset[1:], row + (offset[0] + number) * below
            )
        return
    item = local.element_size()
    if local.dim() and local.shape[-1] != shape[-1]:
        ends = offset[-1] * item, (offset[-1] + local.shape[-1]) * item
        if any(end % sums.WORD_BYTES and end != shape[-1] * item for end in ends):
            raise FingerprintError(
                f"{name} is cut inside of a word of eight bytes. Make it whole first, or sum what "
                "is sent."
            )
    first = row + (offset[0] * math.prod(inner) if local.dim() > 1 else 0)
    column = offset[-1] * item // sums.WORD_BYTES if local.dim() else 0
    yield tensor_sums.words_of(local), first, column


def write_manifest(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    weight_version: str = "",
    shard: Shard | None = None,
    cuts: Sequence[int] | None = None,
    part: tuple[int, int] | None = None,
) -> Manifest:
    """Write what ``sum_tensors`` or ``fingerprint_tensors`` gave to ``path``, whole or not at all;
    with ``cuts`` the tensors themselves. ``part``: which of how many processes write one manifest
    together; each writes a file of its own, with its number in the name, and whoever reads them
    adds them up."""
    if cuts is not None:
        tensors = sum_tensors(tensors, cuts=cuts)
    return manifest.write_manifest(
        path, tensors, weight_version=weight_version, shard=shard, part=part
    )


def fingerprint_tensors(
    named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    fused: bool = False,
) -> dict[str, ManifestTensor]:
    """What tensors on any device hold, by name, for a manifest; read where they lie.

    For a trainer's process: of a state dict, or of each bucket that is sent, as
    ``tensors |= fingerprint_tensors(bucket)``. Needs torch. Tensors that are in pieces (DTensor)
    have to be whole, as they are when they are sent; else FingerprintError is raised.

    ``fused``: ``q_proj``, ``k_proj`` and ``v_proj`` as ``qkv_proj``, ``gate_proj`` and ``up_proj``
    as ``gate_up_proj``, which is what an engine without tensor parallelism holds, where all parts
    are in the same call; a copy of one fused tensor at a time is made for it.
    """
    named = dict(named_tensors)
    take = Fingerprinter()
    declared = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in named.items()
    }
    layout = {name: FusedTensor((name,), *each) for name, each in declared.items()}
    if fused:
        layout = fuse(declared)
    whole = [name for name, tensor in layout.items() if len(tensor.parts) == 1]
    taken = dict(zip(whole, fingerprint.texts(take([named[name] for name in whole])), strict=True))
    for name, tensor in layout.items():
        if name not in taken:
            joined = torch.cat([named[part].detach() for part in tensor.parts])
            taken[name] = fingerprint.texts(take([joined]))[0]
    return {
        name: ManifestTensor(fingerprint=taken[name], dtype=tensor.dtype, shape=tensor.shape)
        for name, tensor in layout.items()
    }
