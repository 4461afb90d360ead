# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters that come and go, and updates that leave experts out, each in a real rank of SGLang on
the CPU, and what it says of itself after each step: `changes_actor.py DIRECTORY NAME`. A rank is
SGLang's Scheduler without a server, as in ``tests/zoo/load_models.py``, in a child of its own. What
came of it is in ``NAME.json``.
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
from zoo.load_models import Checkpoints, ModelInARank, in_child, make_schedulers
from zoo_models import MODELS, write, write_adapter
from zoo_variants import ADAPTED, VARIANTS


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
    variant, both = VARIANTS["lora"], (checkpoint, checkpoint)
    make = make_schedulers(checkpoint, "cpu", 1, variant.flags)
    rank = ModelInARank(make(0), Checkpoints(both, both), directory / "adapters.json", variant)
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


def experts(directory: Path) -> None:
    """Updates that bring all of a mixture of experts, and then all but its experts."""
    from safetensors.torch import load_file
    from sglang.srt.managers import io_struct
    from sglang.srt.utils import MultiprocessingSerializer

    checkpoints = directory / "experts" / "a", directory / "experts" / "b"
    for seed, checkpoint in enumerate(checkpoints):
        write(MODELS["qwen3_moe"], checkpoint, seed)
    tensors = [load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints]
    make, beside = make_schedulers(checkpoints[0], "cpu", 1), Checkpoints(checkpoints, checkpoints)
    rank = ModelInARank(make(0), beside, directory / "experts.json", VARIANTS[""])
    script = Script(rank)

    def bucket(number: int, *, dense: bool = False) -> Any:
        named = [
            (name, each)
            for name, each in tensors[number % 2].items()
            if not dense or ".experts." not in name
        ]
        serialized = [MultiprocessingSerializer.serialize(named)]
        return io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=serialized)

    # All at once: receiving changes how SGLang sends, and that needs a GPU then.
    requests = {f"all {number}": bucket(number) for number in range(1, 5)}
    requests["the same"] = bucket(4)
    requests |= {f"dense {number}": bucket(number, dense=True) for number in range(1, 8)}
    script.step("start", "")
    for name, request in requests.items():
        begun = rank.ask(io_struct.BeginWeightUpdateReqInput())
        written = begun or rank.ask(request)
        script.step(name, written or rank.ask(io_struct.EndWeightUpdateReqInput()))


SCENARIOS: dict[str, Callable[[Path], None]] = {"adapters": adapters, "experts": experts}


def main() -> None:
    import sglang.srt.managers.scheduler  # noqa: F401
    import transformers  # noqa: F401

    directory, name = Path(sys.argv[1]), sys.argv[2]
    scenario = functools.partial(SCENARIOS[name], directory)
    os.waitpid(in_child(scenario, directory / f"{name}.json"), 0)


if __name__ == "__main__":
    main()
