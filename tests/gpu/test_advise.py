# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""An engine started again as `advise` says has what it was promised, and stands its load."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from engines import Engine, Installation
from gpu_engines import MIB, Record, need_gpus, nvidia_smi, write_checkpoint
from waiting import eventually

CONTEXT = 16_384
PROMPTS, PROMPT_TOKENS = 48, 12_000


@contextmanager
def engine(checkpoint: Path, fraction: float) -> Iterator[Engine]:
    running = Engine(
        Installation(Path(sys.executable), gpu=True),
        checkpoint,
        flags=[
            *("--mem-fraction-static", f"{fraction:.3f}", "--context-length", str(CONTEXT)),
            # More than there is memory for: the fraction rules.
            *("--max-total-tokens", str(10**9), "--skip-server-warmup"),
        ],
        variables={
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
    )
    try:
        running.start()
        running.wait_until_ready()
        eventually(running.scrape)
        yield running
    finally:
        running.stop()


def load(running: Engine, checkpoint: Path) -> None:
    """Long prompts, many at a time, and an update behind them, with which their peak is seen."""

    def ask(number: int) -> int:
        prompt = [(number * 7919 + position) % 30_000 + 10 for position in range(PROMPT_TOKENS)]
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        return running.post("/generate", body)[0]

    with ThreadPoolExecutor(PROMPTS) as threads:
        assert list(threads.map(ask, range(PROMPTS))) == [200] * PROMPTS
    status, answer = running.update_weights_from_disk(checkpoint)
    assert (status, answer["success"]) == (200, True), answer


def test_what_is_suggested_holds(tmp_path: Path, record_property: Record) -> None:
    need_gpus()
    checkpoint = write_checkpoint(tmp_path / "model", 0)
    with engine(checkpoint, 0.3) as running:
        load(running, checkpoint)
        done = running.exporter_cli("advise")
        record_property("tokens at 0.3", running.server_info()["max_total_num_tokens"])
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    record_property("advise", done.stdout)
    suggestion = re.search(r"--mem-fraction-static ([\d.]+) .* give ([\d,]+) tokens", done.stdout)
    assert suggestion is not None, done.stdout
    fraction, promised = float(suggestion[1]), int(suggestion[2].replace(",", ""))
    with engine(checkpoint, fraction) as running:
        has = running.server_info()["max_total_num_tokens"]
        record_property("fraction", fraction)
        record_property("tokens promised", promised)
        record_property("tokens after the restart", has)
        assert abs(has - promised) <= 0.01 * promised
        load(running, checkpoint)
        free = nvidia_smi()[0].total - nvidia_smi()[0].used
        record_property("MiB free after the load", free)
        record_property("advise again", running.exporter_cli("advise").stdout)
        assert free * MIB > 0
