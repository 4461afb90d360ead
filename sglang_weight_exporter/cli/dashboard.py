# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``dashboard``: dashboards for Grafana and Perses, and the Prometheus rules, from the package."""

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
        "--output all three are written as files. With --perses the dashboards are Perses' (JSON, "
        "for `percli apply`)."
    )
    parser.add_argument(
        "board",
        nargs="?",
        choices=BOARDS,
        default="fleet",
        help="the dashboard to print (default: %(default)s)",
    )
    parser.add_argument("--rules", action="store_true", help="print the rules, not a dashboard")
    parser.add_argument("--perses", action="store_true", help="dashboards for Perses")
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
    folder = "perses/" if arguments.perses else ""
    boards = {name: folder + file for name, file in BOARDS.items()}
    if arguments.output is None:
        sys.stdout.write(content(RULES if arguments.rules else boards[arguments.board]))
        return 0
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in (*boards.values(), RULES):
            path = arguments.output / Path(name).name
            path.write_text(content(name), encoding="utf-8")
            print(path)
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
