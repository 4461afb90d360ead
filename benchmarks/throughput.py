# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Generation throughput of a real engine with the exporter and without: throughput.py

Two engines of one model run side by side, one with SGLANG_WEIGHT_EXPORTER_DISABLED=1, and answer
the same requests in turn, one engine at a time. Needs SGLang (0.5.23 is what was measured).
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

ROUNDS = 60
REQUESTS = 8
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


def main() -> None:
    model = Path(tempfile.mkdtemp()) / "model"
    tiny_model.write(model, 0)
    installation = Installation(Path(sys.executable))
    off = Engine(installation, model, variables={"SGLANG_WEIGHT_EXPORTER_DISABLED": "1"})
    on = Engine(installation, model)
    try:
        for engine in (off, on):
            engine.start()
            engine.wait_until_ready()
            generate(engine)  # Warm-up.
        ratios, seconds = [], []
        for number in range(ROUNDS):
            first, second = (off, on) if number % 2 else (on, off)
            taken = {first: generate(first), second: generate(second)}
            ratios.append(taken[off] / taken[on])
            seconds.append(taken[off])
    finally:
        on.stop()
        off.stop()
    tokens = REQUESTS * TOKENS / statistics.median(seconds)
    print(f"Generation of {REQUESTS} x {TOKENS} tokens, {ROUNDS} rounds in turn")
    print(f"  without the exporter {tokens:8.0f} tokens/s")
    print(
        f"  ratio with/without   {statistics.median(ratios):8.3f}"
        f"   (from {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
