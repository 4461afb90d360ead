# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update over NCCL takes longer: nccl_buckets.py [HIDDEN LAYERS BUCKETS]

A trainer on the second GPU sends all weights of one Llama (8B's shape) in buckets to engines on the
first, in turn: two without the exporter, two with it, and two with fingerprints, because engines of
one kind differ too (on the CPU one each). Reported are medians of the time from the first bucket
until the engine has answered the last and the trainer has sent it, and what the exporter took of
it by its own clock.
Needs SGLang and two NVIDIA GPUs; without them it runs on the CPU over Gloo with a tiny model.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

from engines import Installation
from fingerprint_engine import CPU, GPU, OPTIONS, write_model
from gpu_engines import nvidia_smi
from ports import free_port
from update import Engine

from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

ROUNDS, CPU_ROUNDS = 31, 5

PROGRAM = """
import json, os, sys, threading, time
os.environ["NCCL_CUMEM_ENABLE"] = "0"  # As SGLang has it; with another value the first one hangs.
import sglang, torch
from sglang.srt.utils import init_custom_process_group

def shapes(config):
    hidden, inner, words = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
    kv = config["num_key_value_heads"] * config["head_dim"]
    made = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden)}
    made["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)), ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            made[f"model.layers.{layer}.{name}.weight"] = shape
    return made

def main():
    options, count, port = json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    gpu = options["device"] == "cuda"
    trainer, backend = ("cuda:1", "nccl") if gpu else ("cpu", "gloo")
    engine = sglang.Engine(model_path=sys.argv[1], **options)
    made = shapes(json.load(open(sys.argv[1] + "/config.json")))
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16, device=trainer) for n, s in made.items()}
    names = list(tensors)
    size = -(-len(names) // count)
    buckets = [names[at:at + size] for at in range(0, len(names), size)]
    groups = []
    def join():
        if gpu:
            torch.cuda.set_device(trainer)
        groups.append(init_custom_process_group(
            backend=backend, init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0,
            group_name="trainer"))
    joining = threading.Thread(target=join)
    joining.start()
    done = engine.init_weights_update_group("127.0.0.1", port, 1, 2, "trainer", backend=backend)
    assert done[0], done[1]
    joining.join()
    def send(bucket):
        if gpu:
            torch.cuda.set_device(trainer)
        for name in bucket:
            torch.distributed.broadcast(tensors[name], src=0, group=groups[0])
        if gpu:
            torch.cuda.synchronize()
    sessions = hasattr(engine, "begin_weight_update")  # From 0.5.21 on.
    def update():
        if sessions:
            engine.begin_weight_update()
        for number, bucket in enumerate(buckets, 1):
            sending = threading.Thread(target=send, args=(bucket,))
            sending.start()
            answer = engine.update_weights_from_distributed(
                bucket, ["bfloat16"] * len(bucket), [list(made[n]) for n in bucket], "trainer",
                flush_cache=number == len(buckets))
            assert answer[0], answer[1]
            sending.join()
        if sessions:
            engine.end_weight_update()
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        engine.generate("once", {"max_new_tokens": 1})
        started = time.perf_counter()
        update()
        print(json.dumps(time.perf_counter() - started), file=answers, flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


KINDS = {
    "without": {"SGLANG_WEIGHT_EXPORTER_DISABLED": "1"},
    "with": {},
    "with fingerprints": {"SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on"},
}


def captured(engine: Engine) -> list[float]:
    """Seconds of its last update that went to the exporter; none where there is none."""
    directory = RuntimeDir.open(engine.runtime_dir, dict(os.environ))
    return [
        role.last_update.phases.get("capture", 0.0)
        for _, snapshot in SnapshotReader(directory).read()
        for role in snapshot.roles
        if role.last_update is not None
    ]


def main() -> None:
    gpu = len(nvidia_smi()) > 1
    sizes = (4096, 32, 14) if gpu else (256, 2, 3)
    hidden, layers, buckets = map(int, sys.argv[1:]) if len(sys.argv) > 1 else sizes
    # Engines share the GPU: tokens say how large each KV pool is, and no fraction of the memory.
    device = (GPU if gpu else CPU) | {"load_format": "dummy", "mem_fraction_static": 0.9}
    options = json.dumps(OPTIONS | device)
    installation = Installation(Path(sys.executable), gpu=gpu)
    taken: dict[str, dict[Engine, list[float]]] = {}
    captures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", hidden, layers)
        engines: list[tuple[str, Engine]] = []
        for kind, environ in list(KINDS.items()) * (2 if gpu else 1):
            directory = Path(name) / str(len(engines))
            directory.mkdir()
            arguments = (options, str(buckets), str(free_port()))
            engine = Engine(installation, directory, model, *arguments, program=PROGRAM, **environ)
            engines.append((kind, engine))
        for _, engine in engines:
            engine.answer()
        print(f"{len(engines)} engines are ready", file=sys.stderr, flush=True)
        for number in range(ROUNDS if gpu else CPU_ROUNDS):
            for kind, engine in engines if number % 2 else reversed(engines):
                seconds = engine.update()
                # The first of each pays for what SGLang and NCCL make only then.
                if number:
                    taken.setdefault(kind, {}).setdefault(engine, []).append(seconds)
                    if kind != "without":
                        captures.setdefault(kind, []).extend(captured(engine))
        for _, engine in engines:
            engine.stop()
    without = statistics.fmean(map(statistics.median, taken["without"].values()))
    for kind, by_engine in taken.items():
        medians = [statistics.median(each) for each in by_engine.values()]
        each = " and ".join(f"{1e3 * median:.1f}" for median in medians)
        more = statistics.fmean(medians) - without
        print(f"{buckets} buckets, {kind}: {each} ms, {1e3 * more:+.1f} ms")
        if kind in captures:
            print(f"  by its own clock: {1e3 * statistics.median(captures[kind]):.1f} ms of it")


if __name__ == "__main__":
    main()
