# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real SGLang engines on NVIDIA GPUs, and a probe inside each of their ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from engines import Engine, Installation

from sglang_weight_exporter.records.snapshot import Snapshot
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import WeightTable

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 4096, 8, 32000
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 128
BFLOAT16 = 2
MIB = 2**20
TOKENS = 200_000

#: pytest's `record_property`.
Record = Callable[[str, object], None]

SPECULATIVE = (
    "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3"
)


@dataclass(frozen=True)
class EngineKind:
    """How the engine behind a fixture is started; a word in braces is a checkpoint's name."""

    flags: str
    gpus: tuple[int, ...] = (0,)
    variables: tuple[tuple[str, str], ...] = ()
    graphs: bool = False


FINGERPRINTS = (("SGLANG_WEIGHT_EXPORTER_FINGERPRINT", "on"),)


KINDS = {
    "gpu_engine": EngineKind("--enable-memory-saver --enable-metrics"),
    "two_gpu_engine": EngineKind("--enable-memory-saver --tp-size 2", gpus=(0, 1)),
    "fingerprint_engine": EngineKind("--enable-memory-saver", variables=FINGERPRINTS),
    "two_gpu_fingerprint_engine": EngineKind(
        "--enable-memory-saver --tp-size 2", gpus=(0, 1), variables=FINGERPRINTS
    ),
    "manifest_engine": EngineKind(
        "",
        variables=(
            *FINGERPRINTS,
            ("SGLANG_WEIGHT_EXPORTER_MANIFEST_DIR", "{directory}/sent"),
        ),
    ),
    "offload_engine": EngineKind("--cpu-offload-gb 1"),
    "lora_engine": EngineKind(
        "--enable-lora --max-lora-rank 16 --lora-target-modules q_proj v_proj"
        " --max-loras-per-batch 2",
        variables=FINGERPRINTS,
    ),
    "graph_engine": EngineKind("", graphs=True),
    "saver_graph_engine": EngineKind(
        "--enable-memory-saver --disable-prefill-cuda-graph",
        variables=(("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "true"),),
        graphs=True,
    ),
    # Of one test each, which runs it out of memory.
    "doomed_engine": EngineKind(
        "--context-length 16384",
        variables=(("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1"),),
    ),
    "eagle_engine": EngineKind(
        "--speculative-algorithm EAGLE --speculative-draft-model-path {eagle} " + SPECULATIVE
    ),
    "standalone_engine": EngineKind(
        "--speculative-algorithm STANDALONE --speculative-draft-model-path {draft} "
        "--enable-metrics " + SPECULATIVE
    ),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi has it; memory in MiB."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    total: int
    used: int


def nvidia_smi() -> list[Gpu]:
    """The GPUs of this machine; none without a driver."""
    query = ["--query-gpu=index,uuid,name,pci.bus_id,memory.total,memory.used"]
    try:
        output = subprocess.check_output(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [line.split(", ") for line in output.splitlines()]
    return [
        Gpu(int(index), uuid, name, bus, int(total), int(used))
        for index, uuid, name, bus, total, used in rows
    ]


def shapes(layers: int, *, eagle: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint, or of an EAGLE draft's, which has no embeddings."""
    prefix = "" if eagle else "model."
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        name = f"{prefix}layers.{layer}."
        found |= {
            name + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            name + "post_attention_layernorm.weight": (HIDDEN,),
            name + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
        if not eagle:
            found[name + "input_layernorm.weight"] = (HIDDEN,)
    if eagle:
        found |= {"fc.weight": (HIDDEN, 2 * HIDDEN), "fc.bias": (HIDDEN,)}
    else:
        found |= {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (VOCABULARY, HIDDEN),
        }
    return found


def write_checkpoint(
    directory: Path, seed: int, *, layers: int = LAYERS, eagle: bool = False
) -> Path:
    """A checkpoint large enough to be seen in the memory of a GPU: 368 MB, bfloat16."""
    import torch
    from safetensors.torch import save_file

    tiny_model.write(directory)
    config = json.loads((directory / "config.json").read_text()) | {
        "architectures": ["LlamaForCausalLMEagle" if eagle else "LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        for name, shape in shapes(layers, eagle=eagle).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@dataclass
class Rank:
    """One rank: what it publishes, and what its probe says."""

    directory: RankDirectory
    snapshot: Snapshot
    probes: Path

    def ask(self, name: str, **arguments: Any) -> Any:
        """The probe's answer from inside the rank."""
        with Client(str(self.probes / f"{self.snapshot.pid}.socket")) as connection:
            connection.send((name, arguments))
            answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def role(self, name: str = "target") -> Any:
        return next(role for role in self.snapshot.roles if role.name == name)

    def table(self, role: str = "target") -> WeightTable:
        return self.directory.table(self.role(role).table.file)


@dataclass
class GpuEngine:
    """An engine, its GPUs, and its ranks in the order of their tensor-parallel rank."""

    engine: Engine
    gpus: tuple[int, ...]
    probes: Path

    def ranks(self) -> list[Rank]:
        reader = SnapshotReader(RuntimeDir(self.engine.runtime_dir))
        found = [Rank(directory, snapshot, self.probes) for directory, snapshot in reader.read()]
        return sorted(found, key=lambda rank: rank.snapshot.ranks.tp)

    def kv_pool_bytes(self, *, layers: int = LAYERS) -> int:
        """Of keys and values on all of its GPUs, by its configuration."""
        tokens = TOKENS + self.engine.server_info()["page_size"]
        pool: int = tokens * 2 * layers * KV_HEADS * HEAD_DIM * BFLOAT16
        return pool

    def used(self) -> list[int]:
        """MiB in use on each of the engine's GPUs, by whomever."""
        return [gpu.used for gpu in nvidia_smi() if gpu.index in self.gpus]


@dataclass
class GpuEngines:
    """All engines that the collected tests ask for."""

    directory: Path
    checkpoints: dict[str, Path] = field(default_factory=dict)
    engines: dict[str, GpuEngine] = field(default_factory=dict)

    def start(self, name: str) -> None:
        kind = KINDS[name]
        probes = self.directory / name
        probes.mkdir()
        flags = kind.flags.format(**self.checkpoints).split()
        engine = Engine(
            Installation(Path(sys.executable), gpu=True, graphs=kind.graphs),
            self.checkpoints["a"],
            # The first answer would compile kernels for a minute, and no test needs one.
            flags=[*flags, "--max-total-tokens", str(TOKENS), "--skip-server-warmup"],
            variables={
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
                # Engines that share GPU 0 leave it with less free memory than GPU 1.
                "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
                "GPU_PROBE_DIRECTORY": str(probes),
                **dict(kind.variables),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(self.directory / "site"), os.environ.get("PYTHONPATH")])
                ),
            },
        )
        self.engines[name] = GpuEngine(engine, kind.gpus, probes)
        engine.start()

    def install_probe(self) -> None:
        """For engines that are started with `site` in their path."""
        install_probe(self.directory / "site")


def install_probe(site: Path) -> None:
    """As pip would: the module, and the entry point that SGLang looks for."""
    metadata = site / "gpu_probe-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "gpu" / "probe.py", site / "gpu_probe.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gpu-probe\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ngpu_probe = gpu_probe:plugin\n"
    )


def need_gpus(count: int = 1) -> None:
    """Skips the test where there are fewer."""
    there = len(nvidia_smi())
    if there < count:
        pytest.skip(f"needs {count} NVIDIA GPU{'s' * (count > 1)}, found {there}")


def run_on_gpu(*arguments: str | Path, **variables: str) -> str:
    """What a Python program with this package prints, which needs a GPU."""
    need_gpus()
    package = Path(sys.modules["sglang_weight_exporter"].__path__[0]).parent
    paths = [str(Path(__file__).parent), str(package), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(table: WeightTable) -> dict[str, tuple[int, int]]:
    """Name → address and bytes."""
    names = table.names.decode().split("\n")
    pairs = zip(array("Q", table.data_ptr), array("Q", table.nbytes), strict=True)
    return dict(zip(names, pairs, strict=True))


def storages(table: WeightTable) -> dict[int, int]:
    """Address → bytes of every storage that holds something."""
    pairs = zip(array("Q", table.storage_ptr), array("Q", table.storage_nbytes), strict=True)
    return {address: size for address, size in pairs if address}


def grown(calls: list[tuple[str, bool, int, int]], method: str) -> int:
    """Bytes that torch's allocator handed out for good in a runner's method."""
    return sum(after - before for name, _, before, after in calls if name == method)
