# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update pays beside its capture, with an empty queue and a full one: event_queue.py

One whole reload of a stand-in for SGLang's scheduler and runner, whose model is so small that
capturing it costs next to nothing: what is left is the account, one event and the snapshots.
The baseline of the same run replaces one file of a snapshot's size. Processor time, medians.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

from standins import Rank, Request

from sglang_weight_exporter.store.files import write_atomically
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import EVENT_COUNT

ROUNDS = 300


def median(step: Callable[[], object], before_each: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        before_each()
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def main() -> None:
    logging.disable()  # The stand-ins lack what they do not need.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rank = Rank(directory / "runtime")
        scheduler = rank.scheduler(rank.runner())
        ((files, _),) = SnapshotReader(RuntimeDir(rank.directory)).read()

        def update() -> None:
            scheduler.update_weights_from_disk(Request())

        def deliver() -> None:
            for file in files.events.waiting():
                files.events.acknowledge(file)

        update()
        content = (files.path / "snapshot").read_bytes()
        baseline = median(
            lambda: write_atomically(directory / "file", content), before_each=lambda: None
        )
        empty = median(update, before_each=deliver)
        for _ in range(EVENT_COUNT):
            update()
        full = median(update, before_each=lambda: None)
        waiting = len(files.events.waiting())
    print(f"a file of {len(content):,} bytes is replaced in {baseline * 1e3:.3f} ms")
    for what, seconds in ((0, empty), (waiting, full)):
        print(
            f"  an update with {what:>5,} undelivered events: {seconds * 1e3:.2f} ms, "
            f"{seconds / baseline:.1f} times that"
        )


if __name__ == "__main__":
    main()
