# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Models of the zoo in real ranks, one after another: `load_models.py DIRECTORY DEVICE NAME...`.

SGLang is imported once, which is most of the work; each model is loaded in a child of its own, with
``NAME:2`` in two that are tensor-parallel ranks of one engine, with ``NAME+fp8`` quantized as it is
loaded, with ``NAME+lora`` with a LoRA adapter that comes and goes, and so on (``zoo_variants``). A
rank is SGLang's Scheduler without a server. What came of it is written to
``DIRECTORY/results/NAME.json``, or ``NAME-RANK.json``. A GPU is nothing that a child can have from
its parent, so there each rank imports SGLang for itself.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
import traceback
import urllib.parse
import urllib.request
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draft_plugin
import zoo_manifests
import zoo_variants
from zoo_models import MODELS, Model, write
from zoo_variants import Variant

LIMIT = 300
TP_FLAGS = " --disable-custom-all-reduce"
FLAGS = {
    "cpu": "--device cpu --attention-backend torch_native --mem-fraction-static 0.8",
    "cuda": "--attention-backend triton --sampling-backend pytorch --disable-cuda-graph"
    " --mem-fraction-static 0.3",
}
COMMON = " --skip-tokenizer-init --disable-overlap-schedule --context-length 512"
COMMON += " --max-total-tokens 4096 --trust-remote-code"


@dataclass(frozen=True)
class Checkpoints:
    """Two that an engine reads, and two of the model that is looked at: a draft may have others."""

    served: tuple[Path, Path]
    own: tuple[Path, Path]


