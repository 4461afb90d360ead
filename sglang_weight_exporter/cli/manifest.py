# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``manifest``: what a checkpoint holds, as names and fingerprints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_weight_exporter.checkpoint import Checkpoint, CheckpointError
from sglang_weight_exporter.manifest import ManifestTensor, encode, manifest_of, write_manifest


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "manifest",
        help="write the fingerprints of a checkpoint's tensors, for verify --manifest",
        description="Write name and fingerprint of every tensor of a checkpoint as JSON, under "
        "the checkpoint's names. Exit status: 0, or 2 when it cannot be read.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a directory of safetensors files, or one such file"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: standard output"
    )
    parser.add_argument("--weight-version", default="", metavar="VERSION", help="kept in the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        checkpoint = Checkpoint(arguments.checkpoint)
        tensors = {
            name: ManifestTensor(
                fingerprint=text,
                dtype=checkpoint.tensors[name].dtype,
                shape=checkpoint.tensors[name].shape,
            )
            for name, text in checkpoint.fingerprints().items()
        }
        version = arguments.weight_version
        if arguments.output is None:
            sys.stdout.buffer.write(encode(manifest_of(tensors, weight_version=version)))
            sys.stdout.buffer.flush()
        else:
            write_manifest(arguments.output, tensors, weight_version=version)
    except CheckpointError as error:
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
