# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real ranks that are sent what a trainer has, or almost: `update_ranks.py DIRECTORY JOBS`.

JOBS is JSON, jobs by name, one after the other: ``model`` and ``changes`` (of the zoo, and what its
configuration has otherwise), ``ranks``, ``flags`` of SGLang, ``cuts`` of the manifest, and
``steps``, each a list of sabotages. A rank is SGLang's Scheduler without a server. In each step
every rank gets the same buckets of new tensors, as SGLang's tokenizer process would hand them to
it, and compares what it holds with sums of what the trainer has. Writes
``DIRECTORY/NAME/results/RANK.json``: of each step what was said.

Sabotages: ``drop NAME``: it comes in no bucket. ``rename NAME TO``: it comes under another name.
``stale NAME``: it comes with the bytes of the step before.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import load_models
from zoo_models import MODELS, write

BUCKET = 5


def state_of(checkpoint: Path, seed: int) -> dict[str, Any]:
    """New values for every tensor of a checkpoint."""
    import torch
    from safetensors import safe_open

    noise = torch.Generator().manual_seed(seed)
    with safe_open(str(checkpoint / "model.safetensors"), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return {
        name: torch.randn(shape, generator=noise).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def sabotaged(
    state: dict[str, Any], before: dict[str, Any], sabotages: list[str]
) -> dict[str, Any]:
    sent = dict(state)
    for sabotage in sabotages:
        kind, *words = sabotage.split()
        if kind == "drop":
            del sent[words[0]]
        elif kind == "rename":
            sent[words[1]] = sent.pop(words[0])
        elif kind == "stale":
            sent[words[0]] = before[words[0]]
    return sent


def send(scheduler: Any, tensors: list[tuple[str, Any]], last: bool) -> None:
    import torch
    from sglang.srt.managers import io_struct
    from sglang.srt.utils import MultiprocessingSerializer
    from torch.multiprocessing import reductions

    # SGLang replaces this in its process by one that only knows tensors of GPUs; a trainer has its
    # own process.
    reductions.reduce_tensor = getattr(
        reductions, "_reduce_tensor_original", reductions.reduce_tensor
    )
    reductions.init_reductions()
    size = scheduler.server_args.tp_size
    request = io_struct.UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=[MultiprocessingSerializer.serialize(tensors)] * size,
        flush_cache=last,
    )
    with torch.inference_mode():
        answer = scheduler._request_dispatcher(request)
    assert answer.success, answer.message


def update(scheduler: Any, sent: dict[str, Any], version: str) -> None:
    from sglang.srt.managers import io_struct

    scheduler._request_dispatcher(io_struct.BeginWeightUpdateReqInput())
    named = list(sent.items())
    for at in range(0, len(named), BUCKET):
        send(scheduler, named[at : at + BUCKET], at + BUCKET >= len(named))
    scheduler._request_dispatcher(io_struct.EndWeightUpdateReqInput())


def run_rank(make: Any, rank: int, job: dict[str, Any], checkpoint: Path, result: Path) -> None:
    scheduler = make(rank)
    from sglang_weight_exporter import open_tables, sum_tensors
    from sglang_weight_exporter.records.shares import reasons_of
    from sglang_weight_exporter.verification.sent_comparison import compare_sent
    from sglang_weight_exporter.weight_table import table_rows

    (reader,) = [each for each in open_tables() if each.directory.snapshot().pid == os.getpid()]
    before: dict[str, Any] = {}
    proved: set[str] = set()
    said = []
    for number, sabotages in enumerate(job["steps"]):
        state = state_of(checkpoint, number)
        update(scheduler, sabotaged(state, before, sabotages), str(number))
        table = reader.read(30.0).columns
        found = compare_sent(table, sum_tensors(state, cuts=job["cuts"]), proved=proved)
        assert found is not None
        assert table.shares is not None
        proved |= found.proved
        rows = list(table_rows(table))
        said.append(
            {
                "equal": sorted(found.comparison.equal),
                "different": sorted(found.comparison.differing),
                "not_comparable": found.comparison.unverifiable,
                "unheld": sorted(state.keys() - found.held),
                "unsent": sorted(found.unsent),
                "unexplained": {
                    rows[row].name: why for row, why in reasons_of(table.shares).items()
                },
            }
        )
        before = state
        result.write_text(json.dumps(said))


def run_job(directory: Path, job: dict[str, Any]) -> None:
    """In a process of its own, which reads the settings once."""
    os.environ["SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR"] = str(directory / "run")
    results, checkpoint = directory / "results", directory / "model"
    model = MODELS[job["model"]]
    model = replace(model, settings={**model.settings, **job.get("changes", {})})
    making = functools.partial(write, model, checkpoint, 0)
    os.waitpid(load_models.in_child(making, results / "model.json"), 0)
    load_models.FLAGS["cpu"] += " " + job.get("flags", "")
    make = load_models.make_schedulers(checkpoint, "cpu", job["ranks"])
    pids = []
    for rank in range(job["ranks"]):
        result = results / f"{rank}.json"
        act = functools.partial(run_rank, make, rank, job, checkpoint, result)
        pids.append(load_models.in_child(act, result))
    for pid in pids:
        os.waitpid(pid, 0)


def main() -> None:
    directory, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    import sglang.srt.managers.scheduler  # noqa: F401
    import transformers  # noqa: F401

    for name, job in jobs.items():
        results = directory / name / "results"
        results.mkdir(parents=True)
        act = functools.partial(run_job, directory / name, job)
        os.waitpid(load_models.in_child(act, results / "job.json"), 0)


if __name__ == "__main__":
    main()
