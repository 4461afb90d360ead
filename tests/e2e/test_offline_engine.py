# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A script with an offline `sglang.Engine`, as batch inference and RL training use it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_model
from engines import Engine, Installation, Scrape
from waiting import LIMIT, eventually

pytestmark = pytest.mark.release("launches")

SCRIPT = f"""
import json, os, sys, time, urllib.request
import sglang

def scrape(url, seconds):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(url, timeout={LIMIT}).read().decode()
        except OSError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

if __name__ == "__main__":
    first, second, url, out = sys.argv[1:]
    # Where nobody is expected, one that is there would have had the engine's start to get ready.
    seconds = 5 if "SGLANG_PLUGINS" in os.environ else {LIMIT}
    engine = sglang.Engine(
        model_path=first, device="cpu", disable_overlap_schedule=True, mem_fraction_static=0.8,
        max_total_tokens=4096, context_length=512,
    )
    before = scrape(url, seconds)
    result = engine.update_weights_from_disk(second)
    after = scrape(url, seconds)
    engine.shutdown()
    with open(out, "w") as file:
        json.dump([before, str(result), after], file)
"""


@dataclass
class Run:
    """What a script that loads, reloads and ends saw; None where nobody answered the scrape."""

    before: str | None
    result: str
    after: str | None
    left_a_runtime_dir: bool


def run(engine: Engine, script: Path, second: Path) -> Run:
    """Run SCRIPT to its end, and wait until all that it started has ended."""
    out = script.with_suffix(".json")
    script.write_text(SCRIPT)
    command = [str(engine.installation.python), str(script), str(engine.model), str(second)]
    try:
        finished = subprocess.run(
            [*command, engine.exporter_url + "/metrics", str(out)],
            env=engine.installation.environment(**engine.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        assert finished.returncode == 0, finished.stdout[-6000:]
        eventually(lambda: engine.processes() == [], what="every process ended")
        before, result, after = json.loads(out.read_text())
        return Run(before, result, after, engine.runtime_dir.exists())
    finally:
        engine.stop()


def test_an_offline_engine_is_served_while_it_lives(
    newest: Installation, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = checkpoints
    # Never started: for its ports, its settings and its processes.
    engine = Engine(newest, first)
    seen = run(engine, tmp_path / "offline.py", second)
    assert "True" in seen.result
    assert seen.before is not None
    assert seen.after is not None
    before, after = Scrape(seen.before), Scrape(seen.after)
    size = sum(size for _, size in tiny_model.safetensors_header(first).values())
    assert before.sum("sglang_weight_bytes", kind="parameter") == size
    assert before.one("sglang_weight_updates_total", source="disk") == 0
    assert after.one("sglang_weight_updates_total", source="disk") == 1


def test_a_user_who_allows_only_other_plugins_is_obeyed(
    newest: Installation, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = checkpoints
    engine = Engine(newest, first, variables={"SGLANG_PLUGINS": "some_other_plugin"})
    seen = run(engine, tmp_path / "offline.py", second)
    assert "True" in seen.result
    assert (seen.before, seen.after, seen.left_a_runtime_dir) == (None, None, False)
