# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which share of a logical tensor each row of a table holds, read from the layer that has it.

Every rule is that of the loader of SGLang's class which is named beside it, read from the
attributes that the loader itself uses. A class of another name, a parameter with another loader, a
layer that is quantized, packed or padded in a way that is not known here is not explained, and says
why.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_weight_exporter.capture.tensors import walk
from sglang_weight_exporter.fingerprint import sums
from sglang_weight_exporter.records.shares import (
    SHARED_EXPERT,
    Share,
    ShareTable,
    share_table,
)
from sglang_weight_exporter.weight_table import WeightTable, table_rows


class NoShareError(Exception):
    """Why no share of a row is known."""


#: Methods that leave a parameter as it was loaded (``layers/quantization/unquant.py``).
_PLAIN = frozenset(
    ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod")
)
#: Attributes that say, where they are true, that the parameters are laid out for other kernels.
_LAID_OUT = (
    "use_intel_amx_backend",
    "use_triton_kernels",
    "use_flashinfer_trtllm_moe",
    "use_flashinfer_mxfp4_moe",
    "_mega_moe_weights_built",
    "_dwdp_bound",
)
_LOADERS = frozenset(("weight_loader", "weight_loader_v2"))
_LAYERS = "sglang.srt.layers."


@dataclass(frozen=True)
class _Part:
    """A run of elements along one dimension of a parameter: where it begins there, how many there
    are, where it begins in the logical tensor, and how many that has."""

    name: str
    at: int
    size: int
    start: int
    total: int


def capture_shares(model: torch.nn.Module, table: WeightTable, skip: frozenset[str]) -> ShareTable:
    """``skip``: names of rows that are no weights."""
    owners = _owners(model)
    shares: list[Share] = []
    unexplained: list[tuple[int, str]] = []
    for number, row in enumerate(table_rows(table)):
        if row.name in skip:
            continue
        try:
            owner = owners.get(row.name)
            if owner is None:
                raise NoShareError("the engine computes it")
            if row.shape_in_memory != row.shape or row.stride != _strides(row.shape):
                raise NoShareError("its elements are not in their order in memory")
            module, tensor = owner
            shares += _shares(number, module, tensor)
        except NoShareError as why:
            unexplained.append((number, str(why)))
        except Exception as error:  # An attribute that this release has otherwise.
            unexplained.append((number, f"its layer could not be read ({type(error).__name__})"))
    return share_table(shares, unexplained, definition=sums.DEFINITION)


