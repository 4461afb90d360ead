# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Engines over all GPUs of a machine, as a fleet has them.

    FLEET_OUT=figures pytest tests/gpu/test_fleet.py            # on two GPUs or more
    FLEET_GPUS=4 pytest tests/gpu/test_fleet.py -k trainer      # one case, on four of them
    FLEET_ON_CPU=1 pytest tests/gpu/test_fleet.py -k pipeline   # two ranks, tiny models

Cases that stand together in `PLAN` run at once, in threads; a test waits for its case and says what
came of it. One exporter serves all engines, and a Prometheus scrapes it from the first start to the
last end, with the rules that are shipped. `FLEET_OUT` gets what was measured, and the logs of
engines whose case failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import fleet_cases
import pytest
from fleet_checkpoints import Model, dense, draft_of, eagle_of, mixture
from fleet_engines import Figures, Fleet
from gpu_engines import Record, need_gpus, nvidia_smi
from monitoring import Monitoring

#: A case gets the fleet and says what it has measured.
Case = Callable[[Fleet, Figures], None]

ON_CPU = bool(os.environ.get("FLEET_ON_CPU"))
FEWEST = 2
NO_TRANSFER = (
    "needs mooncake-transfer-engine: SGLang's prefill engines have no other way of sending keys and"
    " values that does without RDMA and is a package"
)

#: Cases that run at once, and those that come after them while their engines are still there.
PLAN: tuple[tuple[tuple[Case, ...], tuple[Case, ...]], ...] = (
    ((fleet_cases.tensor_parallel, fleet_cases.experts), (fleet_cases.exporter,)),
    (
        (
            fleet_cases.attention,
            fleet_cases.pipeline,
            fleet_cases.draft,
            fleet_cases.two_engines,
            fleet_cases.trainer,
            fleet_cases.disaggregation,
        ),
        (),
    ),
)
CASES = {case.__name__: case for at_once, after in PLAN for case in (*at_once, *after)}


def models(gpus: int) -> dict[str, tuple[Model, int]]:
    """Checkpoint → its model, as large as so many GPUs want it, and the seed of its values."""
    if not gpus:
        target = dense(128, 256, layers=2, heads=4, vocabulary=128)
        experts = mixture(128, 64, 4, layers=2, heads=4, vocabulary=128, fp8=False)
    elif gpus < 4:
        target = dense(2048, 5632, layers=8, heads=16, vocabulary=32_000)
        experts = mixture(1024, 512, 16, layers=4, heads=16, vocabulary=32_000, fp8=True)
    else:
        target = dense(5120, 13_824, layers=20, heads=40, vocabulary=32_000)
        experts = mixture(4096, 2048, 64, layers=6, heads=32, vocabulary=32_000, fp8=True)
    pairs = {"dense": target, "experts": experts}
    found = {
        f"{name}-{x}": (model, seed) for name, model in pairs.items() for seed, x in enumerate("ab")
    }
    return {**found, "draft": (draft_of(target), 2), "eagle": (eagle_of(target), 3)}


