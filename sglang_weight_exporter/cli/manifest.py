# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``manifest``: what a checkpoint or a running rank holds, as names and fingerprints."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sglang_weight_exporter.cli.flags import add_flags, ranks, settings_from
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError
from sglang_weight_exporter.store.tables import TableError, open_tables
from sglang_weight_exporter.verification.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.verification.checkpoint_layout import fuse, fused_bytes
from sglang_weight_exporter.verification.manifest import (
    ManifestTensor,
    Shard,
    encode,
    manifest_of,
    write_manifest,
)
from sglang_weight_exporter.weight_table import table_fingerprints


class _ProblemError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "manifest",
        help="write the fingerprints of a checkpoint or of a running rank, for verify --manifest",
        description="Write name and fingerprint of every tensor as JSON: of a checkpoint, under "
        "its names, or of a running rank, under SGLang's, as its last load, update or verify found "
        "them. Exit status: 0, or 2 when it cannot be read.",
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
    parser.add_argument(
        "--rank",
        type=ranks,
        metavar="RANK",
        help="in place of a checkpoint a running rank of this host: tensor-parallel rank N, or a "
        "list such as tp=1,dp=0",
    )
    parser.add_argument("--engine", help="with --rank: of the engine with this label")
    parser.add_argument("--role", default="target", help="with --rank (default: target)")
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
    try:
        tensors, version, shard = _held(arguments)
        if arguments.weight_version is not None:
            version = arguments.weight_version
        if arguments.output is None:
            manifest = manifest_of(tensors, weight_version=version, shard=shard)
            sys.stdout.buffer.write(encode(manifest))
            sys.stdout.buffer.flush()
        else:
            write_manifest(arguments.output, tensors, weight_version=version, shard=shard)
    except (CheckpointError, RuntimeDirError, TableError, _ProblemError) as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"{error.name} is needed to read tensors and not installed here.", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename or 'Output'} cannot be used: {error.strerror}.", file=sys.stderr)
    else:
        return 0
    return 2


def _held(
    arguments: argparse.Namespace,
) -> tuple[dict[str, ManifestTensor], str, Shard | None]:
    if (arguments.checkpoint is None) == (arguments.rank is None):
        raise _ProblemError("Name a checkpoint, or a running rank with --rank, and not both.")
    if arguments.rank is not None:
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
    tensors = {
        name: ManifestTensor(fingerprint=taken[name], dtype=dtype, shape=shape)
        for name, (dtype, shape) in stored.items()
    }
    return tensors, "", None


def _of_rank(arguments: argparse.Namespace) -> tuple[dict[str, ManifestTensor], str, Shard]:
    settings = settings_from(arguments, os.environ)
    readers = [
        reader
        for reader in open_tables(
            settings.runtime_dir, engine=arguments.engine, role=arguments.role
        )
        if all(getattr(reader.ranks, name) == rank for name, rank in arguments.rank.items())
    ]
    if len(readers) != 1:
        named = "; ".join(f"engine {each.engine.name} {each.ranks}" for each in readers)
        raise _ProblemError(
            f"A manifest is of one rank, and {len(readers)} are chosen{named and f' ({named})'}. "
            "`sglang-weight-exporter status` lists those that are here; --rank and --engine choose."
        )
    table = readers[0].read(timeout=10.0)
    fingerprints = table_fingerprints(table.columns)
    if not fingerprints or table.released:
        raise _ProblemError(
            "This rank has no fingerprints. Start SGLang with "
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on; they are absent too while the memory of the "
            "weights is released, and where taking them failed, which SGLang's log says."
        )
    tensors = {
        row.name: ManifestTensor(
            fingerprint=fingerprints[row.name], dtype=row.dtype, shape=row.shape_in_memory
        )
        for row in table.rows()
        if row.name in fingerprints
    }
    shard = Shard.of(table.engine, table.ranks, table.role.name)
    return tensors, table.weight_version, shard
