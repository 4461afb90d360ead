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
from sglang_weight_exporter.capture.fingerprint import Fingerprinter
from sglang_weight_exporter.manifest import ManifestTensor


def fingerprint_tensors(
    named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> dict[str, ManifestTensor]:
    """What tensors on any device hold, by name, for a manifest; read where they lie.

    For a trainer's process: of a state dict, or of each bucket that is sent, as
    ``tensors |= fingerprint_tensors(bucket)``. Needs torch. Tensors that are in pieces (DTensor)
    have to be whole, as they are when they are sent; else FingerprintError is raised.
    """
    named = dict(named_tensors)
    taken = fingerprint.texts(Fingerprinter()(list(named.values())))
    return {
        name: ManifestTensor(
            fingerprint=text,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
        )
        for (name, tensor), text in zip(named.items(), taken, strict=True)
    }
