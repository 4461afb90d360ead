# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``run -- COMMAND``: a command whose Pythons are hooked, where site-packages cannot be written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

#: Holds a ``sitecustomize.py`` and nothing else.
START_PATH = Path(__file__).with_name("start_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sglang-weight-exporter run -- COMMAND [ARGUMENT ...]"
    parser.description = (
        "Start a command, such as `python -m sglang.launch_server …`, with the hooks "
        "in each Python that it starts, through PYTHONPATH. Nothing is installed anywhere. Not "
        "needed where this package is installed beside SGLang. A Python that ignores PYTHONPATH "
        "(-I, -E) is not hooked."
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Becomes the command, so that it gets its signals; returns only when it cannot start."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        print(
            "No command was given. Write it after two dashes: "
            "sglang-weight-exporter run -- python -m sglang.launch_server --model-path …",
            file=sys.stderr,
        )
        return 2
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environ(os.environ))  # noqa: S606
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
    return 127


def environ(inherited: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python imports our ``sitecustomize`` when it starts."""
    paths = inherited.get("PYTHONPATH", "").split(os.pathsep)
    rest = [path for path in paths if path and path != str(START_PATH)]
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(START_PATH), *rest])}
