# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of tensors' bytes and of a rank's weights.

It finds accidents and no forger: it is no cryptographic hash. ``definition`` is what they are,
``arrays`` takes them of bytes with NumPy, ``tensors`` of tensors where they lie with torch and the
``kernel``, ``tables`` of a whole table. What is offered here needs neither torch nor, until it is
called, NumPy.
"""

from __future__ import annotations

from sglang_weight_exporter.fingerprint.arrays import Bytes, of_arrays, of_bytes, of_rank, texts
from sglang_weight_exporter.fingerprint.definition import DEFINITION, as_number

__all__ = ["DEFINITION", "Bytes", "as_number", "of_arrays", "of_bytes", "of_rank", "texts"]