class ModelInARank:
    """What happens to one model, and what the exporter makes of it."""

    def __init__(
        self, scheduler: Any, checkpoints: Checkpoints, result: Path, variant: Variant
    ) -> None:
        from sglang_weight_exporter.settings import Settings
        from sglang_weight_exporter.store.runtime_dir import RuntimeDir

        self.scheduler = scheduler
        self.variant, self.checkpoints = variant, checkpoints
        self.target = self.model = scheduler.tp_worker.model_runner.model
        if variant.role == "draft":
            ((_, runner),) = scheduler.draft_worker.weight_update_runners()
            self.model = runner.model
        self.first, self.second = checkpoints.own
        self.result = result
        settings, _ = Settings.from_environ(os.environ)
        self.runtime_dir = RuntimeDir.open(settings.runtime_dir, os.environ)
        self.seen: dict[str, Any] = {
            "class": type(self.model).__name__,
            "problems": {},
            "steps": {},
        }
        #: By whether a tensor is all that the file has of it: found equal, and not, at any step.
        self.equal: dict[str, set[str]] = {"whole": set(), "shares": set()}
        self.unequal: dict[str, set[str]] = {"whole": set(), "shares": set()}
        self.addresses: dict[str, int] = {}
        self.sent = zoo_manifests.SentCheckpoints()

    def run(self) -> None:
        from sglang.srt.managers import io_struct

        disk = io_struct.UpdateWeightFromDiskReqInput

        def read(number: int) -> Callable[[], str]:
            path = str(self.checkpoints.served[number])
            return functools.partial(self.ask, disk(model_path=path, load_format="auto"))

        self._step("load", None, self.first)
        self._beside(self.second)
        adapter = self.first.parent / "adapter"
        adapted: tuple[tuple[str, Callable[[], str], Path], ...] = (
            ("adapter", functools.partial(self._load_adapter, adapter), self.first),
            ("without", self._unload_adapter, self.first),
        )
        # An update that is of the target leaves a draft with a checkpoint of its own as it is.
        last = self.first if self.variant.draft else self.second
        steps: tuple[tuple[str, Callable[[], str], Path], ...] = (
            ("the same", read(0), self.first),
            ("another", read(1), last),
            ("tokens", self.generate, last),
        )
        if next(self.model.parameters()).is_cuda:
            # On a CPU SGLang waits for a GPU there, and fails.
            steps += (("resume", self._release_and_resume, last),)
        # After an update that failed nobody knows what is there.
        all(self._step(*step) for step in (adapted if self.variant.adapted else steps))
        if os.environ.get("ZOO_PROMETHEUS"):
            self._wait_until_scraped(os.environ["ZOO_PROMETHEUS"])

    def _wait_until_scraped(self, prometheus: str) -> None:
        """What the rank came to is what the rules have to judge, and not how it was on the way."""
        pid = os.getpid()
        (reader,) = [each for each in self.readers() if each.directory.snapshot().pid == pid]
        labels = f'model_name="{reader.engine.model_name}",tp_rank="{reader.ranks.tp}"'
        settled = f"timestamp(sglang_weight_update_in_progress{{{labels}}} == 0) > {time.time()}"
        question = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': settled})}"
        while True:
            with urllib.request.urlopen(question) as answer:
                if json.load(answer)["data"]["result"]:
                    return
            time.sleep(0.2)

    def ask(self, request: Any) -> str:
        import torch

        with torch.inference_mode():  # As SGLang's event loop has it.
            answer = self.scheduler._request_dispatcher(request)
        if getattr(answer, "success", True):
            return ""
        return str(getattr(answer, "message", "") or answer.error_message)

    def _release_and_resume(self) -> str:
        """Nothing is freed without torch_memory_saver; SGLang puts buffers back all the same."""
        from sglang.srt.managers import io_struct

        released = self.ask(io_struct.ReleaseMemoryOccupationReqInput())
        resumed = released or self.ask(io_struct.ResumeMemoryOccupationReqInput())
        self._capture_again()
        return resumed

    def _load_adapter(self, path: Path) -> str:
        from sglang.srt.managers import io_struct

        adapter = {"lora_name": "zoo", "lora_id": "zoo", "lora_path": str(path)}
        loaded = self.ask(io_struct.LoadLoRAAdapterReqInput(**adapter))
        return loaded or self.generate("zoo")  # It comes into its slot with the first request.

    def _unload_adapter(self) -> str:
        from sglang.srt.managers import io_struct

        unloaded = self.ask(io_struct.UnloadLoRAAdapterReqInput(lora_name="zoo", lora_id="zoo"))
        return unloaded or self.generate()

    def generate(self, adapter: str | None = None) -> str:
        """Four tokens, as the event loop of SGLang's scheduler makes them."""
        import torch
        from sglang.srt.managers import io_struct
        from sglang.srt.sampling.sampling_params import SamplingParams

        parameters = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0)
        parameters.normalize(None)
        request = io_struct.TokenizedGenerateReqInput(
            rid="zoo",
            input_text="",
            input_ids=array("q", [5, 6, 7, 8]),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=parameters,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            lora_id=adapter,
        )
        scheduler = self.scheduler
        with torch.inference_mode():
            scheduler.process_input_requests([request])
            for _ in range(8):
                plan = scheduler.get_next_batch_to_run(
                    running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
                )
                scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
                if batch:
                    result = scheduler.run_batch(batch)
                    scheduler.process_batch_result(batch, result)
                scheduler.last_batch = batch
        self._capture_again()
        return "" if scheduler.last_batch is None else "requests are running still"

    def _capture_again(self) -> None:
        """As `verify` asks for it."""
        from sglang.srt.managers import io_struct

        self.ask(io_struct.CheckWeightsReqInput(action="checksum", skip_tensor_list=[""]))

    def _step(self, name: str, act: Callable[[], str] | None, checkpoint: Path) -> bool:
        """Whether SGLang did it."""
        from sglang_weight_exporter.export.references import device_kind
        from sglang_weight_exporter.verification.confirmed_loaders import pattern

        try:
            problem = "" if act is None else act()
        except Exception as error:  # Of SGLang's; what it left is looked at all the same.
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if problem:
            self.seen["problems"][name] = problem
            self._write()
            return False
        (table,) = [
            reader.read(10.0)
            for reader in self.readers()
            if reader.directory.snapshot().pid == os.getpid()
        ]
        comparison, expected = self._compare(table, checkpoint)
        addresses = {row.name: row.data_ptr for row in table.rows()}
        moved = sum(self.addresses.get(each, at) != at for each, at in addresses.items())
        self.addresses = addresses
        update = table.role.last_update
        published = sum(use.nbytes for use in table.role.weights if use.kind != "derived")
        self.seen["steps"][name] = {
            "equal": len(comparison.equal),
            "different": sorted(comparison.differing),
            "not_comparable": len(comparison.unverifiable),
            "equal_bytes": round(comparison.equal_bytes / comparison.all_bytes, 4),
            "bytes": [published, self._bytes()],
            "moved": [update.changes.moved if act and update.action == "update" else 0, moved],
            "modified": table.role.table.modified or 0,
            "modified_names": list(table.role.table.modified_names),
        }
        if self.variant.role == "target":  # Nobody sends a draft.
            other = self.second if checkpoint == self.first else self.first
            self.seen["steps"][name]["sent"] = self.sent.compare(table, checkpoint, other)
        self.seen |= {
            "architecture": table.role.architecture,
            "release": table.engine.sglang_version,
            "device": device_kind(table),
            "quantization": table.role.quantization,
            "derived": sum(row.kind == "derived" for row in table.rows()),
        }
        for names, found in (
            (comparison.equal, self.equal),
            ((*comparison.unverifiable, *comparison.differing), self.unequal),
        ):
            for each in set(names) & expected.fingerprints.keys():
                found["whole" if each in expected.whole else "shares"].add(pattern(each))
        self._write()
        return True

    def readers(self) -> Any:
        from sglang_weight_exporter.store.tables import open_tables

        return open_tables(self.runtime_dir.path, role=self.variant.role)

    def _compare(self, table: Any, checkpoint: Path) -> tuple[Any, Any]:
        from sglang_weight_exporter.cli.table_comparisons import against_checkpoint
        from sglang_weight_exporter.verification.checkpoint import Checkpoint
        from sglang_weight_exporter.verification.checkpoint_layout import (
            ServedTensor,
            expected_fingerprints,
        )

        ((_, comparison),) = against_checkpoint([table], checkpoint, None).results
        served = [
            ServedTensor(row.name, row.dtype, row.shape_in_memory, row.kind) for row in table.rows()
        ]
        expected = expected_fingerprints(
            served,
            Checkpoint(checkpoint),
            tp_rank=table.ranks.tp,
            tp_size=table.engine.tp_size or 1,
        )
        return comparison, expected

    def _beside(self, checkpoint: Path) -> None:
        """Beside a checkpoint that it is not."""
        (table,) = [
            reader.read(10.0)
            for reader in self.readers()
            if reader.directory.snapshot().pid == os.getpid()
        ]
        comparison, _ = self._compare(table, checkpoint)
        self.seen["told"] = len(comparison.differing)

    def _bytes(self) -> int:
        """Of the unique storages of parameters and buffers, by torch, a draft's own alone."""
        shared = _storages(self.target) if self.variant.role == "draft" else {}
        return sum(nbytes for at, nbytes in _storages(self.model).items() if at not in shared)

    def _write(self) -> None:
        """After each step: one of SGLang's may end the process."""
        confirmed = {kind: sorted(found - self.unequal[kind]) for kind, found in self.equal.items()}
        unconfirmed = {kind: sorted(found) for kind, found in self.unequal.items()}
        content = {**self.seen, "confirmed": confirmed, "unconfirmed": unconfirmed}
        self.result.write_text(json.dumps(content))