@dataclass
class Run:
    """All chosen cases, group by group, in a thread of their own."""

    fleet: Fleet
    outcomes: dict[str, Future[None]]
    figures: dict[str, Figures]
    monitoring: Monitoring | None
    began: float = field(default_factory=time.time)
    over: Future[None] = field(default_factory=Future)
    parts: list[Fleet] = field(default_factory=list)

    def start(self) -> None:
        threading.Thread(target=self._all, daemon=True).start()

    def _all(self) -> None:
        try:
            models_ = models(len(self.fleet.gpus))
            prepared = self.figures["preparation"]
            prepared.time("checkpoints", lambda: self.fleet.write_checkpoints(models_))
            for at_once, after in PLAN:
                self._group(at_once, after)
            self.over.set_result(None)
        except BaseException as error:
            for outcome in (*self.outcomes.values(), self.over):
                if not outcome.done():
                    outcome.set_exception(error)

    def _group(self, at_once: Sequence[Case], after: Sequence[Case]) -> None:
        parts = {case: self.fleet.part() for case in (*at_once, *after)}
        self.parts.extend(parts.values())

        def run(case: Case) -> None:
            if case.__name__ in self.outcomes:
                self._one(case, parts[case])
                if not after:
                    parts[case].stop()

        # On a CPU one case at a time is enough.
        with ThreadPoolExecutor(len(at_once) if self.fleet.on_gpus else 1) as pool:
            list(pool.map(run, at_once))
        for case in after:
            run(case)
        for part in parts.values():
            part.stop()

    def _one(self, case: Case, part: Fleet) -> None:
        name, began = case.__name__, time.monotonic()
        figures, outcome = self.figures[name], self.outcomes[name]
        try:
            case(part, figures)
        except BaseException as error:
            part.keep_logs()
            outcome.set_exception(error)
        else:
            outcome.set_result(None)
        figures["whole case, s"] = round(time.monotonic() - began, 1)

    def stop(self) -> None:
        """Whatever is still alive, as after an interruption."""
        for part in self.parts:
            part.keep_logs()
            part.stop()
        if self.monitoring is not None:
            self.monitoring.stop()
        shutil.rmtree(self.fleet.directory, ignore_errors=True)


def prometheus(fleet: Fleet) -> Monitoring | None:
    """Asks the exporter once a second, where there is a Prometheus."""
    if shutil.which("prometheus") is None:
        return None
    directory = fleet.directory / "prometheus"
    directory.mkdir()
    target = {"sglang-weights": f"127.0.0.1:{fleet.exporter_port}"}
    every = {"sglang-weights": {"scrape_interval": "1s"}}
    return Monitoring(directory, target, scrape=every, notifies=False).start()


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    gpus = nvidia_smi()[: int(os.environ.get("FLEET_GPUS", "0")) or None]
    if not ON_CPU:
        need_gpus(FEWEST)
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("needs SGLang 0.5.17 or later")
    out = Path(os.environ["FLEET_OUT"]) if os.environ.get("FLEET_OUT") else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="fleet-"))
    fleet = Fleet(directory, [] if ON_CPU else gpus, Path(sys.executable), out=out)
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_case
    }
    if importlib.util.find_spec("mooncake") is None:
        chosen.discard("disaggregation")
    names = [name for name in CASES if name in chosen]
    figures = {name: Figures() for name in ("preparation", *names)}
    made = Run(fleet, {name: Future() for name in names}, figures, prometheus(fleet))
    made.start()
    try:
        yield made
    finally:
        if out is not None:
            write_figures(out, figures)
        made.stop()


@pytest.mark.parametrize("name", CASES)
def test_case(run: Run, name: str, record_property: Record) -> None:
    if name not in run.outcomes:
        pytest.skip(NO_TRANSFER)
    run.outcomes[name].result()
    for figure, value in run.figures[name].items():
        record_property(figure, value)


def test_no_alert_but_that_weights_were_reloaded(run: Run) -> None:
    """Nothing that was done was a fault."""
    if run.monitoring is None:
        pytest.skip("needs a `prometheus` in PATH")
    run.over.result()
    found = run.monitoring.query_range("ALERTS", run.began, time.time(), step=1.0)
    alerts = {(each["metric"]["alertstate"], each["metric"]["alertname"]) for each in found}
    scraped = run.monitoring.query_range("up", run.began, time.time(), step=1.0)
    run.figures["preparation"]["Prometheus"] = {
        "seconds with a scrape": sum(
            value == "1" for each in scraped for _, value in each["values"]
        ),
        "alerts": sorted(alerts),
    }
    assert scraped
    assert {name for state, name in alerts if state == "firing"} <= {"SGLangWeightsReloaded"}, found


# --- figures ------------------------------------------------------------------------------------


def write_figures(out: Path, found: Mapping[str, Figures]) -> None:
    """All of them as JSON, and as tables for people."""
    (out / "fleet.json").write_text(json.dumps(found, indent=1, default=str))
    lines: list[str] = []
    for case, figures in found.items():
        lines += [f"## {case}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in figures.items()]
        lines.append("")
    (out / "fleet.md").write_text("\n".join(lines))


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value).replace("|", "\\|")
