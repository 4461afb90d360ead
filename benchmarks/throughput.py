# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Generation throughput of a real engine with the exporter and without: throughput.py [SECONDS]

Two engines of one model run side by side, one with SGLANG_WEIGHT_EXPORTER_DISABLED=1, and answer
the same requests in turn, one engine at a time. With SECONDS each round is as long, and in the
middle of it the weights are loaded from disk again. Needs SGLang; on a GPU it is a model of 1 GB
with CUDA graphs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import tiny_model
from engines import Engine, Installation
from gpu_engines import nvidia_smi, write_checkpoint

ROUNDS, RELOADS = 60, 10
#: As many as the engines' CUDA graphs are for.
REQUESTS = 4
TOKENS = 64


def generate(engine: Engine) -> float:
    """Seconds for one round of concurrent requests."""

    def ask(number: int) -> None:
        body = {
            "text": f"{number} bottles of beer on the wall",
            "sampling_params": {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"{engine.url}/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            response.read()

    started = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(ask, range(REQUESTS)))
    return time.perf_counter() - started


def beside_a_reload(engine: Engine, model: Path, seconds: float) -> float:
    """Seconds for a round's tokens, where weights are loaded once in so many seconds."""
    began, rounds = time.perf_counter(), 0
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(engine.update_weights_from_disk, model)
        while not rounds or time.perf_counter() - began < seconds:
            generate(engine)
            rounds += 1
        assert reload.result()[0] == 200, "the reload failed"
    return (time.perf_counter() - began) / rounds


def main() -> None:
    every = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    model = Path(tempfile.mkdtemp()) / "model"
    gpu = bool(nvidia_smi())
    if gpu:
        write_checkpoint(model, 0, layers=32)
    else:
        tiny_model.write(model, 0)
    installation = Installation(Path(sys.executable), gpu=gpu, graphs=gpu)
    off = Engine(installation, model, variables={"SGLANG_WEIGHT_EXPORTER_DISABLED": "1"})
    on = Engine(installation, model)
    try:
        for engine in (off, on):
            engine.start()
        for engine in (off, on):
            engine.wait_until_ready()
            generate(engine)  # Warm-up.
        ratios, seconds = [], []
        for number in range(RELOADS if every else ROUNDS):
            first, second = (off, on) if number % 2 else (on, off)
            taken = {
                engine: beside_a_reload(engine, model, every) if every else generate(engine)
                for engine in (first, second)
            }
            ratios.append(taken[off] / taken[on])
            seconds.append(taken[off])
    finally:
        on.stop()
        off.stop()
    tokens = REQUESTS * TOKENS / statistics.median(seconds)
    beside = f", beside a reload every {every:g} s" if every else ""
    print(f"Generation of {REQUESTS} x {TOKENS} tokens, {len(ratios)} rounds in turn{beside}")
    print(f"  without the exporter {tokens:8.0f} tokens/s")
    print(
        f"  ratio with/without   {statistics.median(ratios):8.3f}"
        f"   (from {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
