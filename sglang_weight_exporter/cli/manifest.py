# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``manifest``: what a checkpoint or a running rank holds, as names and fingerprints."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import msgspec

from sglang_weight_exporter.cli.choice import (
    CommandError,
    add_choice,
    choices,
    chosen_tables,
    exit_status,
)
from sglang_weight_exporter.cli.flags import add_flags
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError
from sglang_weight_exporter.store.tables import TableError
from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.verification.checkpoint_layout import fuse, fused_bytes
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestTensor,
    Shard,
    encode,
    manifest_of,
    manifest_of_table,
    save,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write name and fingerprint of every tensor as JSON: of a checkpoint, under "
        "its names, or of a running rank, under SGLang's, as its last load, update or verify found "
        "them. Exit status: 0, or 2 when it cannot be read."
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="a directory of safetensors files, or one such file",
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="with a checkpoint: q_proj, k_proj and v_proj as qkv_proj, gate_proj and up_proj as "
        "gate_up_proj, as an engine without tensor parallelism has them",
    )
    running = parser.add_argument_group("in place of a checkpoint, a running rank of this host")
    add_choice(running, role="target")
    add_flags(parser, "runtime_dir")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: standard output"
    )
    parser.add_argument(
        "--weight-version",
        metavar="VERSION",
        help="kept in the file (default: the running rank's)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    errors = (CheckpointError, RuntimeDirError, TableError)
    return exit_status(partial(_write, arguments), *errors)


def _write(arguments: argparse.Namespace) -> int:
    manifest = _held(arguments)
    if arguments.weight_version is not None:
        manifest = msgspec.structs.replace(manifest, weight_version=arguments.weight_version)
    if arguments.output is None:
        sys.stdout.buffer.write(encode(manifest))
        sys.stdout.buffer.flush()
    else:
        save(arguments.output, manifest)
    return 0


def _held(arguments: argparse.Namespace) -> Manifest:
    if (arguments.checkpoint is None) == (not arguments.rank):
        raise CommandError("Name a checkpoint, or a running rank with --rank, and not both.")
    if arguments.rank:
        return _of_rank(arguments)
    checkpoint = Checkpoint(arguments.checkpoint)
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    if arguments.fused:
        layout = fuse(stored)
        held = {name: fused_bytes(tensor, checkpoint) for name, tensor in layout.items()}
        stored = {name: (tensor.dtype, tensor.shape) for name, tensor in layout.items()}
        taken = checkpoint.fingerprints(held)
    else:
        taken = checkpoint.fingerprints()
    return manifest_of(
        {
            name: ManifestTensor(fingerprint=taken[name], dtype=dtype, shape=shape)
            for name, (dtype, shape) in stored.items()
        }
    )


def _of_rank(arguments: argparse.Namespace) -> Manifest:
    readers = chosen_tables(arguments)
    if len(readers) > 1:
        raise CommandError(
            f"A manifest is of one rank, and {len(readers)} are chosen:\n{choices(readers)}"
        )
    table = readers[0].read(timeout=10.0)
    if not table.columns.fingerprint or table.released:
        raise CommandError(
            "This rank has no fingerprints. Start SGLang with "
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; they are absent too while the memory of the "
            "weights is released, and where taking them failed, which SGLang's log says."
        )
    return manifest_of_table(
        table.columns,
        weight_version=table.weight_version,
        shard=Shard.of(table.engine, table.ranks, table.role.name),
    )
