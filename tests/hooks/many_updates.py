# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`many_updates.py OUT FIRST SECOND NUMBER`: a real scheduler that updates its weights so often,
every second time from tensors in a session and else from one of two checkpoints. Writes to OUT, as
JSON, what was counted, and what the process has after a hundred and at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from actor import NORM, make_scheduler
from sglang.srt.managers import io_struct

from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    out, *paths, number = sys.argv[1:]
    scheduler = make_scheduler(paths[0])

    def ask(request: str, **arguments: Any) -> None:
        answer = scheduler._request_dispatcher(getattr(io_struct, request)(**arguments))
        assert answer.success, answer.message

    norm = [(NORM, torch.ones(128, dtype=torch.bfloat16))]
    # Not by a request: SGLang sends and receives each handle once, and again only with a GPU.
    updater = scheduler.tp_worker.model_runner.weight_updater
    seen: list[tuple[int, int]] = []
    with torch.inference_mode():
        for index in range(int(number)):
            if index % 2:
                path = paths[index // 2 % 2]
                ask("UpdateWeightFromDiskReqInput", model_path=path, load_format="auto")
            else:
                ask("BeginWeightUpdateReqInput")
                assert updater.update_weights_from_tensor(named_tensors=norm)[0]
                ask("EndWeightUpdateReqInput")
            if index in {99, int(number) - 1}:
                seen.append((descriptors(), resident()))
    directory = Path(os.environ["SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR"])
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(directory, os.environ)).read()
    (role,) = snapshot.roles
    left = {
        "updates": {source: each.updates for source, each in role.updates.items() if each.updates},
        "failures": sum(each.failures for each in role.updates.values()),
        "errors": snapshot.hook_errors,
        "descriptors": [each[0] for each in seen],
        "resident": [each[1] for each in seen],
        "files": sum(len(files) for _, _, files in os.walk(directory)),
    }
    Path(out).write_text(json.dumps(left))


if __name__ == "__main__":
    main()
    os._exit(0)  # SGLang's threads would keep the process.
