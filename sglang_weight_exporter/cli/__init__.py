# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``sglang-weight-exporter COMMAND``: one module a command, imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, TextIO, cast

from sglang_weight_exporter import __version__
from sglang_weight_exporter.cli.terminal import PrintableText

#: Command, which is a module's name, and its line in the list of commands.
_COMMANDS = {
    "serve": "serve the metrics of this host's ranks",
    "status": "what is hooked, loaded and served on this host",
    "table": "print the pointer table: name, address, bytes, dtype, shape of every tensor",
    "verify": "compare the weights in memory with a checkpoint, a manifest, or other replicas",
    "manifest": "write the fingerprints of a checkpoint or of a running rank, for verify "
    "--manifest",
    "reference": "keep what SGLang's own loader makes of a checkpoint, for verify --manifest",
    "advise": "how much GPU memory was really free, and what it could be",
    "snapshot": "torch's memory with its blocks named, for PyTorch's viewer and Perfetto",
    "dashboard": "print or write the Grafana dashboards and the Prometheus rules",
    "run": "start a command with the hooks, where nothing can be installed beside SGLang",
    "install": "put the hooks into another interpreter's site-packages",
    "uninstall": "take out what `install` put there",
}


class _Command(argparse.ArgumentParser):
    """Has its arguments once it parses any: its module's ``add_arguments`` adds them."""

    def __init__(self, *, module: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module:
            module = importlib.import_module(f"{__name__}.{self._module}")
            self._module = ""
            module.add_arguments(self)
        return super().parse_known_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    with (
        contextlib.redirect_stdout(cast(TextIO, PrintableText(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, PrintableText(sys.stderr))),
    ):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="sglang-weight-exporter",
        description="Weights and KV pool of every SGLang rank of this user on this host.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Command
    )
    for name, does in _COMMANDS.items():
        commands.add_parser(name, help=does, module=name)
    arguments = parser.parse_args(argv)
    from sglang_weight_exporter.cli.choice import CommandError
    from sglang_weight_exporter.store.runtime_dir import RuntimeDirError

    try:
        status_code: int = arguments.run(arguments)
    except RuntimeDirError as error:
        print(error, file=sys.stderr)
        return 1
    except CommandError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # Whoever reads has seen enough (`| head`).
    return status_code
