# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What `verify --watch` does to the tokens of a real engine: watch.py [LAYERS]

One request streams its tokens: alone, beside `verify --watch 2`, which reads fingerprints in parts
between batches, and beside whole captures every two seconds, in turn. Reported are the usual gap
between two tokens, the longest and the tokens per second of each. Needs SGLang; on a GPU it is a
Llama of 8B's shape with CUDA graphs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import tiny_model
from engines import Engine, Installation
from fingerprint_engine import write_model
from gpu_engines import nvidia_smi

LAYERS, ROUNDS, EVERY = 30, 3, 2
#: Long enough for more than one capture.
TOKENS, GPU_TOKENS = 200, 1500


def gaps(engine: Engine) -> list[float]:
    """Seconds between the tokens of one request."""
    tokens = GPU_TOKENS if engine.installation.gpu else TOKENS
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{engine.url}/generate",
        data=json.dumps({"text": "once", "stream": True, "sampling_params": sampling}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        came = [time.perf_counter() for line in response if line.startswith(b"data: {")]
    return [after - before for before, after in itertools.pairwise(came)]


@contextlib.contextmanager
def alone(engine: Engine) -> Iterator[None]:
    yield


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[None]:
    """Beside the command, once it has captured and says so."""
    command = [str(engine.installation.python), "-m", "sglang_weight_exporter", "verify"]
    with subprocess.Popen(
        [*command, f"--watch={EVERY}"],
        env=engine.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("verify --watch has ended before its first capture.")
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def asked(engine: Engine) -> Iterator[None]:
    """Beside whole captures."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(EVERY / 2):
            names = {"sglang_weight_exporter_part": 0, "sglang_weight_exporter_parts": 1}
            engine.post("/set_internal_state", {"server_args": names})
            ended.wait(EVERY / 2)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()


def main() -> None:
    gpu = bool(nvidia_smi())
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 32 if gpu else LAYERS
    model, flags = Path(tempfile.mkdtemp()) / "model", []
    if gpu:
        write_model(model, 4096, layers)
        flags = ["--load-format", "dummy", "--context-length", "2048", "--skip-server-warmup"]
    else:
        tiny_model.write(model, layers=layers)
    variables = {"SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on"}
    if gpu:
        variables["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    installation = Installation(Path(sys.executable), gpu=gpu, graphs=gpu)
    engine = Engine(installation, model, flags=flags, variables=variables)
    found: dict[str, list[float]] = {}
    try:
        engine.start()
        engine.wait_until_ready()
        gaps(engine)  # Warm-up.
        for _ in range(ROUNDS):
            for beside in (alone, watched, asked):
                with beside(engine):
                    found.setdefault(beside.__name__, []).extend(gaps(engine))
    finally:
        engine.stop()
    for name, seconds in found.items():
        usual, longest = statistics.median(seconds), sorted(seconds)[-5:]
        print(
            f"{name:>8}: {1e3 * usual:6.1f} ms between tokens, the five longest "
            f"{', '.join(f'{1e3 * each:.1f}' for each in longest)} ms, "
            f"{len(seconds) / sum(seconds):.1f} tokens/s"
        )


if __name__ == "__main__":
    main()
