# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's weight-cache daemon, and a rank that maps its weights, on a machine without a GPU.

`weight_cache.py daemon MODEL READY` or `weight_cache.py engine MODEL READY`: READY is the file
that the daemon writes when it serves. Both run until they are killed. All of it is SGLang's own
code but what only CUDA has: a GPU's identity, and memory handles (shared memory stands for those).
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms import current_platform


def stand_in(platform: type, name: str, result: Any = None) -> None:
    setattr(platform, name, lambda *arguments: result)


def serve(model: str) -> None:
    """As `python -m sglang.srt.weight_cache.daemon` for one rank."""
    platform = type(current_platform)
    stand_in(platform, "is_cuda_alike", True)
    stand_in(platform, "get_device", torch.device("cpu"))
    stand_in(platform, "get_torch_distributed_backend_str", "gloo")
    for name in ("set_device", "synchronize", "empty_cache"):
        stand_in(platform, name)
    torch.cuda.memory_reserved = lambda *arguments: 0
    flags = ["--model-path", model, "--device", "cpu", "--gpu-id", "0", "--tp-rank", "0"]
    sys.argv = ["daemon", *flags]
    runpy.run_module("sglang.srt.weight_cache.daemon", run_name="__main__", alter_sys=True)


def attach(model: str, ready: Path) -> None:
    """A rank with ``--weight-cache-mode client``."""
    from actor import make_scheduler

    while not ready.exists():
        time.sleep(0.1)
    scheduler = make_scheduler(model, flags="--weight-cache-mode client")
    threading.Event().wait()
    del scheduler


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    stand_in(type(current_platform), "get_device_uuid", "none")
    part, checkpoint, ready_file = sys.argv[1:]
    if part == "daemon":
        serve(checkpoint)
    else:
        attach(checkpoint, Path(ready_file))
