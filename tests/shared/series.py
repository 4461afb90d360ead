# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How many series there are of what, as docs/cost.md has it: series.py [TEXT...]

Counted on what is served of simulated and of recorded ranks, preset by preset. Given the texts of
two scrapes of another version's ``serve --simulate 3x8``, as loaded and once all was updated, and
one of each recording, that version's column.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import golden
from prometheus_client import ProcessCollector

from sglang_weight_exporter.export.gpu_account import GpuAccounts
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.views import HostView
from sglang_weight_exporter.settings import METRIC_PRESETS
from sglang_weight_exporter.simulation import FIRST_SECONDS, ROUND_SECONDS, Simulation
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Families that are there only where somebody has switched fingerprints on.
FINGERPRINTS = (
    "sglang_weight_fingerprint",
    "sglang_weight_tensors_altered",
    "sglang_weight_updates_without_change",
)
ACCOUNT = ("sglang_rank_memory_",)
GPUS = 8

#: Names of texts: of simulated ranks as loaded and updated, and of recordings.
Texts = Mapping[str, str]


def text_of(view: HostView, preset: str) -> str:
    """What a scrape gives."""
    exposition = Exposition(
        lambda: view,
        ProcessCollector(registry=None),
        exemplars=lambda: False,
        guard=Guard(),
        metrics=(preset,),
    )
    return asyncio.run(exposition.scrape(openmetrics=False, gzip=False)).decode()


def _simulated(engines: int) -> Iterator[HostView]:
    """Engines of eight ranks as loaded, and after each was updated twice."""
    with tempfile.TemporaryDirectory() as directory:
        runtime_dir = RuntimeDir.open(Path(directory, "runtime"), {})
        simulation = Simulation(runtime_dir, engines, GPUS, start=1e9)
        reader, accounts = SnapshotReader(runtime_dir), GpuAccounts()
        for after in (0.0, FIRST_SECONDS + 2 * ROUND_SECONDS - 1.0):
            simulation.advance(1e9 + after)
            snapshots = tuple(each for _, each in reader.read())
            gpus = accounts.read(snapshots, simulation.gpus(), after)
            yield HostView(snapshots=snapshots, gpus=gpus, now=1e9 + after, scrape_seconds=0.1)
        simulation.close()


def texts() -> dict[str, dict[str, str]]:
    """By preset, all that is counted."""
    views = dict(zip(("loaded", "updated"), _simulated(3), strict=True))
    found = {
        preset: {name: text_of(view, preset) for name, view in views.items()}
        for preset in METRIC_PRESETS
    }
    for recording in golden.DIRECTORY.iterdir():
        with golden.view_of(recording) as view:
            for preset in METRIC_PRESETS:
                found[preset][recording.name] = text_of(view, preset)
    return found


def count(text: str, belongs: Callable[[str], bool], **labels: str) -> int:
    """Series whose name belongs, and that have these labels; an empty one is one that they lack."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return sum(
        belongs(re.split(r"[{ ]", line, maxsplit=1)[0])
        and all((f'{k}="{v}"' in line) if v else (f"{k}=" not in line) for k, v in labels.items())
        for line in lines
    )


def rows(found: Texts) -> dict[str, float]:
    """Each row of the table."""

    def plain(name: str) -> bool:
        return not name.startswith((*ACCOUNT, *FINGERPRINTS))

    def of(text: str, belongs: Callable[[str], bool] = plain, engine: str = "30000") -> int:
        return count(found[text], belongs, engine=engine, tp_rank="0", role="target")

    def draft(text: str) -> int:
        return count(found[text], plain, engine="30002", tp_rank="0", role="draft")

    def fingerprints(name: str) -> bool:
        return name.startswith(FINGERPRINTS)

    account = of("updated", lambda name: name.startswith(ACCOUNT))
    of_gpu = count(found["updated"], plain, gpu="0")
    host = count(found["updated"], plain, engine="", gpu="")
    real = count(found["target"], plain, tp_rank="0", dp_rank="0", role="target")
    real_host = count(found["target"], plain, engine="", gpu="")

    return {
        "a target as loaded": of("loaded"),
        "a target updated from one source": of("updated"),
        "a draft as loaded": draft("loaded"),
        "a draft updated": draft("updated"),
        "the account of a rank's GPU memory": account,
        "fingerprints of an updated target": of("updated", fingerprints),
        "a GPU, by NVML and the account": of_gpu,
        "a host": host,
        "a GPU of eight, of a target updated from one source": (
            of("updated") + account + of_gpu + host / GPUS
        ),
        "recorded: a target updated from one source": real,
        "recorded: its fingerprints": count(
            found["target"], fingerprints, tp_rank="0", dp_rank="0", role="target"
        ),
        "recorded: a target with a draft, as loaded": count(found["draft"], plain, tp_rank="0"),
        "recorded: a mixture of experts, as loaded": count(found["experts"], plain, tp_rank="0"),
        "recorded: a rank of an encoder server": count(found["encoder"], plain, dp_rank="0"),
        "recorded: a host": real_host,
        "a GPU of eight, its target and host as recorded": (
            real + account + of_gpu + real_host / GPUS
        ),
    }


def main() -> None:
    if sys.argv[1:]:
        columns = [rows({Path(path).stem: Path(path).read_text() for path in sys.argv[1:]})]
    else:
        columns = [rows(found) for found in texts().values()]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:g}' for column in columns)} |")


if __name__ == "__main__":
    main()
