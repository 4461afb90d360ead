# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Do readers of tables slow an engine's reloads? reader_interference.py [ROUNDS]

A real SGLang on the CPU reloads between two checkpoints: of half a gigabyte, and tiny ones, whose
reload is little more than HTTP and switching between processes. Each round has pairs of a few
reloads, beside a process and while that is stopped (SIGSTOP), in alternating order: beside a reader
that waits for changes, beside one that reads in a loop without a pause, and beside a process that
computes and reads nothing. That is the control: what a busy core costs by itself. Printed are
medians over the pairs of beside ÷ stopped, and of that ÷ the control of the round, with their 95 %
confidence intervals. Run it with the Python that has SGLang and this package, on a machine that is
otherwise idle.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import tiny_model
from engines import Engine, Installation

#: Reloads in each half of a pair; their median counts.
RELOADS = 5
#: For a reader to read what it missed while it was stopped.
SETTLE_SECONDS = 0.2
OPEN = (
    "import pathlib, sys\n"
    "from sglang_weight_exporter import TableError, open_tables\n"
    "(reader,) = open_tables(pathlib.Path(sys.argv[1]))\n"
)
CONTROL = "a busy process that reads nothing"
BESIDE = {
    "a reader that waits for changes": OPEN
    + "table = reader.read(10)\n"
    + "while True: table = reader.wait_for_change(table, 600)\n",
    "a reader without a pause": OPEN
    + "while True:\n"
    + "    try: list(reader.read(10).rows())\n"
    + "    except TableError: pass\n",
    CONTROL: "while True: sum(range(1000))\n",
}


class Beside:
    """A process beside the engine, stopped except where it is asked for."""

    def __init__(self, program: str, engine: Engine) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(engine.runtime_dir)], env=engine.environment
        )
        time.sleep(2)  # It has started and reads.
        self.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
            assert self.process.poll() is None, "the process beside the engine has ended"
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def processor_seconds(self) -> float:
        schedstat = Path(f"/proc/{self.process.pid}/schedstat").read_text()
        return int(schedstat.split()[0]) / 1e9

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Reloads:
    """Reloads an engine, from one checkpoint and the other in turn."""

    def __init__(self, engine: Engine, checkpoints: Sequence[Path]) -> None:
        self.engine = engine
        self.checkpoints = checkpoints
        self.count = 0

    def seconds(self) -> float:
        """What one takes, as the client sees it: the median of a few."""
        taken = []
        for _ in range(RELOADS):
            self.count += 1
            started = time.perf_counter()
            _, answer = self.engine.update_weights_from_disk(self.checkpoints[self.count % 2])
            taken.append(time.perf_counter() - started)
            assert answer["success"], answer
        return statistics.median(taken)


def half_a_gigabyte(directory: Path, seed: int) -> Path:
    tiny_model.write(directory, seed)  # For its tokenizer.
    config = LlamaConfig.from_pretrained(
        directory,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def median(values: Sequence[float]) -> str:
    """The median and its 95 % confidence interval, from order statistics: whatever the
    distribution, each value is below the median with probability one half."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return (
        f"{statistics.median(ordered):.3f} [{ordered[rank - 1]:.3f}, {ordered[count - rank]:.3f}]"
    )


def measure(checkpoints: Sequence[Path], rounds: int) -> None:
    engine = Engine(Installation(Path(sys.executable)), checkpoints[0])
    beside: dict[str, Beside] = {}
    try:
        engine.start()
        engine.wait_until_ready()
        reloads = Reloads(engine, checkpoints)
        beside |= {name: Beside(program, engine) for name, program in BESIDE.items()}
        reloads.seconds()  # Files come into memory, and memory to the engine.
        alone: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in BESIDE}
        used = dict.fromkeys(BESIDE, 0.0)
        for number in range(rounds):
            for name, process in beside.items():
                pair = {}
                for is_beside in (True, False) if number % 2 else (False, True):
                    with process.running() if is_beside else contextlib.nullcontext():
                        time.sleep(SETTLE_SECONDS)
                        before = process.processor_seconds()
                        pair[is_beside] = reloads.seconds()
                        used[name] += process.processor_seconds() - before
                alone.append(pair[False])
                ratios[name].append(pair[True] / pair[False])
    finally:
        for process in beside.values():
            process.end()
        engine.stop()
    size = sum(size for _, size in tiny_model.safetensors_header(checkpoints[0]).values())
    print(
        f"{size / 1e6:,.1f} MB: a reload takes "
        f"{statistics.median(alone) * 1e3:.1f} ms; {rounds} pairs each, {reloads.count} reloads"
    )
    print(f"  {'beside the engine':<36}{'÷ none':<24}{'÷ control':<24}processor time a reload")
    for name, ratio in ratios.items():
        own = [one / control for one, control in zip(ratio, ratios[CONTROL], strict=True)]
        versus = "" if name == CONTROL else median(own)
        each = used[name] / rounds / RELOADS
        print(f"  {name:<36}{median(ratio):<24}{versus:<24}{each * 1e3:.2f} ms", flush=True)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    for write in half_a_gigabyte, tiny_model.write:
        with tempfile.TemporaryDirectory() as directory:
            measure([write(Path(directory) / name, seed) for seed, name in enumerate("ab")], rounds)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
