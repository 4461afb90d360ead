# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the exporter serves of ranks that were recorded, word for word: golden.py [NAME]

A folder of ``golden/`` is one recording: what the ranks of a host had in their runtime directory,
``capture.json`` with the moment and with what NVML said, and the whole text of a scrape, by default
(``default.txt``, Prometheus' text) and of all metrics (``full.txt``, OpenMetrics).

Without a name the texts of all are written anew. ``NAME --from DIRECTORY --about SENTENCE`` takes
a runtime directory while its ranks are alive. ``NAME --engine`` starts the engine that it is a
recording of, with the SGLang beside this Python.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import msgspec
from prometheus_client import Metric
from prometheus_client.registry import Collector

from sglang_weight_exporter.export.gpu_account import GpuAccounts
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.instruments import exporter
from sglang_weight_exporter.export.nvml import GpuMemory, Nvml
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.namespaces import HOST_PIDS
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    from engines import Engine

DIRECTORY = Path(__file__).parents[1] / "export" / "golden"
#: What of a rank is read for its metrics.
FILES = ("snapshot", "progress")
#: Text → what is chosen, and whether it is OpenMetrics.
TEXTS = {"default.txt": ("default", False), "full.txt": ("full", True)}


class Capture(msgspec.Struct):
    """``capture.json``."""

    about: str
    #: Unix seconds.
    at: float
    gpus: list[GpuMemory] = []


class _Nothing(Collector):
    def collect(self) -> Iterable[Metric]:
        return ()


@contextlib.contextmanager
def view_of(recording: Path) -> Iterator[HostView]:
    """The host as the exporter saw it then, with its ranks alive."""
    capture = msgspec.json.decode((recording / "capture.json").read_bytes(), type=Capture)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as held:
        runtime_dir = RuntimeDir.open(Path(directory, "runtime"), {})
        for rank in sorted(path for path in recording.iterdir() if path.is_dir()):
            place = runtime_dir.ranks / rank.name
            shutil.copytree(rank, place)
            assert held.enter_context(FileLock(place / "lock")).acquire()
        snapshots = tuple(snapshot for _, snapshot in SnapshotReader(runtime_dir).read())
        accounts = GpuAccounts(HOST_PIDS).read(snapshots, capture.gpus, 0.0)
        yield HostView(snapshots=snapshots, gpus=accounts, started_at=capture.at, now=capture.at)


def texts(recording: Path) -> dict[str, str]:
    """What is served of it, by the name of the file. The exporter's version is left out."""
    found = {}
    with view_of(recording) as view, patch.object(exporter, "__version__", ""):
        for name, (metrics, openmetrics) in TEXTS.items():
            exposition = Exposition(
                lambda: view,
                _Nothing(),
                exemplars=lambda: True,
                guard=Guard(),
                metrics=(metrics,),
            )
            scrape = exposition.scrape(openmetrics=openmetrics, gzip=False)
            found[name] = asyncio.run(scrape).decode()
    return found


def record(name: str, source: Path, about: str) -> None:
    """Take what is there now."""
    directory = DIRECTORY / name
    shutil.rmtree(directory, ignore_errors=True)
    for rank, _ in SnapshotReader(RuntimeDir(source)).read():
        (directory / rank.rank_id).mkdir(parents=True)
        for file in FILES:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(rank.path / file, directory / rank.rank_id / file)
    if not directory.exists():
        sys.exit(f"No rank is alive in {source}, so there is nothing to record.")
    gpus = [asdict(each) for each in Nvml(Guard()).read()]
    capture = {"about": about, "at": time.time(), "gpus": gpus}
    (directory / "capture.json").write_text(json.dumps(capture, indent=2) + "\n")


# --- real engines -------------------------------------------------------------------------------


def _update(engine: Engine) -> None:
    other = engine.model.parent / "b"
    for path, success in ((other, True), (other.parent / "missing", False), (other, True)):
        assert engine.update_weights_from_disk(path)[1]["success"] == success


def _nothing(engine: Engine) -> None:
    """As it is after its load."""


#: Recording → kind of engine in ``engine_pool.py``, what is done to it, and a sentence.
ENGINES: dict[str, tuple[str, Callable[[Engine], None], str]] = {
    "target": ("engine", _update, "two data-parallel ranks, updated twice, and once in vain"),
    "draft": ("speculative", _nothing, "a target with a draft model"),
    "experts": ("experts", _nothing, "a mixture of experts (the zoo's qwen3_moe)"),
    "encoder": ("encoder", _nothing, "an encoder server of two ranks"),
}

EXPERTS = "--skip-tokenizer-init --skip-server-warmup --attention-backend torch_native"


def record_engine(name: str) -> None:
    """Start the engine, and take what its ranks say."""
    import zoo_models
    from engine_pool import KINDS, NEWEST, EngineKind, EnginePool

    kind, act, about = ENGINES[name]
    pool = EnginePool()
    try:
        directory = pool.checkpoints()[0].parent
        if kind == "experts":
            zoo_models.write(zoo_models.MODELS["qwen3_moe"], directory / kind, seed=0)
            health = (("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0"),)
            KINDS[kind] = EngineKind(NEWEST, tuple(EXPERTS.split()), health, checkpoint=kind)
        engine = pool.ready(kind)
        act(engine)
        record(name, engine.runtime_dir, f"SGLang {NEWEST} on a CPU: {about}.")
    finally:
        pool.end_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="of the folder that is recorded")
    parser.add_argument("--from", dest="source", type=Path, help="a runtime directory")
    parser.add_argument("--about", default="", help="what is recorded, in one sentence")
    parser.add_argument("--engine", action="store_true", help=f"one of {', '.join(ENGINES)}")
    arguments = parser.parse_args()
    if arguments.engine:
        record_engine(arguments.name)
    elif arguments.source:
        record(arguments.name, arguments.source, arguments.about)
    for recording in sorted(DIRECTORY.iterdir()):
        for name, text in texts(recording).items():
            (recording / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
