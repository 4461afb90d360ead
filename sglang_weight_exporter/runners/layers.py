# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which class of layer a tensor is of: by the classes of the modules that it hangs in, from the
innermost outwards; by its name, where these say nothing."""

from __future__ import annotations

import re

import torch

from sglang_weight_exporter.records.contents import Layer

#: Names of SGLang's classes and of those of its models, the first that fits at each module.
#: Anchored at their end: ``Qwen3MoeDecoderLayer`` is no mixture of experts, it has one.
_CLASSES: tuple[tuple[Layer, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"Norm(Gated?)?\d*$")),
    ("experts", re.compile(r"FusedMoE|EPMoE|Experts(WithLoRA)?$")),
    ("embedding", re.compile(r"((?<!Rotary)Embed(dings?)?|LMHead)(WithLoRA)?$")),
    (
        "attention",
        re.compile(r"(Attention|Attn|MLA|DeltaNet|Mixer\d*|Mamba\d*|ShortConv)(WithLoRA)?$"),
    ),
    ("mlp", re.compile(r"(MLP|Mlp|FeedForward|FFN|MoE|Moe|Mo[eE]Block)(WithLoRA)?$")),
)

#: Parts of a tensor's name, between dots.
_NAMES: tuple[tuple[Layer, re.Pattern[str]], ...] = (
    ("experts", re.compile(r"experts$")),
    ("norm", re.compile(r".*norm|ln_?\d*$|ln_f$")),
    ("embedding", re.compile(r".*embed|wte$|wpe$|lm_head$")),
    ("attention", re.compile(r".*(attn|attention|mixer|mamba)|[qkvo]_proj$|qkv_proj$")),
    ("mlp", re.compile(r".*(mlp|ffn|feed_forward|moe)|(gate|up|down|gate_up)_proj$|w[123]$")),
)


class Layers:
    """The classes of one model's tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._types = {name: type(module) for name, module in model.named_modules()}
        #: Path of a module → its class, by the modules.
        self._known: dict[str, Layer | None] = {}
        self._by_type: dict[type, Layer | None] = {}

    def of(self, name: str) -> Layer:
        """Of a tensor by its name in the table."""
        path, _, _ = name.rpartition(".")
        found = self._of_module(path)
        if found in {None, "mlp"}:
            # What holds experts, where no class says so, is called that in every model.
            by_name = _by_name(name)
            return by_name if found is None or by_name == "experts" else "mlp"
        assert found is not None
        return found

    def _of_module(self, path: str) -> Layer | None:
        if path in self._known:
            return self._known[path]
        kind = self._types.get(path)
        found = None if kind is None else self._of_type(kind)
        if found is None and path:
            found = self._of_module(path.rpartition(".")[0])
        self._known[path] = found
        return found

    def _of_type(self, kind: type) -> Layer | None:
        if kind not in self._by_type:
            names = [each.__name__ for each in kind.__mro__]
            self._by_type[kind] = next(
                (layer for layer, named in _CLASSES for name in names if named.search(name)), None
            )
        return self._by_type[kind]


def _by_name(name: str) -> Layer:
    parts = name.split(".")
    for layer, named in _NAMES:
        if any(map(named.match, parts)):
            return layer
    return "other"
