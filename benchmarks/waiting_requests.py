# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What it costs to count those who wait for an update: waiting_requests.py [REQUESTS ...]

A rank with the hooks on and a stand-in of SGLang's scheduler, which has so many requests, a tenth
of them running, takes a pause, an update and the batch after it: with the requests, and without
any. In processor time, against a bare loop that reads each request's id and how many tokens it has.
After that batch nothing of the exporter is in the scheduler's way. Needs torch.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

from standins import Rank, Request

from sglang_weight_exporter.hooks.targets import SCHEDULER

REQUESTS = (100, 1_000, 10_000)
UPDATES = 50


class Waiting:
    """A request."""

    def __init__(self, rid: str) -> None:
        self.rid, self.output_ids, self.to_finish = rid, [7] * 100, None

    def finished(self) -> bool:
        return False


class Scheduler:
    """What is hooked of SGLang's, and what is read of it."""

    def __init__(self) -> None:
        self.tree_cache = SimpleNamespace(evictable_size=int, protected_size=int)
        self.waiting_queue: list[Waiting] = []
        self.running_batch = SimpleNamespace(reqs=[])

    def run_batch(self, batch: Any) -> None:
        pass

    def pause_generation(self, recv_req: Any) -> None:
        pass

    def continue_generation(self, recv_req: Any) -> None:
        pass


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, the mean."""
    call()
    started = time.process_time()
    for _ in range(UPDATES):
        call()
    return (time.process_time() - started) / UPDATES


def measure(requests: int) -> tuple[float, float, float]:
    """Milliseconds: an update that nobody waits for, what they add, and the loop."""
    with tempfile.TemporaryDirectory() as directory:
        rank = Rank(Path(directory) / "runtime")
        scheduler = rank.hook(SCHEDULER, Scheduler)()
        component = rank.scheduler(rank.runner(answers={}))
        batch = SimpleNamespace(reqs=[Waiting("one")])

        def update() -> None:
            scheduler.pause_generation(SimpleNamespace(mode="in_place"))
            assert component.update_weights_from_disk(Request()).success
            scheduler.continue_generation(SimpleNamespace())
            scheduler.run_batch(batch)

        without = seconds(update)
        waiting = [Waiting(str(number)) for number in range(requests)]
        scheduler.running_batch.reqs = waiting[: requests // 10]
        scheduler.waiting_queue = waiting[requests // 10 :]
        with_them = seconds(update)
        loop = seconds(lambda: {each.rid: len(each.output_ids) for each in waiting})
        assert "run_batch" not in vars(scheduler)
        cost = rank.snapshot().last_cost
        assert cost is not None
        assert cost.requests == {"kept": requests}
    return 1e3 * without, 1e3 * (with_them - without), 1e3 * loop


def main() -> None:
    logging.disable()  # Of what the stand-in lacks.
    for requests in [int(each) for each in sys.argv[1:]] or REQUESTS:
        without, more, loop = measure(requests)
        print(
            f"{requests:,} requests: {more:.2f} ms more than {without:.2f}, "
            f"{more / loop:.1f} times a bare loop over them ({loop:.3f} ms)"
        )


if __name__ == "__main__":
    main()
