# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time goes that an update takes longer, by step: update_steps.py [TENSORS ...]

A rank with the hooks on takes a session of one call that writes nothing, so that all of its time is
the exporter's; beside it a table of requests with 4,096 free slots. As in SGLang's Llama there are
twelve modules to seven tensors. Reported are milliseconds a
step, the mean of all updates but the first, without fingerprints and with; of the processor where
there is no GPU. A step's time is without that of the steps inside it. Needs torch.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import torch
from pointer_table import model_of
from standins import Rank, session

from sglang_weight_exporter import rank as rank_module
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.fingerprint.tables import TableFingerprints
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.rank_records import RankRecords
from sglang_weight_exporter.runners.captures import Captures
from sglang_weight_exporter.runners.memory import Memory

#: Without a GPU nobody is waited for, and other work on the machine should not count.
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time

#: As in `update.py`.
TENSORS = (297, 1_998, 20_002)
UPDATES = 21

#: What the time is attributed to: functions, each with the step that it is.
STEPS: tuple[tuple[str, Any, str], ...] = (
    ("derived weights before an update", Captures, "drop_rebound"),
    ("addresses of all tensors", Captures, "capture_weights"),
    ("comparison with the table before", rank_module, "compare_tables"),
    ("torch's memory", Memory, "read"),
    ("torch's memory", Memory, "begin_update"),
    ("fingerprints, work of the host", TableFingerprints, "take"),
    ("fingerprints, reading", Fingerprinter, "__call__"),
    ("fingerprints, reading", Fingerprinter, "of_addresses"),
    ("snapshots and events", RankRecords, "snapshot"),
    ("snapshots and events", RankRecords, "event"),
    ("files", Publisher, "publish"),
    ("files", Publisher, "lock_tables"),
    ("files", Publisher, "unlock_tables"),
)
REST = "account of updates, and the rest"


class Profile:
    """Seconds of each step, without those of the steps inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = [0.0]

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            started = CLOCK()
            self._inside.append(0.0)
            try:
                return function(*arguments, **keywords)
            finally:
                taken = CLOCK() - started
                self.seconds[step] = self.seconds.get(step, 0.0) + taken - self._inside.pop()
                self._inside[-1] += taken

        return call


class GpuRank(Rank):
    """Asks torch where one allocation ends and the next begins."""

    allocations = property(lambda self: Segments.of_cuda(), lambda self, value: None)


def model(tensors: int) -> torch.nn.Module:
    made = model_of(tensors)
    modules = list(made.modules())
    for module in modules[: max(0, tensors * 12 // 7 - len(modules))]:
        module.attn = torch.nn.Module()
    return made


def request_pool() -> Any:
    pool = type("ReqToTokenPool", (), {"__module__": "sglang.srt.mem_cache.memory_pool"})()
    pool.free_slots = list(range(4096))
    return pool


def measure(tensors: int, *, fingerprints: bool) -> dict[str, float]:
    """Milliseconds of each step of an update."""
    gpu, profile = torch.cuda.is_available(), Profile()
    with tempfile.TemporaryDirectory() as directory:
        made = (GpuRank if gpu else Rank)(
            Path(directory) / "runtime", fingerprinter=Fingerprinter() if fingerprints else None
        )
        runner = made.runner(
            model=model(tensors).to("cuda" if gpu else "cpu"),
            device="cuda" if gpu else "cpu",
            req_to_token_pool=request_pool(),
            answers={},
        )
        runner.token_to_kv_pool = SimpleNamespace()
        runner.alloc_memory_pool()
        session(runner, loads=1)
        patches = [
            mock.patch.object(owner, name, profile.timed(step, getattr(owner, name)))
            for step, owner, name in STEPS
        ]
        update = profile.timed(REST, functools.partial(session, runner, loads=1))
        for patch in patches:
            patch.start()
        try:
            for _ in range(UPDATES):
                update()
        finally:
            for patch in patches:
                patch.stop()
        assert made.snapshot().hook_errors == {}
    return {step: 1e3 * seconds / UPDATES for step, seconds in profile.seconds.items()}


def main() -> None:
    logging.disable(logging.WARNING)  # Stand-ins are no release of SGLang's.
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}; milliseconds without fingerprints and with them")
    for tensors in map(int, sys.argv[1:] or TENSORS):
        without = measure(tensors, fingerprints=False)
        with_them = measure(tensors, fingerprints=True)
        print(f"\n{tensors:,} tensors")
        for step in sorted(with_them, key=lambda each: -with_them[each]):
            print(f"  {step:<40}{without.get(step, 0.0):9.2f}{with_them[step]:9.2f}")
        print(f"  {'all':<40}{sum(without.values()):9.2f}{sum(with_them.values()):9.2f}")


if __name__ == "__main__":
    main()
