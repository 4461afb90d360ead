# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Do readers of tables slow an engine's reloads? reader_interference.py [ROUNDS]

A real SGLang on the CPU reloads between two tiny checkpoints. Each round has a few reloads with
no reader (the baseline), with a reader that waits for changes, with one that reads in a loop
without a pause, and, to tell the cost of a busy core from the cost of reading, with a process that
computes and reads nothing. Printed are medians as ratios to the baseline. Run it with the Python
that has SGLang and this package.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny_model
from engines import Engine, Installation

RELOADS = 5
OPEN = (
    "import pathlib, sys\n"
    "from sglang_weight_exporter import TableError, open_tables\n"
    "(reader,) = open_tables(pathlib.Path(sys.argv[1]))\n"
)
BESIDE = {
    "no reader": "",
    "a reader that waits for changes": OPEN
    + "table = reader.read(10)\n"
    + "while True: table = reader.wait_for_change(table, 600)\n",
    "a reader without a pause": OPEN
    + "while True:\n"
    + "    try: list(reader.read(10).rows())\n"
    + "    except TableError: pass\n",
    "a busy process that reads nothing": "while True: sum(range(1000))\n",
}


@contextlib.contextmanager
def beside(program: str, engine: Engine) -> Iterator[None]:
    if not program:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(engine.runtime_dir)], env=engine.environment
    )
    try:
        time.sleep(1)  # It has started and reads.
        yield
        assert process.poll() is None, "the reader has ended"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    seconds: dict[str, list[float]] = {name: [] for name in BESIDE}
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = [
            tiny_model.write(Path(directory) / name, seed) for seed, name in enumerate("ab")
        ]
        engine = Engine(Installation(Path(sys.executable)), checkpoints[0])
        try:
            engine.start()
            engine.wait_until_ready()
            for _ in range(rounds):
                for name, program in BESIDE.items():
                    with beside(program, engine):
                        for number in range(RELOADS):
                            started = time.perf_counter()
                            _, answer = engine.update_weights_from_disk(checkpoints[number % 2])
                            seconds[name].append(time.perf_counter() - started)
                            assert answer["success"], answer
        finally:
            engine.stop()
    baseline = statistics.median(seconds["no reader"])
    print(f"a reload takes {baseline * 1e3:.0f} ms without a reader")
    for name, taken in seconds.items():
        print(f"  {name:<36}{statistics.median(taken) / baseline:6.2f}")


if __name__ == "__main__":
    main()
