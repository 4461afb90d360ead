# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What fingerprints cost a real engine: fingerprint_engine.py [HIDDEN LAYERS]

Two offline engines of one Llama (8B's shape; random weights) run on one GPU with CUDA graphs on,
both with the exporter, one with fingerprints. In turn each takes an update of one small tensor, so
that next to nothing is SGLang's own work, and then generates. Reported are the time that an update
takes longer, what the engine itself measured of it, the memory of each, the ratio of the times of
generation, and whether the same tokens come after every update and from both. Needs SGLang;
without a GPU it runs on the CPU with a tiny model and no graphs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import tiny_model
from engines import Installation
from gpu_engines import nvidia_smi
from update import Engine

from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

ROUNDS, CPU_ROUNDS = 31, 6
OPTIONS = {"log_level": "error", "context_length": 512, "skip_server_warmup": True}
GPU = {
    "device": "cuda",
    "load_format": "dummy",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.5,
    "max_total_tokens": 20_000,
    "cuda_graph_max_bs_decode": 8,  # From 0.5.17 on.
}
CPU = {"device": "cpu", "mem_fraction_static": 0.4, "max_total_tokens": 4096}

PROGRAM = """
import json, os, sys, time
import sglang, torch

PROMPTS = [f"{number} bottles of beer on the wall" for number in range(8)]
SAMPLING = {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True}

def main():
    options = json.loads(sys.argv[2])
    engine = sglang.Engine(model_path=sys.argv[1], **options)
    hidden = json.load(open(sys.argv[1] + "/config.json"))["hidden_size"]
    tensor = torch.ones(hidden, dtype=torch.bfloat16, device=options["device"])
    sessions = hasattr(engine, "begin_weight_update")  # From 0.5.21 on.
    answers = os.fdopen(os.dup(1), "w")
    engine.generate(PROMPTS, SAMPLING)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        tokens = None
        started = time.perf_counter()
        if line == "update\\n":
            if sessions:
                engine.begin_weight_update()
            done = engine.update_weights_from_tensor([("model.norm.weight", tensor)])[:2]
            assert done[0], done[1]
            if sessions:
                engine.end_weight_update()
        else:
            tokens = [one["output_ids"] for one in engine.generate(PROMPTS, SAMPLING)]
        print(json.dumps([time.perf_counter() - started, tokens]), file=answers, flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def write_model(directory: Path, hidden: int, layers: int) -> Path:
    """Llama's shape; its weights are made when it is loaded."""
    tiny_model.write(directory, layers=1)
    config = json.loads((directory / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "head_dim": 128,
        "vocab_size": 32_000,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def used() -> int:
    """MiB in use on the first GPU, by whomever."""
    return nvidia_smi()[0].used if nvidia_smi() else 0


def fingerprinted(engine: Engine) -> tuple[int, int, float | None]:
    """Tensors and bytes of the target, and how long its last fingerprint took."""
    environ = dict(os.environ)
    ((_, snapshot),) = SnapshotReader(RuntimeDir.open(engine.runtime_dir, environ)).read()
    (role,) = snapshot.roles
    assert role.table is not None
    assert role.weights is not None
    total = sum(usage.nbytes for usage in role.weights)
    return role.table.rows, total, role.table.fingerprint_seconds


def middle(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f} ms (at most {1e3 * max(values):.1f})"


def main() -> None:
    gpu = importlib.util.find_spec("torch") is not None and bool(nvidia_smi())
    hidden, layers = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (4096, 32)
    options = json.dumps(OPTIONS | (GPU if gpu else CPU))
    installation = Installation(Path(sys.executable), gpu=gpu)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = directory / "model"
        if gpu:
            write_model(model, hidden, layers)
        else:
            tiny_model.write(model)
        engines: dict[str, Engine] = {}
        memory = [used()]
        for kind, environ in (
            ("without", {}),
            ("with", {"SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on"}),
        ):
            engines[kind] = Engine(
                installation, directory, model, options, program=PROGRAM, **environ
            )
            engines[kind].answer()
            memory.append(used())
            print(f"engine {kind} fingerprints is ready", file=sys.stderr, flush=True)
        taken: dict[tuple[str, str], list[float]] = {}
        tokens: dict[str, list[Any]] = {kind: [] for kind in engines}
        fingerprints: list[float] = []
        rounds = ROUNDS if gpu else CPU_ROUNDS
        for number in range(rounds):
            for what in ("update", "generate"):
                for kind in ("with", "without") if number % 2 else ("without", "with"):
                    seconds, said = engines[kind].ask(what)
                    taken.setdefault((what, kind), []).append(seconds)
                    tokens[kind] += [said] if said else []
            rows, nbytes, seconds_of_one = fingerprinted(engines["with"])
            fingerprints += [seconds_of_one] if seconds_of_one is not None else []
        memory.append(used())
        for engine in engines.values():
            engine.stop()
    # The first of each pays for what SGLang makes only then.
    taken = {key: values[1:] for key, values in taken.items()}
    added = [
        a - b for a, b in zip(taken["update", "with"], taken["update", "without"], strict=True)
    ]
    ratios = [
        a / b for a, b in zip(taken["generate", "with"], taken["generate", "without"], strict=True)
    ]
    print(f"{rows} tensors, {nbytes / 1e9:.2f} GB, {rounds - 1} rounds")
    for kind in engines:
        print(f"update {kind} fingerprints: {middle(taken['update', kind])}")
    print(f"an update takes longer by: {middle(added)}")
    if fingerprints:
        print(f"one fingerprint, by the engine's own clock: {middle(fingerprints)}")
    print(
        f"generation, time with over without: {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})"
    )
    first = tokens["without"][0]
    same = {kind: sum(said == first for said in found) for kind, found in tokens.items()}
    print(f"tokens like the first: {same} of {rounds} each")
    print(
        f"MiB in use: {memory[1] - memory[0]} without, {memory[2] - memory[1]} with, "
        f"{memory[3] - memory[2]} more after the rounds"
    )


if __name__ == "__main__":
    main()
