# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What Python's start-up costs with the package installed: startup.py

The baseline is the same Python without the package, started in turn with it. Beside them: a
`.pth` that imports torch and SGLang's arguments, which is what a hook that does not wait costs.
Needs an environment with SGLang.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import sglang_weight_exporter

ROUNDS = 40
EAGER_ROUNDS = 2
PACKAGE = Path(sglang_weight_exporter.__file__).parent
AUTOLOAD = Path(__file__).parents[1] / "autoload" / "sglang_weight_exporter.pth"


def start(*arguments: str) -> tuple[float, int]:
    """Seconds of processor time and peak resident bytes of one Python process."""
    environ = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    process = subprocess.Popen(
        arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        bare, ours = Path(directory) / "bare", Path(directory) / "ours"
        bare.mkdir()
        shutil.copytree(PACKAGE, ours / PACKAGE.name)
        shutil.copy(AUTOLOAD, ours)
        runs: dict[str, list[tuple[float, int]]] = {"without": [], "with": []}
        for _ in range(ROUNDS):
            for name, site in (("without", bare), ("with", ours)):
                code = f"import site; site.addsitedir({str(site)!r})"
                runs[name].append(start(sys.executable, "-S", "-c", code))
    eager = "import torch, sglang.srt.server_args"
    environ_ready = [start(sys.executable, "-c", "pass") for _ in range(EAGER_ROUNDS)]
    eager_runs = [start(sys.executable, "-c", eager) for _ in range(EAGER_ROUNDS)]

    seconds = {name: statistics.median(taken for taken, _ in found) for name, found in runs.items()}
    memory = {name: statistics.median(peak for _, peak in found) for name, found in runs.items()}
    print(f"Python's start-up (processor time), median of {ROUNDS} in turn")
    for name in ("without", "with"):
        label = f"{name} the package"
        print(f"  {label:<20}{seconds[name] * 1e3:8.2f} ms {memory[name] / 1e6:8.1f} MB")
    more = seconds["with"] - seconds["without"]
    print(f"  {'ratio':<20}{seconds['with'] / seconds['without']:8.3f}")
    print(
        f"  {'difference':<20}{more * 1e3:8.2f} ms"
        f" {(memory['with'] - memory['without']) / 1e6:8.2f} MB"
    )
    plain = statistics.median(taken for taken, _ in environ_ready)
    print(
        "  a .pth that imports torch and sglang.srt.server_args:"
        f" {statistics.median(taken for taken, _ in eager_runs) / plain:.0f} times as long,"
        f" {statistics.median(peak for _, peak in eager_runs) / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
