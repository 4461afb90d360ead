# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""For a trainer's process, which has torch and no SGLang: what it sends, as a manifest.

from sglang_weight_exporter import fingerprint_tensors, write_manifest

tensors = {}
for bucket in buckets:  # (name, tensor) pairs, as they are sent
    tensors |= fingerprint_tensors(bucket)
write_manifest("step-100.json", tensors, weight_version="100")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.verification.checkpoint_layout import FusedTensor, fuse
from sglang_weight_exporter.verification.manifest import ManifestTensor


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
