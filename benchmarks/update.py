# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update pays in a real engine, with the exporter and without: update.py [LAYERS ...]

Two offline engines of one deep, narrow Llama run side by side, one with
SGLANG_WEIGHT_EXPORTER_DISABLED=1, and take the same update in turn: one small tensor, so that next
to nothing is SGLang's own work. Reported are medians and the slowest, which is where a garbage
collection shows. Needs SGLang, and uses a GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import tiny_model
from engines import Installation

#: 297, 1,998 and 20,002 named tensors on SGLang 0.5.17.
LAYERS = (42, 285, 2857)
UPDATES = 41

ENGINE = """
import json, os, sys, time
import sglang, torch

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = sglang.Engine(
        model_path=sys.argv[1], device=device, disable_cuda_graph=True, log_level="error",
        max_total_tokens=4096, context_length=512, mem_fraction_static=0.4,
        disable_overlap_schedule=True, skip_server_warmup=True,
        **({"attention_backend": "triton"} if device == "cuda" else {}),
    )
    tensor = torch.ones(128, dtype=torch.bfloat16, device=device)
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    sessions = hasattr(engine, "begin_weight_update")  # From 0.5.21 on.
    for line in sys.stdin:
        started = time.perf_counter()
        if sessions:
            engine.begin_weight_update()
        succeeded, message = engine.update_weights_from_tensor([("model.norm.weight", tensor)])[:2]
        assert succeeded, message
        if sessions:
            engine.end_weight_update()
        print(json.dumps(time.perf_counter() - started), file=answers, flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


class Engine:
    """An offline engine in a process of its own that does what it is told to."""

    def __init__(
        self,
        installation: Installation,
        directory: Path,
        model: Path,
        *arguments: str,
        program: str = ENGINE,
        **environ: str,
    ):
        script = directory / "engine.py"
        script.write_text(program)
        self._log = directory / "log"
        self.runtime_dir = directory / f"runtime-{len(environ)}"
        self._process = subprocess.Popen(
            [installation.python, script, model, *arguments],
            env=installation.environment(
                SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR=str(self.runtime_dir),
                SGLANG_WEIGHT_EXPORTER_SERVE="off",
                **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
                **environ,
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("ab"),
            text=True,
        )

    def answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready"):
                return None
            try:
                return json.loads(line)
            except ValueError:
                continue  # SGLang prints too.
        raise RuntimeError(f"The engine has ended: {self._log.read_text()[-3000:]}")

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()

    def update(self) -> float:
        return float(self.ask("update"))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def measure(installation: Installation, layers: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = tiny_model.write(directory / "model", layers=layers)
        off = Engine(installation, directory, model, SGLANG_WEIGHT_EXPORTER_DISABLED="1")
        off.answer()
        on = Engine(installation, directory, model)
        on.answer()
        taken: dict[Engine, list[float]] = {off: [], on: []}
        for number in range(UPDATES):
            for engine in (off, on) if number % 2 else (on, off):
                taken[engine].append(engine.update())
        off.stop()
        on.stop()
    # The first update of an engine pays for what SGLang makes only then.
    without, with_it = (statistics.median(taken[engine][1:]) * 1e3 for engine in (off, on))
    slowest = [max(taken[engine][1:]) * 1e3 for engine in (off, on)]
    print(
        f"{layers:>6} layers: {without:7.1f} ms without, {with_it:7.1f} ms with, "
        f"{with_it - without:+6.1f} ms, ratio {with_it / without:.2f}; "
        f"slowest {slowest[0]:.1f} and {slowest[1]:.1f} ms",
        flush=True,
    )


def main() -> None:
    gpu = importlib.util.find_spec("torch") is not None and Path("/dev/nvidia0").exists()
    installation = Installation(Path(sys.executable), gpu=gpu)
    for layers in map(int, sys.argv[1:] or LAYERS):
        measure(installation, layers)


if __name__ == "__main__":
    main()
