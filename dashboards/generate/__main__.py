# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the generated files, or say which are stale.

python -m dashboards.generate           write the boards
python -m dashboards.generate --check   exit 1, naming the stale files, if they would change
python -m dashboards.generate --documents https://wiki.example/weights --output provisioning/
                                        boards and rules with links to alerts.md and others there
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

from . import DOCUMENTS, engine, fleet, perses

HERE = Path(__file__).parents[1]
RULES = "sglang-weights.rules.yml"


def linked(node: Any, documents: str) -> Any:
    """A board with its links to the documents at this address; without one, without them."""
    if isinstance(node, dict):
        return {key: linked(value, documents) for key, value in node.items()}
    if isinstance(node, list):
        kept = [
            each
            for each in node
            if documents
            or not (isinstance(each, dict) and str(each.get("url", "")).startswith(DOCUMENTS))
        ]
        return [linked(each, documents) for each in kept]
    if isinstance(node, str) and node.startswith(DOCUMENTS):
        return documents.rstrip("/") + node.removeprefix(DOCUMENTS)
    return node


def with_runbooks(rules: str, documents: str) -> str:
    """The rules, each alert with a `runbook_url`."""

    def annotated(found: re.Match[str]) -> str:
        url = f"{documents.rstrip('/')}/alerts.md#{found['name'].lower()}"
        return f"{found[0]}          runbook_url: {url}\n"

    return re.sub(
        r"^ +- alert: (?P<name>\w+)\n(?:.*\n)*?        annotations:\n", annotated, rules, flags=re.M
    )


def files(documents: str = "") -> dict[str, str]:
    boards = {
        "sglang-fleet.json": fleet.board(documents),
        "sglang-engine.json": engine.board(),
    }
    boards |= {f"perses/{name}": perses.dashboard(board) for name, board in boards.items()}
    made = {name: json.dumps(linked(b, documents), indent=2) + "\n" for name, b in boards.items()}
    if documents:
        made[RULES] = with_runbooks((HERE / RULES).read_text(), documents)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when stale")
    parser.add_argument("--documents", default="", help="where the folder docs/ is published")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.documents and arguments.output == HERE:
        parser.error("--documents needs --output: what is shipped leads to no address")
    stale = False
    for name, content in files(arguments.documents).items():
        path = arguments.output / name
        old = path.read_text() if path.exists() else ""
        if old == content:
            continue
        stale = True
        if arguments.check:
            diff = difflib.unified_diff(
                old.splitlines(True), content.splitlines(True), name, name + " (generated)", n=1
            )
            sys.stderr.writelines(list(diff)[:40])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(f"wrote {path}")
    if arguments.check and stale:
        print("Stale: run `python -m dashboards.generate` and commit the result.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
