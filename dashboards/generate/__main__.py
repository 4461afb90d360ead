# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the generated files, or say which are stale.

python -m dashboards.generate           write the files
python -m dashboards.generate --check   exit 1, naming the stale files, if they would change
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

from . import DOCUMENTS, engine, fleet

HERE = Path(__file__).parents[1]


def with_runbooks(rules: str) -> str:
    """The rules (or their tests) with the address of the documents in front of each anchor."""
    return re.sub(r"runbook_url: \S*#(\w+)", rf"runbook_url: {DOCUMENTS}/alerts.md#\1", rules)


def files() -> dict[Path, str]:
    rules = with_runbooks((HERE / "sglang-weights.rules.yml").read_text())
    tests = with_runbooks((HERE / "sglang-weights.rules.test.yml").read_text())
    return {
        HERE / "sglang-weights.rules.yml": rules,
        HERE / "sglang-weights.rules.test.yml": tests,
        HERE / "sglang-fleet.json": json.dumps(fleet.board(), indent=2) + "\n",
        HERE / "sglang-engine.json": json.dumps(engine.board(), indent=2) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when stale")
    check = parser.parse_args().check
    stale = False
    for path, content in files().items():
        old = path.read_text() if path.exists() else ""
        if old == content:
            continue
        stale = True
        if check:
            name = str(path.relative_to(HERE))
            diff = difflib.unified_diff(
                old.splitlines(True), content.splitlines(True), name, name + " (generated)", n=1
            )
            sys.stderr.writelines(list(diff)[:40])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(f"wrote {path.relative_to(HERE)}")
    if check and stale:
        print("Stale: run `python -m dashboards.generate` and commit the result.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
