# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a checkpoint a tensor of SGLang's is made of: fused, sliced, padded, tied.

A rule is read off SGLang's own loaders (the functions are named beside it) and fitted to the
shape that the tensor has in the engine, so that no model's class need be known. What a rule gives
is proof where it agrees. Where it does not, the rule may be another than the loader's; whether that
is a difference is said by ``confirmed_loaders``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.verification.checkpoint import Checkpoint, StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: SGLang's fused layers and what they are made of (``stacked_params_mapping`` of its models).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
#: ``DEFAULT_VOCAB_PADDING_SIZE`` of ``layers/vocab_parallel_embedding.py``.
VOCABULARY_PADDING = 64


class UnverifiableError(Exception):
    """No simple rule says which bytes a tensor should have; the message says why."""


@dataclass(frozen=True)
class ServedTensor:
    """A tensor as the engine has it."""

    name: str
    dtype: str
    #: Its dimensions in the order of memory.
    shape: tuple[int, ...]
    #: Parameter or buffer.
    kind: str = "parameter"


@dataclass(frozen=True)
class Slice:
    """Part of a stored tensor along one dimension."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Derivation:
    """Slices that follow one another, then zeros."""

    slices: tuple[Slice, ...]
    padding_bytes: int = 0
    #: Whether it is all that the file has of them, and no rank's share.
    whole: bool = True


def derive(
    served: ServedTensor,
    stored: Mapping[str, StoredTensor],
    *,
    tp_rank: int,
    tp_size: int,
    config: Mapping[str, Any],
) -> Derivation:
    """What ``served`` is made of. Raises UnverifiableError.

    ``config``: the checkpoint's ``config.json``; may be empty.
    """
    name = served.name
    if name == "lm_head.weight" and (name not in stored or config.get("tie_word_embeddings")):
        # Models with tie_word_embeddings leave it out, or SGLang does (``models/llama.py``).
        name = "model.embed_tokens.weight"
    if name in stored:
        slices, padding = _direct(served, stored[name], name, tp_rank, tp_size)
    else:
        prefix, fused, suffix = _split(name)
        if fused not in FUSED:
            raise UnverifiableError(
                "the engine computes it" if served.kind != "parameter" else _why_not(name)
            )
        parts = [f"{prefix}{part}{suffix}" for part in FUSED[fused]]
        missing = [part for part in parts if part not in stored]
        if missing:
            raise UnverifiableError(f"the checkpoint has no {missing[0]} for it")
        shapes = [stored[part].shape for part in parts]
        if fused == "qkv_proj":
            rows = _qkv_rows(served, shapes, tp_rank, tp_size, config)
        else:
            rows = _merged_rows(served, shapes, tp_rank, tp_size)
        slices = tuple(
            Slice(part, 0, start, stop) for part, (start, stop) in zip(parts, rows, strict=True)
        )
        padding = 0
    dtypes = {stored[part.name].dtype for part in slices}
    if dtypes != {served.dtype}:
        raise UnverifiableError(
            f"the engine holds {served.dtype}, the checkpoint {', '.join(sorted(dtypes))}"
        )
    whole = all(_is_whole(part, stored[part.name]) for part in slices)
    return Derivation(slices, padding, whole)


def _is_whole(part: Slice, stored: StoredTensor) -> bool:
    return not stored.shape or part.stop - part.start == stored.shape[part.dim]


def _split(name: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(.*\.)([^.]+)(\.[^.]+)", name)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def _why_not(name: str) -> str:
    if ".experts." in name:
        return "experts are stacked, in an order that depends on the back end"
    return "the checkpoint has no tensor of this name, and no rule makes it"


@dataclass(frozen=True)
class FusedTensor:
    """A tensor as an engine without tensor parallelism has it: rows of these, one after another."""

    parts: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


def fuse(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, FusedTensor]:
    """SGLang's names and what they are made of, of dtypes and shapes by name. What lacks a part,
    or has parts that do not fit one another, stays what it is."""
    found: dict[str, FusedTensor] = {}
    fused_of = {part: fused for fused, parts in FUSED.items() for part in parts}
    for name, (dtype, shape) in tensors.items():
        prefix, part, suffix = _split(name)
        fused = fused_of.get(part)
        parts = [f"{prefix}{each}{suffix}" for each in FUSED[fused]] if fused else []
        held = [tensors[each] for each in parts if each in tensors]
        fit = all(each[0] == dtype and each[1] and each[1][1:] == shape[1:] for each in held)
        if not parts or len(held) < len(parts) or not fit:
            found[name] = FusedTensor((name,), dtype, shape)
        else:
            rows = sum(each[1][0] for each in held)
            found[f"{prefix}{fused}{suffix}"] = FusedTensor(tuple(parts), dtype, (rows, *shape[1:]))
    return found


def _direct(
    served: ServedTensor, stored: StoredTensor, name: str, tp_rank: int, tp_size: int
) -> tuple[tuple[Slice, ...], int]:
    """The tensor itself or a rank's share of it (``load_column_parallel_weight`` and
    ``load_row_parallel_weight`` of ``layers/parameter.py``: ``narrow(dim, rank * size, size)``)."""
    if served.shape == stored.shape or math.prod(served.shape) == math.prod(stored.shape) == 1:
        return (Slice(name, 0, 0, stored.shape[0] if stored.shape else 1),), 0
    if len(served.shape) != len(stored.shape):
        raise UnverifiableError(
            f"its shape is {list(served.shape)}, in the checkpoint {list(stored.shape)}"
        )
    dims = [
        dim
        for dim, (here, there) in enumerate(zip(served.shape, stored.shape, strict=True))
        if here != there
    ]
    if len(dims) == 1:
        dim = dims[0]
        here, there = served.shape[dim], stored.shape[dim]
        if here and there % here == 0 and tp_size % (there // here) == 0:
            # Where attention is data parallel, its groups are smaller than the ranks' number
            # (``compute_dp_attention_world_info`` of ``layers/dp_attention.py``).
            start = tp_rank % (there // here) * here
            return (Slice(name, dim, start, start + here),), 0
        padded = -(-there // VOCABULARY_PADDING) * VOCABULARY_PADDING
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if vocabulary and dim == 0 and here and padded % here == 0:
            # ``VocabParallelEmbedding.weight_loader``: rows beyond the vocabulary are zero.
            start = min(tp_rank % (padded // here) * here, there)
            stop = min(start + here, there)
            row = stored.nbytes // there
            return (Slice(name, 0, start, stop),), (here - (stop - start)) * row
    raise UnverifiableError(
        f"its shape is {list(served.shape)}, in the checkpoint {list(stored.shape)}"
    )


def _same_columns(served: ServedTensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if any(shape[1:] != served.shape[1:] or not shape for shape in shapes) or not served.shape:
        raise UnverifiableError(
            f"its shape is {list(served.shape)}, of its parts "
            f"{', '.join(str(list(shape)) for shape in shapes)}"
        )


_Heads: TypeAlias = Annotated[int, msgspec.Meta(ge=1)] | None


class _TextSettings(msgspec.Struct):
    """What is asked of ``config.json``, as transformers' ``PretrainedConfig`` has it."""

    num_attention_heads: _Heads = None
    num_key_value_heads: _Heads = None