def _storages(model: Any) -> dict[int, int]:
    tensors = (*model.parameters(), *model.buffers())
    return {each.data_ptr(): each.nbytes() for each in (t.untyped_storage() for t in tensors)}


def make_schedulers(path: Path, device: str, size: int, more: str = "") -> Callable[[int], Any]:
    """What makes each rank's scheduler, in a process of its own."""
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.server_args import PortArgs, prepare_server_args

    if size > 1:
        cores = os.cpu_count() or 1
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(rank % cores) for rank in range(size)
        )
    flags = f"{FLAGS[device]}{COMMON} {more}"
    if device == "cpu" and "--enable-lora" in more:
        flags += " --lora-backend torch_native"
        _pin_nothing()
    if device == "cpu" and "--speculative" in more:
        draft_plugin.define()
    flags += f" --tp-size {size}" + TP_FLAGS if size > 1 else ""
    server_args = prepare_server_args(["--model-path", str(path), *flags.split()])
    port_args = PortArgs.init_new(server_args)

    def make(rank: int) -> Any:
        ranks = runtime_context.SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
        configure_scheduler_process(server_args, rank)
        return Scheduler(server_args, port_args)

    return make


def _pin_nothing() -> None:
    """SGLang's LoRA pins memory of the host, which takes a GPU's driver, whatever it runs on."""
    import torch

    def without(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, pin_memory=False, **more: make(*arguments, **more)

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, without(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self


def in_child(act: Callable[[], None], result: Path) -> int:
    """Its process; what it raises is in the file."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        signal.alarm(LIMIT)  # Ends a hang.
        act()
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        result.write_text(json.dumps({"error": said}))
    os._exit(0)  # SGLang's threads would keep the process.


def run_rank(
    make: Callable[[int], Any], rank: int, variant: Variant, checkpoints: Checkpoints, result: Path
) -> None:
    ModelInARank(make(rank), checkpoints, result, variant).run()


def write_all(model: Model, variant: Variant, checkpoints: Checkpoints) -> None:
    for seed, (served, own) in enumerate(zip(checkpoints.served, checkpoints.own, strict=True)):
        if not (own / "config.json").exists():
            write(model, served, seed)
            zoo_variants.change(variant, served, own)
        zoo_manifests.write(own)


def load(name: str, device: str, directory: Path) -> None:
    """All checkpoints, and the ranks that load them."""
    loaded, _, size = name.partition(":")
    model, _, kind = loaded.partition("+")
    variant = zoo_variants.variant_of(kind)
    models, results = directory / "models" / loaded, directory / "results"
    served = models / "a", models / "b"
    own = (models / "draft-a", models / "draft-b") if variant.draft else served
    checkpoints = Checkpoints(served, own)
    # Threads of OpenMP, which the next child would wait for in vain, are left in this one.
    making = functools.partial(write_all, MODELS[model], variant, checkpoints)
    os.waitpid(in_child(making, results / f"{loaded}.json"), 0)
    if not (own[1] / "config.json").exists():
        return  # Why is in the results.
    flags = variant.flags.format(own=own[0])
    making_ranks = functools.partial(make_schedulers, served[0], device, int(size or 1))
    if device == "cpu":
        make = making_ranks(flags)
    else:
        flags += f" --nccl-port {_free_port()}"

        def make(rank: int) -> Any:
            return making_ranks(flags)(rank)

    pids = []
    for rank in range(int(size or 1)):
        result = results / (f"{loaded}-{rank}.json" if size else f"{name}.json")
        act = functools.partial(run_rank, make, rank, variant, checkpoints, result)
        pids.append(in_child(act, result))
    for pid in pids:
        os.waitpid(pid, 0)


def _free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port


def main() -> None:
    directory, device, *names = sys.argv[1:]
    results = Path(directory) / "results"
    results.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        import sglang.srt.managers.scheduler  # noqa: F401
        import transformers  # noqa: F401
    for name in names:
        # A child makes the checkpoints and reads the settings, which a process can do once.
        result = results / f"{name.replace(':', '-0-of-')}.json"
        os.waitpid(in_child(functools.partial(load, name, device, Path(directory)), result), 0)


if __name__ == "__main__":
    main()
