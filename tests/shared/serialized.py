# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors as SGLang's ``MultiprocessingSerializer`` writes them, for an engine of this host."""

from __future__ import annotations

import base64
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # Whose reductions the pickler then has.


def serialized(name: str, tensor: torch.Tensor) -> str:
    """A file in shared memory: the other way of torch's needs a common parent."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    return base64.b64encode(bytes(ForkingPickler.dumps([(name, tensor)]))).decode()
