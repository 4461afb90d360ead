# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``dashboard``: the Grafana dashboards and the Prometheus rules, from the installed package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

BOARDS = {"fleet": "sglang-fleet.json", "engine": "sglang-engine.json"}
RULES = "sglang-weights.rules.yml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints a Grafana dashboard (JSON, to import into Grafana 10 or later): the "
        "fleet on one screen, or the detail of its engines. The two link to each other. With "
        "--rules it prints the Prometheus recording and alert rules (YAML, for rule_files). With "
        "--output all three are written as files."
    )
    parser.add_argument(
        "board",
        nargs="?",
        choices=BOARDS,
        default="fleet",
        help="the dashboard to print (default: %(default)s)",
    )
    parser.add_argument("--rules", action="store_true", help="print the rules, not a dashboard")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help=f"write {', '.join(BOARDS.values())} and {RULES} into this directory, which is made "
        "if need be",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a file cannot be written."""
    if arguments.output is None:
        sys.stdout.write(content(RULES if arguments.rules else BOARDS[arguments.board]))
        return 0
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in (*BOARDS.values(), RULES):
            (arguments.output / name).write_text(content(name), encoding="utf-8")
            print(arguments.output / name)
    except OSError as error:
        print(
            f"{error.filename or arguments.output} cannot be written: {error.strerror}. "
            "Name a directory that you may write to with --output, or leave it out to print.",
            file=sys.stderr,
        )
        return 1
    return 0


def content(name: str) -> str:
    """Text of one of the files that the package carries."""
    package = Path(__file__).parent.parent
    # In a wheel the files are inside the package; an editable install has them in its checkout.
    shipped = package / "dashboards" / name
    path = shipped if shipped.exists() else package.parent / "dashboards" / name
    return path.read_text(encoding="utf-8")
