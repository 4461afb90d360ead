# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and ranks whose tensors are NumPy arrays, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from published import PublishedRank
from safetensors_files import write

from sglang_weight_exporter import fingerprint
from sglang_weight_exporter.cli import main
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.weight_table import Row, table_of_rows

Arrays = Mapping[str, Any]
NAMES = {"uint16": ("bfloat16", "BF16"), "float32": ("float32", "F32"), "uint8": ("uint8", "U8")}
_RNG = np.random.default_rng(7)


def noise(*shape: int) -> Any:
    """Random bfloat16 numbers, as their bits."""
    return bits(_RNG.standard_normal(shape).astype(np.float32))


def bits(values: Any) -> Any:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def values(held: Any) -> Any:
    return (held.astype(np.uint32) << 16).view(np.float32)


def serve(
    directory: Path,
    tensors: Arrays,
    *,
    architecture: str = "",
    quantization: str = "",
    role: str = "target",
    release: str = "0.5.23",
    tp: int = 0,
    tp_size: int = 1,
    engine: str = "30000",
) -> PublishedRank:
    """A rank that holds these bytes; the same array under two names is the same memory."""
    rank = PublishedRank(directory, engine=engine, ranks=Ranks(tp=tp), role=role, device="cpu")
    rank.engine = msgspec.structs.replace(
        rank.engine, tp_size=tp_size, pp_size=1, ep_size=1, sglang_version=release
    )
    rank.role = msgspec.structs.replace(
        rank.role, architecture=architecture, quantization=quantization
    )
    rows, taken, address = [], {}, 4096
    addresses: dict[int, int] = {}
    for name, array in tensors.items():
        strides = tuple(stride // array.itemsize for stride in array.strides)
        dtype = NAMES[str(array.dtype)][0]
        at = (addresses.setdefault(id(array), address), array.nbytes)
        rows.append(Row(name, *at, dtype, array.shape, strides, "cpu", "parameter", *at))
        taken[name] = fingerprint.of_bytes(np.ascontiguousarray(array).tobytes())
        address += array.nbytes + 512
    table = table_of_rows(rows, role=role, captured_at=time.time())
    rank.publish(
        table=msgspec.structs.replace(
            table,
            fingerprints=bytes.fromhex("".join(taken.values())),
            fingerprint=fingerprint.of_rank(taken),
        )
    )
    return rank


def save(path: Path, tensors: Arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(
        path,
        {
            name: (NAMES[str(array.dtype)][1], list(array.shape), array.tobytes())
            for name, array in tensors.items()
        },
    )


def command(*arguments: str | Path) -> tuple[int, str]:
    """In this process: a start of Python for each case would take most of the time."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as error:
            status = int(str(error.code))
    return status, output.getvalue()
