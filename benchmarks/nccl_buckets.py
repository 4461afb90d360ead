# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update over NCCL takes longer: nccl_buckets.py [HIDDEN LAYERS BUCKETS]

A trainer on the second GPU sends all weights of one Llama (8B's shape) in buckets to four engines
on the first, in turn: two without the exporter, whose difference is that of any two engines, one
with it, and one with fingerprints. Reported are medians of the time from the first bucket until the
engine has answered the last and the trainer has sent it.
Needs SGLang and two NVIDIA GPUs; without them it runs on the CPU over Gloo with a tiny model.
"""

from __future__ import annotations

import json
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


def main() -> None:
    gpu = len(nvidia_smi()) > 1
    sizes = (4096, 32, 14) if gpu else (256, 2, 3)
    hidden, layers, buckets = map(int, sys.argv[1:]) if len(sys.argv) > 1 else sizes
    device = (GPU if gpu else CPU) | {"load_format": "dummy", "mem_fraction_static": 0.25}
    options = json.dumps(OPTIONS | device)
    installation = Installation(Path(sys.executable), gpu=gpu)
    off = {"SGLANG_WEIGHT_EXPORTER_DISABLED": "1"}
    kinds = {
        "without": off,
        "without, another engine": off,
        "with": {},
        "with fingerprints": {"SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on", "NO_COLOR": "1"},
    }
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", hidden, layers)
        engines: dict[str, Engine] = {}
        for number, (kind, environ) in enumerate(kinds.items()):
            directory = Path(name) / str(number)
            directory.mkdir()
            engines[kind] = Engine(
                installation,
                directory,
                model,
                options,
                str(buckets),
                str(free_port()),
                program=PROGRAM,
                **environ,
            )
            engines[kind].answer()
            print(f"engine {kind} is ready", file=sys.stderr, flush=True)
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(ROUNDS if gpu else CPU_ROUNDS):
            order = list(kinds) if number % 2 else list(reversed(kinds))
            for kind in order:
                taken[kind].append(engines[kind].update())
        for engine in engines.values():
            engine.stop()
    # The first of each pays for what SGLang and NCCL make only then.
    without = statistics.median(taken["without"][1:])
    for kind, seconds in taken.items():
        median = statistics.median(seconds[1:])
        print(
            f"{buckets} buckets, {kind}: {1e3 * median:.1f} ms, {1e3 * (median - without):+.1f} ms "
            f"(at most {1e3 * max(seconds[1:]):.1f})"
        )


if __name__ == "__main__":
    main()
