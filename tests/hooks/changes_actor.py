# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters that come and go, in a real rank of SGLang on the CPU, and what it says of itself after
each step: `changes_actor.py DIRECTORY`. A rank is SGLang's Scheduler without a server, as in
``tests/zoo/load_models.py``, in a child of its own. What came of it is in ``NAME.json``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from zoo.load_models import ADAPTED, ModelInARank, in_child, make_schedulers
from zoo_models import MODELS, write, write_adapter


class Script:
    """What was asked, and what the exporter would read after it."""

    def __init__(self, rank: ModelInARank) -> None:
        self.rank = rank
        self.steps: dict[str, Any] = {}

    def step(self, name: str, problem: str) -> None:
        (directory,) = [
            reader.directory
            for reader in self.rank.readers()
            if reader.directory.snapshot().pid == os.getpid()
        ]
        self.steps[name] = {
            "problem": problem,
            "snapshot": msgspec.to_builtins(directory.snapshot()),
            "slots": self._slots(),
        }
        self.rank.result.write_text(json.dumps(self.steps))

    def _slots(self) -> dict[str, int]:
        manager = getattr(self.rank.scheduler.tp_worker.model_runner, "lora_manager", None)
        if manager is None:
            return {}
        slots = manager.memory_pool.uid_to_buffer_id
        return {
            reference.lora_name: slots[identifier]
            for identifier, reference in manager.lora_refs.items()
            if identifier in slots
        }


def adapters(directory: Path) -> None:
    from sglang.srt.managers import io_struct

    checkpoint = directory / "llama"
    write(MODELS["llama"], checkpoint, 0)
    for name, size in (("one", 8), ("two", 4), ("large", 32)):
        write_adapter(checkpoint, directory / name, ADAPTED, rank=size)
    make = make_schedulers(checkpoint, "cpu", 1, "lora")
    rank = ModelInARank(make(0), (checkpoint, checkpoint), directory / "adapters.json")
    script = Script(rank)

    def load(path: str, name: str = "") -> str:
        name = name or path
        adapter = {"lora_name": name, "lora_id": f"{name} of {path}"}
        path = str(directory / path)
        return rank.ask(io_struct.LoadLoRAAdapterReqInput(**adapter, lora_path=path))

    def unload(path: str) -> str:
        adapter = {"lora_name": path, "lora_id": f"{path} of {path}"}
        return rank.ask(io_struct.UnloadLoRAAdapterReqInput(**adapter))

    script.step("start", "")
    script.step("one", load("one"))
    script.step("token", rank.generate("one of one"))
    script.step("two", load("two"))
    script.step("large", load("large"))
    script.step("missing", load("nowhere"))
    script.step("without one", unload("one"))
    script.step("without two", unload("two"))
    script.step("two as one", load("two", "one"))


SCENARIOS: tuple[Callable[[Path], None], ...] = (adapters,)


def main() -> None:
    import sglang.srt.managers.scheduler  # noqa: F401
    import transformers  # noqa: F401

    directory = Path(sys.argv[1])
    for scenario in SCENARIOS:
        result = directory / f"{scenario.__name__}.json"
        os.waitpid(in_child(functools.partial(scenario, directory), result), 0)


if __name__ == "__main__":
    main()
