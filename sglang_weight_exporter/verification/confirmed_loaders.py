# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of which it is proved what SGLang's loader makes of a checkpoint.

The proof is tests/zoo: it has loaded each architecture, and the bytes of these tensors were those
that ``checkpoint_layout`` makes. By that, other bytes are a difference. It holds for the release,
the device, the architecture, the quantization and the tensors that were tried, and for
shares of them only where it was tried with tensor parallelism.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import msgspec

from sglang_weight_exporter.records.base import Record

#: Written by tests/zoo.
PATH = Path(__file__).with_name("confirmed_loaders.json")


class Confirmed(Record, frozen=True, kw_only=True):
    """Names of tensors with ``*`` in place of numbers."""

    whole: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()

    def covers(self, name: str, *, whole: bool) -> bool:
        return pattern(name) in (self.whole if whole else self.shares)


#: By release, device, architecture and quantization (empty: none).
Loaders = dict[str, dict[str, dict[str, dict[str, Confirmed]]]]


def pattern(name: str) -> str:
    """A tensor's name in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@functools.cache
def loaders() -> Loaders:
    return msgspec.json.decode(PATH.read_bytes(), type=Loaders)


def confirmed(release: str, device: str, architecture: str, quantization: str) -> Confirmed | None:
    """What was confirmed of this loader, if anything was. ``device``: a GPU's product, or ``cpu``
    with what its weights are packed for."""
    of_release = loaders().get(release, {}).get(device, {})
    return of_release.get(architecture, {}).get(quantization)
