# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``sglang-weight-exporter COMMAND``: one module a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sglang_weight_exporter import __version__
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    from sglang_weight_exporter.cli import (
        advise,
        dashboard,
        install,
        manifest,
        run,
        serve,
        snapshot,
        status,
        table,
        verify,
    )

    parser = argparse.ArgumentParser(
        prog="sglang-weight-exporter",
        description="Weights and KV pool of every SGLang rank of this user on this host.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        serve,
        status,
        table,
        verify,
        manifest,
        advise,
        snapshot,
        dashboard,
        run,
        install,
    ):
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status_code: int = arguments.run(arguments)
    except RuntimeDirError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # Whoever reads has seen enough (`| head`).
    return status_code