def _owners(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    return {
        prefix + name: (module, tensor)
        for prefix, module in zip(*walk(model), strict=True)
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def expert_maps() -> bytes:
    """Where experts are now, as bytes that differ when one has moved."""
    placed = _placed_experts()
    return b"" if placed is None else placed.contiguous().numpy().tobytes()


def _placed_experts() -> torch.Tensor | None:
    """Physical expert → logical expert, a row a layer (``eplb/expert_location.py``); ``None``:
    each is where its number says."""
    for name in ("sglang.srt.eplb.expert_location", "sglang.srt.managers.expert_location"):
        module = sys.modules.get(name)
        if module is not None:
            metadata = module.get_global_expert_location_metadata()
            found = None if metadata is None else metadata.physical_to_logical_map_cpu
            return found if isinstance(found, torch.Tensor) else None
    return None


def _shares(row: int, module: torch.nn.Module, tensor: torch.Tensor) -> Iterator[Share]:
    known = _rule(type(module))
    _check_method(module)
    if known is None:
        return iter((_whole(row, tensor),))
    for attribute in _LAID_OUT:
        if getattr(module, attribute, False):
            raise NoShareError(f"it is laid out otherwise than it was sent ({attribute})")
    if getattr(module, "use_presharded_weights", False):
        raise NoShareError("each rank has a checkpoint of its own")
    loader = getattr(tensor, "weight_loader", None)
    own = getattr(loader, "__self__", None) is module
    if loader is not None and not (own and getattr(loader, "__name__", "") in _LOADERS):
        raise NoShareError("it has a loader of its own")
    return known(row, module, tensor)


def _rule(kind: type) -> _Rule | None:
    """A layer's own, or that of the layer which it only calls otherwise, as ``HFCompatibleLinear``
    of ``models/transformers.py``; ``None``: it is no layer that is divided."""
    of_layers = [each for each in kind.__mro__ if each.__name__ in _RULES]
    known = next((each for each in of_layers if each.__module__.startswith(_LAYERS)), None)
    if known is None:
        return None
    for below in kind.__mro__[: kind.__mro__.index(known)]:
        replaced = {name for name, each in vars(below).items() if callable(each)}
        if replaced.intersection(dir(known)) - {"forward"}:
            raise NoShareError(f"{kind.__name__} may load it otherwise than {known.__name__}")
    return _RULES[known.__name__]


def _check_method(module: torch.nn.Module) -> None:
    method = getattr(module, "quant_method", None)
    if method is not None and type(method).__name__ not in _PLAIN:
        raise NoShareError(f"{type(method).__name__} makes something else of what was sent")


def _whole(row: int, tensor: torch.Tensor, part: str = "") -> Share:
    rows, nbytes = sums.matrix(tensor.shape, tensor.element_size())
    return Share(row, part, 0, rows, sums.words_of(nbytes), 0, 0)


def _words(elements: int, tensor: torch.Tensor) -> int:
    nbytes = elements * tensor.element_size()
    if nbytes % sums.WORD_BYTES:
        raise NoShareError("it is cut inside of a word of eight bytes")
    return sums.words_of(nbytes)


def _cut(
    row: int, tensor: torch.Tensor, dim: int, parts: Iterable[_Part], offset: int = 0
) -> Iterator[Share]:
    """Shares of a parameter, or of a tensor inside of it, that is cut along a dimension. Of two
    dimensions at most."""
    item = tensor.element_size()
    height, width = (1, *tensor.shape)[-2:]
    by_rows = dim == 0 and tensor.dim() == 2
    for part in parts:
        if not part.size:
            continue
        if by_rows:
            begins = offset + part.at * width * item
            columns = sums.words_of(width * item)
            yield Share(
                *(row, part.name, begins, part.size, columns, part.start, 0),
                axis="rows",
                total=part.total,
            )
            continue
        if part.size != width and height > 1:
            raise NoShareError("a part of its columns is another tensor's")
        is_all = part.size == width == part.total
        columns = sums.words_of(width * item) if is_all else _words(part.size, tensor)
        yield Share(
            *(row, part.name, offset + part.at * item, height, columns, 0),
            first_column=_words(part.start, tensor),
            axis="columns",
            total=-(-part.total * item // sums.WORD_BYTES),
        )


def _place(module: torch.nn.Module, group: str = "tp_group") -> tuple[int, int]:
    """A layer's rank and how many there are (``get_group_rank_size`` of ``distributed/utils.py``;
    before it, two attributes)."""
    if hasattr(module, group):
        found: Any = getattr(module, group)
        return (0, 1) if found is None else (int(found.rank_in_group), int(found.world_size))
    layer: Any = module
    return int(layer.tp_rank), int(layer.tp_size)


def _expect(tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.dim() not in {1, 2} or tensor.shape[dim] != size:
        raise NoShareError(f"its shape {list(tensor.shape)} is not what its layer says")


_Rule: TypeAlias = Callable[[int, Any, torch.Tensor], Iterator[Share]]


def _replicated(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``ReplicatedLinear``."""
    return iter((_whole(row, tensor),))


def _column(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``ColumnParallelLinear``: rows of the weight, elements of the bias."""
    rank, size = _place(module)
    own = module.output_size // size
    _expect(tensor, 0, own)
    return _cut(row, tensor, 0, [_Part("", 0, own, rank * own, module.output_size)])


def _merged(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``MergedColumnParallelLinear``: each part is divided."""
    rank, size = _place(module)
    parts, at = [], 0
    for number, output in enumerate(module.output_sizes):
        own = output // size
        parts.append(_Part(str(number), at, own, rank * own, output))
        at += own
    _expect(tensor, 0, at)
    return _cut(row, tensor, 0, parts)


def _qkv(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``QKVParallelLinear``: key-value heads are divided, or each is on several ranks."""
    rank, _ = _place(module)
    kv_rank, _ = _place(module, "kv_tp_group") if hasattr(module, "kv_tp_group") else _place(module)
    kv_rank //= module.num_kv_head_replicas
    v_head = getattr(module, "v_head_size", module.head_size)
    parts, at = [], 0
    for name, number, heads, all_heads, head in (
        ("q", rank, module.num_heads, module.total_num_heads, module.head_size),
        ("k", kv_rank, module.num_kv_heads, module.total_num_kv_heads, module.head_size),
        ("v", kv_rank, module.num_kv_heads, module.total_num_kv_heads, v_head),
    ):
        own = heads * head
        parts.append(_Part(name, at, own, number * own, all_heads * head))
        at += own
    _expect(tensor, 0, at)
    return _cut(row, tensor, 0, parts)


def _row(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``RowParallelLinear``: columns of the weight, all of the bias."""
    if tensor.dim() < 2:
        return iter((_whole(row, tensor),))
    rank, size = _place(module)
    own = module.input_size // size
    _expect(tensor, 1, own)
    return _cut(row, tensor, 1, [_Part("", 0, own, rank * own, module.input_size)])


def _vocabulary(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``VocabParallelEmbedding``: its rows of the vocabulary, then zeros."""
    there = module.shard_indices
    first, after = int(there.org_vocab_start_index), int(there.org_vocab_end_index)
    _expect(tensor, 0, int(module.num_embeddings_per_partition))
    if there.num_added_elements:
        raise NoShareError("its vocabulary has rows that were added")
    return _cut(row, tensor, 0, [_Part("", 0, after - first, first, module.org_vocab_size)])


def _experts(row: int, module: Any, tensor: torch.Tensor) -> Iterator[Share]:
    """``FusedMoE``: rows of each expert's gate and up, columns of its down
    (``_load_w13``, ``_load_w2``)."""
    method = module.quant_method
    is_first = tensor is getattr(module, "w13_weight", None)
    if not is_first and tensor is not getattr(module, "w2_weight", None):
        raise NoShareError("of experts only the weights are known")
    if torch.version.hip is not None or getattr(method, "load_up_proj_weight_first", False):
        raise NoShareError("experts are laid out otherwise than they were sent")
    own, size = int(module.intermediate_size_per_partition), int(module.moe_tp_size)
    rank = int(module.moe_tp_rank)
    gated = getattr(getattr(module, "moe_runner_config", None), "is_gated", True)
    halves = ("w1", "w3") if gated else ("w1",)
    expected = own * (len(halves) if is_first else 1)
    if tensor.dim() != 3 or tensor.shape[1 if is_first else 2] != expected:
        raise NoShareError(f"its shape {list(tensor.shape)} is not what its layer says")
    nbytes = tensor[0].nbytes
    for slot, expert in enumerate(_logical_experts(module, tensor.shape[0])):
        if expert is None:
            continue
        if is_first:
            parts = [
                _Part(f"{expert}.{half}", at * own, own, rank * own, own * size)
                for at, half in enumerate(halves)
            ]
        else:
            parts = [_Part(f"{expert}.w2", 0, own, rank * own, own * size)]
        yield from _cut(row, tensor[slot], 0 if is_first else 1, parts, slot * nbytes)


def _logical_experts(module: Any, slots: int) -> list[int | str | None]:
    """Which expert each slot has (``_map_global_expert_id_to_local_expert_id``). The last is the
    one that all tokens share; ``None``: one of several, whose names are not known."""
    shared = int(getattr(module, "num_fused_shared_experts", 0) or 0)
    routed = slots - shared
    first = int(getattr(module, "_expert_storage_rank", module.moe_ep_rank)) * routed
    numbers = list(range(first, first + routed))
    placed = _placed_experts() if getattr(module, "uses_expert_location", True) else None
    if placed is not None and module.layer_id < placed.shape[0]:
        of_layer = array("q", placed[module.layer_id].tolist())
        if first + routed > len(of_layer):
            raise NoShareError("where its experts are placed is not known")
        numbers = list(of_layer[first : first + routed])
    return [*numbers, *[SHARED_EXPERT if shared == 1 else None] * shared]


#: Class → its rule. Others that derive from one of these may load otherwise.
_RULES: dict[str, _Rule] = {
    "ReplicatedLinear": _replicated,
    "ColumnParallelLinear": _column,
    "MergedColumnParallelLinear": _merged,
    "QKVParallelLinear": _qkv,
    "RowParallelLinear": _row,
    "VocabParallelEmbedding": _vocabulary,
    "ParallelLMHead": _vocabulary,
    "FusedMoE": _experts,
    "DeepEPMoE": _experts,
}
