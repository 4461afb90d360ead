# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A script with an offline `sglang.Engine`, as batch inference and RL training use it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import tiny_model
from engines import Engine, Installation, Scrape, eventually

SCRIPT = """
import json, sys, time, urllib.request
import sglang

def scrape(url):
    deadline = time.monotonic() + 30
    while True:
        try:
            return urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

if __name__ == "__main__":
    first, second, url, out = sys.argv[1:]
    engine = sglang.Engine(
        model_path=first, device="cpu", disable_overlap_schedule=True, mem_fraction_static=0.2,
        max_total_tokens=4096, context_length=512,
    )
    before = scrape(url)
    result = engine.update_weights_from_disk(second)
    after = scrape(url)
    engine.shutdown()
    with open(out, "w") as file:
        json.dump([before, str(result), after], file)
"""


def run(engine: Engine, script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    installation = engine.installation
    return subprocess.run(
        [str(installation.python), str(script), *arguments],
        env=installation.environment(**engine.variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=420,
    )


def test_offline_engine(
    newest: Installation, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    engine = Engine(newest, checkpoints[0])  # never started: for its ports and its settings
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    url = engine.exporter_url + "/metrics"
    try:
        finished = run(engine, script, [*map(str, checkpoints), url, str(out)])
        eventually(lambda: engine.processes() == [], 60, what="the exporter ended")
    finally:
        engine.stop()
    assert finished.returncode == 0, finished.stdout[-6000:]
    before_text, result, after_text = json.loads(out.read_text())
    before, after = Scrape(before_text), Scrape(after_text)
    size = sum(size for _, size in tiny_model.safetensors_header(checkpoints[0]).values())
    assert before.sum("sglang_weight_bytes", kind="parameter") == size
    assert "True" in result, result
    assert before.one("sglang_weight_updates_total", source="disk") == 0
    assert after.one("sglang_weight_updates_total", source="disk") == 1