class _Settings(_TextSettings):
    #: Of a model that sees or hears, those of its language model.
    text_config: _TextSettings | None = None


def _qkv_rows(
    served: ServedTensor,
    shapes: Sequence[tuple[int, ...]],
    tp_rank: int,
    tp_size: int,
    config: Mapping[str, Any],
) -> list[tuple[int, int]]:
    """``QKVParallelLinear`` of ``layers/linear.py``: query heads are divided; key and value heads
    too, or each is held by several ranks when there are fewer heads than ranks."""
    _same_columns(served, shapes)
    try:
        settings = msgspec.convert(config, _Settings)
    except (msgspec.ValidationError, UnicodeError) as error:  # A name that is half a character.
        raise UnverifiableError(f"`config.json` says nothing of its heads ({error})") from error
    of_text = settings if settings.text_config is None else settings.text_config
    heads, kv_heads = of_text.num_attention_heads, of_text.num_key_value_heads
    for size in range(1, tp_size + 1):
        if tp_size % size or shapes[0][0] % size:
            continue
        replicas = size // kv_heads if kv_heads and size > kv_heads else 1
        rank = tp_rank % size
        rows = []
        for number, shape in enumerate(shapes):
            count = shape[0] * (replicas if number else 1) // size
            start = (rank // replicas if number else rank) * count
            rows.append((start, start + count))
        if sum(stop - start for start, stop in rows) == served.shape[0]:
            return rows
    raise UnverifiableError(
        f"its {served.shape[0]} rows are no rank's share of {shapes[0][0]}, {shapes[1][0]} and "
        f"{shapes[2][0]} ({heads} query heads, {kv_heads} key-value heads)"
    )


def _merged_rows(
    served: ServedTensor, shapes: Sequence[tuple[int, ...]], tp_rank: int, tp_size: int
) -> list[tuple[int, int]]:
    """``MergedColumnParallelLinear`` of ``layers/linear.py``: each part is divided."""
    _same_columns(served, shapes)
    total = sum(shape[0] for shape in shapes)
    size = total // served.shape[0] if served.shape[0] else 0
    if not size or total % served.shape[0] or tp_size % size or any(s[0] % size for s in shapes):
        raise UnverifiableError(f"its {served.shape[0]} rows are no rank's share of {total}")
    rank = tp_rank % size
    return [(rank * shape[0] // size, (rank + 1) * shape[0] // size) for shape in shapes]


@dataclass(frozen=True)
class _Columns:
    """Bytes ``first`` to ``after`` of each row of ``row_bytes``, read with the rows around them."""

    stored: fingerprint.Bytes
    row_bytes: int
    first: int
    after: int

    @property
    def _width(self) -> int:
        return self.after - self.first

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes // self.row_bytes * self._width if self.row_bytes else 0

    def __getitem__(self, piece: slice) -> NDArray[np.uint8]:
        start, stop, _ = piece.indices(self.nbytes)
        if start >= stop or self.row_bytes == self.stored.nbytes:
            return self.stored[self.first + start : self.first + max(start, stop)]
        top, bottom = start // self._width, -(-stop // self._width)
        rows = self.stored[top * self.row_bytes : bottom * self.row_bytes]
        own = rows.reshape(-1, self.row_bytes)[:, self.first : self.after].reshape(-1)
        return own[start - top * self._width : stop - top * self._width]


@dataclass(frozen=True)
class _Zeros:
    nbytes: int

    def __getitem__(self, piece: slice) -> NDArray[np.uint8]:
        import numpy as np

        start, stop, _ = piece.indices(self.nbytes)
        return np.zeros(max(0, stop - start), dtype=np.uint8)


@dataclass(frozen=True)
class _Joined:
    """One after the other."""

    parts: tuple[fingerprint.Bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, piece: slice) -> NDArray[np.uint8]:
        import numpy as np

        start, stop, _ = piece.indices(self.nbytes)
        pieces, at = [], 0
        for part in self.parts:
            first, after = max(start - at, 0), min(stop - at, part.nbytes)
            if first < after:
                pieces.append(part[first:after])
            at += part.nbytes
        return np.concatenate([*pieces, np.empty(0, dtype=np.uint8)])


def bytes_of(derivation: Derivation, checkpoint: Checkpoint) -> fingerprint.Bytes:
    """The bytes that the engine should hold, read when slices of them are asked for."""
    parts: list[fingerprint.Bytes] = []
    for part in derivation.slices:
        stored = checkpoint.tensors[part.name]
        size = stored.shape[part.dim] if stored.shape else 1
        outer = math.prod(stored.shape[: part.dim])
        inner = stored.nbytes // (outer * size) if outer * size else 0
        parts.append(
            _Columns(
                checkpoint.bytes_of(part.name), size * inner, part.start * inner, part.stop * inner
            )
        )
    if derivation.padding_bytes:
        parts.append(_Zeros(derivation.padding_bytes))
    return _Joined(tuple(parts))


def fused_bytes(tensor: FusedTensor, checkpoint: Checkpoint) -> fingerprint.Bytes:
    return _Joined(tuple(map(checkpoint.bytes_of, tensor.parts)))


@dataclass(frozen=True)
class Expected:
    """What a rank's tensors should hold."""

    fingerprints: dict[str, str]
    #: Name to why there is none.
    unverifiable: dict[str, str]
    #: Those that hold all that the file has, and no share of it.
    whole: frozenset[str]
    #: Names of the checkpoint's tensors that are in any of them.
    used: frozenset[str]


def expected_fingerprints(
    served: Sequence[ServedTensor], checkpoint: Checkpoint, *, tp_rank: int, tp_size: int
) -> Expected:
    """Reads the bytes that are compared, on all cores. Raises CheckpointError."""
    config = checkpoint.config()
    held: dict[str, fingerprint.Bytes] = {}
    unverifiable: dict[str, str] = {}
    derivations: dict[str, Derivation] = {}
    for tensor in served:
        try:
            derivation = derive(
                tensor, checkpoint.tensors, tp_rank=tp_rank, tp_size=tp_size, config=config
            )
        except UnverifiableError as error:
            unverifiable[tensor.name] = str(error)
            continue
        derivations[tensor.name] = derivation
        held[tensor.name] = bytes_of(derivation, checkpoint)
    return Expected(
        checkpoint.fingerprints(held),
        unverifiable,
        frozenset(name for name, derivation in derivations.items() if derivation.whole),
        frozenset(part.name for each in derivations.values() for part in each.slices),
    )
