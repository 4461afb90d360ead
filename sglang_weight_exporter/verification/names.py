# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Under which names what an engine holds may have been sent."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from sglang_weight_exporter.records.shares import SHARED_EXPERT
from sglang_weight_exporter.verification.checkpoint_layout import FUSED
from sglang_weight_exporter.verification.confirmed_loaders import pattern

#: Of ``q``, ``k``, ``v`` and of merged parts, which one it is (``stacked_params_mapping``).
_NUMBER = {"q": 0, "k": 1, "v": 2}
#: What a layer's experts are called (``make_expert_params_mapping``): Hugging Face's names, and
#: those of Mixtral's first checkpoint.
_EXPERT = {"w1": ("gate_proj", "w1"), "w2": ("down_proj", "w2"), "w3": ("up_proj", "w3")}
#: The expert that all tokens share, of Qwen's and of DeepSeek's models.
_SHARED = ("shared_expert", "shared_experts")
#: Ends of names, and what Hugging Face's models have there (``hf_to_sglang_mapper`` of
#: ``models/transformers.py``, ``models/granitemoe.py``).
_ALSO = {
    "lm_head.weight": "embed_out.weight",
    "block_sparse_moe.gate.weight": "block_sparse_moe.router.layer.weight",
}
#: Experts in one tensor: of Hugging Face's later models, and of GraniteMoE's.
_STACKED = {
    "w13_weight": ("experts.gate_up_proj", "input_linear.weight"),
    "w2_weight": ("experts.down_proj", "output_linear.weight"),
}
#: What the engine keeps in one tensor of one layer, and its parts where they are sent
#: (``models/deepseek_common/deepseek_weight_loader.py``).
_KEPT_IN_ONE = {"fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}
#: A layer's tensor whose name has no ``self_attn`` in the engine (``models/qwen3_next.py``).
_SHORTENED = re.compile(r"(.*\blayers\.\d+\.)([^.]+\.[^.]+)")
#: How alike a name has to be to be called the nearest, of difflib's ratio.
_ALIKE = 0.6


class Candidate(NamedTuple):
    """A name, and why the sums of what is sent under it are not those of a share: a word's place
    in its tensor is in them."""

    name: str
    otherwise: str = ""


_FUSED = "it was sent in one tensor with others that the engine keeps apart: sum each part"


def candidates(row: str, part: str) -> list[Candidate]:
    """Names of the logical tensor that a row's part is, the likeliest first."""
    found = _candidates(row.replace(".base_layer.", "."), part)
    return found + [
        Candidate(f"{match[1]}self_attn.{match[2]}", each.otherwise)
        for each in found
        if (match := _SHORTENED.fullmatch(each.name))
    ]


def _candidates(row: str, part: str) -> list[Candidate]:
    if not part:
        also = [row.removesuffix(end) + name for end, name in _ALSO.items() if row.endswith(end)]
        return [Candidate(name) for name in (row, *also)]
    expert, _, weight = part.rpartition(".")
    if expert:
        layer, _, stack = row.rpartition(".")
        module = layer.removesuffix("experts")
        if expert == SHARED_EXPERT:
            name = f"{_EXPERT[weight][0]}.weight"
            return [Candidate(f"{module}{each}.{name}") for each in _SHARED]
        return [
            *(Candidate(f"{layer}.{expert}.{name}.weight") for name in _EXPERT[weight]),
            *(Candidate(module + name, _FUSED) for name in _STACKED.get(stack, ())),
        ]
    match = re.fullmatch(r"(.*\.)([^.]+)(\.[^.]+)", row)
    parts = FUSED.get(match[2], ()) if match else ()
    number = _NUMBER[part] if part in _NUMBER else int(part)
    found = []
    if match and number < len(parts):
        found.append(Candidate(f"{match[1]}{parts[number]}{match[3]}"))
    return [*found, Candidate(row, _FUSED)]


class Names:
    """Finds what was sent under names that the engine's differ from by a prefix.

    A wrapper of a multimodal model, or of a trainer, puts components in front of all names or
    changes them (``model.language_model.layers`` and ``language_model.model.layers``). A prefix
    stands for the one that most names of the engine say, and for no other.
    """

    def __init__(self, sent: Collection[str], held: Iterable[str]) -> None:
        self._sent = sent if isinstance(sent, Mapping | set | frozenset) else set(sent)
        self._patterns = set(map(pattern, sent))
        by_end: dict[tuple[str, ...], list[str]] = {}
        for name in sent:
            by_end.setdefault(_end(name), []).append(name)
        votes: Counter[tuple[str, str]] = Counter()
        for name in held:
            if name not in self._sent:
                votes.update(
                    prefixes
                    for other in by_end.get(_end(name), ())
                    if (prefixes := _prefixes(name, other)) is not None
                )
        self._prefixes: dict[str, str] = {}
        for (own, theirs), _ in votes.most_common():
            self._prefixes.setdefault(own, theirs)

    def sent_as(self, name: str) -> str | None:
        """The name that it was sent under; ``None``: under none."""
        if name in self._sent:
            return name
        return next((found for found in self._otherwise(name) if found in self._sent), None)

    def pattern_of(self, name: str) -> str:
        """In the trainer's names, where other layers' tensors of this name were sent."""
        there = (pattern(each) for each in (name, *self._otherwise(name)))
        return next((each for each in there if each in self._patterns), pattern(name))

    def below(self, module: str) -> set[str]:
        """What was sent of a module."""
        fronts = tuple(f"{each}." for each in (module, *self._otherwise(module)))
        return {name for name in self._sent if name.startswith(fronts)}

    def _otherwise(self, name: str) -> Iterator[str]:
        """With another prefix, the longest first."""
        components = name.split(".")
        for end in range(len(components) - 1, -1, -1):
            theirs = self._prefixes.get(".".join(components[:end]))
            if theirs is not None:
                yield ".".join(filter(None, [theirs, *components[end:]]))


def made_of(row: str, names: Names) -> set[str]:
    """Names of what was sent that a row is made of in a way that is not known."""
    row = row.replace(".base_layer.", ".")
    match = re.fullmatch(r"(.*\.)([^.]+)(\.[^.]+)", row)
    if match is None:
        return set()
    parts = [f"{match[1]}{part}{match[3]}" for part in FUSED.get(match[2], ())]
    found = {name for each in parts if (name := names.sent_as(each)) is not None}
    if match[2] == "experts":
        found |= names.below(f"{match[1]}experts")
    return found


def kept_in_one(row: str, names: Names) -> set[str]:
    """Names of what was sent that the engine keeps in this row, one behind the other."""
    front, _, kind = row.replace(".base_layer.", ".").rpartition(".")
    module, _, fused = front.rpartition(".")
    parts = [f"{module}.{part}.{kind}" for part in _KEPT_IN_ONE.get(fused, ())]
    return {name for each in parts if (name := names.sent_as(each)) is not None}


def _end(name: str) -> tuple[str, ...]:
    return tuple(name.rsplit(".", 2)[-2:])


def _prefixes(own: str, theirs: str) -> tuple[str, str] | None:
    """What is in front of the longest end that two names share; ``None`` where a layer's number is
    in it."""
    one, other = own.split("."), theirs.split(".")
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    fronts = one[: len(one) - same], other[: len(other) - same]
    if any(component.isdigit() for front in fronts for component in front):
        return None
    return ".".join(fronts[0]), ".".join(fronts[1])


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like it, if one is."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=_ALIKE)
    return found[0] if found else None
