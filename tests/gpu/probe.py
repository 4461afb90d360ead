# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A plugin of SGLang that says from inside a rank what its memory really holds.

It knows torch and SGLang's model runners and nothing of the package under test, except where it
times that package's own functions. Each rank answers on a Unix socket `PID.socket` in the
directory `GPU_PROBE_DIRECTORY`: a request is a method's name and its arguments.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import multiprocessing
import os
import statistics
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"

#: What was seen around each call: (method, is a draft, allocated before, allocated after).
CALLS: list[tuple[str, bool, int, int]] = []

#: What the process had of its GPU at the end of each call: (method, reserved, NVML).
MOMENTS: list[tuple[str, int, int | None]] = []

#: What a loader leaks with every update, and what it has leaked.
LEAK: dict[str, Any] = {"bytes": 0, "tensors": []}


#: Cycles that a GPU waits before it reads weights.
DELAY: dict[str, int] = {"read": 0}

#: What `Probe.fill` has taken.
FILLED: list[Any] = []

#: The model runners of this process. (Captures of CUDA graphs freeze Python's garbage, and what is
#: frozen is in no list of objects.)
RUNNERS: weakref.WeakSet[Any] = weakref.WeakSet()


def use_own_device() -> int:
    """The rank's GPU, also in a thread, which begins with the first one."""
    import torch

    index = int(next(iter(RUNNERS)).gpu_id)
    torch.cuda.set_device(index)
    return index


def nvml_processes() -> dict[int, int]:
    """Process id → bytes of the rank's GPU, as NVML counts."""
    import pynvml
    import torch

    uuid = torch.cuda.get_device_properties(use_own_device()).uuid
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return {
        each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    }


def leaking(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An update whose loader forgets to let go of something."""
    import torch

    result = original(*args, **kwargs)
    if LEAK["bytes"]:
        LEAK["tensors"].append(torch.empty(LEAK["bytes"], dtype=torch.uint8, device="cuda"))
    return result


def around(method: str) -> Callable[..., Any]:
    """Notes what torch's allocator has handed out before and after a runner's method."""

    def call(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        RUNNERS.add(runner)
        allocated = torch.cuda.memory_allocated if torch.cuda.is_available() else lambda: 0
        before = allocated()
        result = original(runner, *args, **kwargs)
        gc.collect()
        CALLS.append((method, bool(runner.is_draft_worker), before, allocated()))
        if torch.cuda.is_available():
            mine = nvml_processes().get(os.getpid())
            MOMENTS.append((method, torch.cuda.memory_reserved(), mine))
        return result

    return call


class _Bytes:
    """Memory at an address, for torch to read where it lies."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


class Probe:
    """What a rank answers."""

    def calls(self) -> list[tuple[str, bool, int, int]]:
        return CALLS

    def moments(self) -> list[tuple[str, int, int | None]]:
        return MOMENTS

    def leak(self, size: int) -> None:
        LEAK["bytes"] = size

    def delay(self, read: int = 0) -> None:
        """Let the GPU wait for so many cycles."""
        import torch

        from sglang_weight_exporter.fingerprint.tensors import Fingerprinter

        if "begin" not in vars(self):
            self.begin = begin = Fingerprinter.begin

            def slow(*args: Any, **kwargs: Any) -> Any:
                torch.cuda._sleep(DELAY["read"])
                return begin(*args, **kwargs)

            Fingerprinter.begin = slow  # type: ignore[method-assign]
        DELAY.update(read=read)

    def memory(self) -> dict[str, Any]:
        """What torch and NVML say of this process's memory, and which pool graphs are in."""
        import torch
        from sglang.srt.model_executor.runner import get_global_graph_memory_pool

        use_own_device()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        segments = [
            {
                name: segment[name]
                for name in ("device", "address", "total_size", "segment_pool_id", "is_expandable")
            }
            | {
                "blocks": [
                    {name: block[name] for name in ("size", "requested_size", "state")}
                    for block in segment["blocks"]
                ]
            }
            for segment in torch.cuda.memory_snapshot()
        ]
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "allocated_peak": stats["allocated_bytes.all.peak"],
            "reserved_peak": stats["reserved_bytes.all.peak"],
            "segments": segments,
            "processes": nvml_processes(),
            "graph_pool": get_global_graph_memory_pool(),
        }

    def tables(self) -> int:
        """Bytes that were asked for for the tables of requests and of free slots."""
        import torch

        runner = self._runner(draft=False)
        requested = {}
        for segment in self.memory()["segments"]:
            address = segment["address"]
            for block in segment["blocks"]:
                requested[address] = block["requested_size"]
                address += block["size"]
        pool = runner.token_to_kv_pool
        kv = {each.untyped_storage().data_ptr() for each in (*pool.k_buffer, *pool.v_buffer)}
        found = set()
        for owner in (
            runner.req_to_token_pool,
            runner.token_to_kv_pool,
            runner.token_to_kv_pool_allocator,
        ):
            for value in vars(owner).values():
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    found.add(value.untyped_storage().data_ptr())
        return sum(requested[address] for address in found - kv if address)

    def fill(self, leave: int, blocks: int = 0) -> tuple[int, int]:
        """Take the GPU's free memory but for so much, after so many small blocks; address and bytes
        of the tensor that takes it."""
        import torch

        FILLED.extend(torch.empty(1024, dtype=torch.uint8, device="cuda") for _ in range(blocks))
        torch.cuda.empty_cache()
        size = torch.cuda.mem_get_info()[0] - leave
        FILLED.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        return FILLED[-1].data_ptr(), size

    def drain(self) -> None:
        import torch

        FILLED.clear()
        torch.cuda.empty_cache()

    def fail(self, size: int, times: int = 1) -> dict[str, Any]:
        """Ask torch for more than there is, and catch what it raises."""
        import torch

        def allocations() -> int:
            return int(torch.cuda.memory_stats()["allocation.all.allocated"])

        before, seconds, messages = allocations(), [], []
        for _ in range(times):
            began = time.perf_counter()
            try:
                torch.empty(size, dtype=torch.uint8, device="cuda")
            except torch.cuda.OutOfMemoryError as error:
                messages.append(str(error))
            seconds.append(time.perf_counter() - began)
        return {
            "messages": messages,
            "seconds": seconds,
            "allocations": allocations() - before,
            "num_ooms": torch.cuda.memory_stats()["num_ooms"],
            "free": torch.cuda.mem_get_info()[0],
            "total": torch.cuda.mem_get_info()[1],
        }

    def segments(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Address, bytes and blocks in use (address, bytes) of the allocator's segments."""
        import torch

        segments = []
        for segment in torch.cuda.memory_snapshot():
            address, blocks = segment["address"], []
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    blocks.append((address, block["size"]))
                address += block["size"]
            segments.append((segment["address"], segment["total_size"], blocks))
        return segments

    def tensors(self, draft: bool) -> dict[str, tuple[int, int, bool]]:
        """Address, bytes and contiguity of every parameter and buffer, tied names included."""
        return {
            name: (tensor.data_ptr(), tensor.nbytes, tensor.is_contiguous())
            for name, tensor in self._tensors(draft).items()
        }

    def differing(self, rows: dict[str, tuple[int, int]], draft: bool) -> list[str]:
        """Names of tensors whose bytes are not those at the address and size of their row."""
        import torch

        return [
            name
            for name, tensor in self._tensors(draft).items()
            if name not in rows
            or not torch.equal(
                torch.as_tensor(_Bytes(*rows[name]), device=tensor.device),
                tensor.detach().contiguous().flatten().view(torch.uint8),
            )
        ]

    def sha256(self, rows: dict[str, tuple[int, int]]) -> dict[str, str]:
        """Hashes of the bytes at addresses, by the rows' names."""
        import torch

        return {
            name: hashlib.sha256(
                torch.as_tensor(_Bytes(address, size), device="cuda").cpu().numpy().tobytes()
            ).hexdigest()
            for name, (address, size) in rows.items()
        }

    def kv_blocks(self) -> tuple[int, int]:
        """Bytes of the blocks behind keys and values, and of those behind the tables of requests
        and free slots."""
        import torch

        runner = self._runner(draft=False)
        blocks = dict(block for _, _, blocks in self.segments() for block in blocks)
        pool = runner.token_to_kv_pool
        owners = (runner.req_to_token_pool, pool, runner.token_to_kv_pool_allocator)
        tables = {
            value.untyped_storage().data_ptr()
            for owner in owners
            for value in vars(owner).values()
            if isinstance(value, torch.Tensor) and value.is_cuda
        }
        # From 0.5.23 on keys and values of a layer are halves of one tensor.
        kv = {each.untyped_storage().data_ptr() for each in (*pool.k_buffer, *pool.v_buffer)}
        return (
            sum(blocks[address] for address in kv),
            sum(blocks[address] for address in tables - kv if address),
        )

    def adapters(self) -> dict[str, tuple[int, int | None]]:
        """Name → bytes in the host's memory and slot of each LoRA adapter that is loaded."""
        manager = self._runner(draft=False).lora_manager
        slots = manager.memory_pool.uid_to_buffer_id
        found = {}
        for identifier, reference in manager.lora_refs.items():
            layers = manager.loras[identifier].layers
            storages = {
                storage.data_ptr(): storage.nbytes()
                for layer in layers
                for storage in (each.untyped_storage() for each in layer.weights.values())
            }
            found[reference.lora_name] = sum(storages.values()), slots.get(identifier)
        return found

    def uuid(self) -> str:
        import torch

        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)

    def costs(self) -> dict[str, float]:
        """Median milliseconds of the package's own functions, and of how much."""
        from sglang_weight_exporter.capture.account import account
        from sglang_weight_exporter.capture.allocations import Segments
        from sglang_weight_exporter.capture.references import Registrations
        from sglang_weight_exporter.capture.tensors import named_tensors
        from sglang_weight_exporter.capture.weights import capture_weights
        from sglang_weight_exporter.runners.memory import of_weights

        model = self._runner(draft=False).model
        capture = functools.partial(
            capture_weights, model, role="x", captured_at=0.0, registrations=Registrations()
        )
        first = capture(segments=Segments.of_cuda)

        def milliseconds(call: Callable[[], object]) -> float:
            seconds = []
            for _ in range(20):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            return 1000 * statistics.median(seconds)

        segments = self.segments()
        return {
            "tensors": len(first.table.names.split()),
            "number of segments": len(segments),
            "blocks": sum(len(blocks) for _, _, blocks in segments),
            "names and tensors": milliseconds(lambda: named_tensors(model)),
            "segments": milliseconds(Segments.of_cuda),
            "account": milliseconds(
                lambda: account(Segments.of_cuda(), of_weights(first.ranges), device=0)
            ),
            "capture, changed": milliseconds(lambda: capture(segments=Segments.of_cuda)),
            "capture, unchanged": milliseconds(lambda: capture(previous=first)),
        }

    def _tensors(self, draft: bool) -> dict[str, Any]:
        model = self._runner(draft).model
        return {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }

    def _runner(self, draft: bool) -> Any:
        (runner,) = (found for found in RUNNERS if bool(found.is_draft_worker) == draft)
        return runner


def answer(listener: Listener) -> None:
    probe = Probe()
    while True:
        with listener.accept() as connection:
            name, arguments = connection.recv()
            try:
                connection.send(getattr(probe, name)(**arguments))
            except Exception as error:
                connection.send(error)


def plugin() -> None:
    """Entry point `sglang.srt.plugins`; does nothing in SGLang's main process."""
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for method in ("load_model", "init_lora_manager", "alloc_memory_pool"):
        HookRegistry.register(f"{RUNNER}.{method}", around(method), HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.update_weights_from_disk", leaking, HookType.AROUND)
    path = Path(os.environ["GPU_PROBE_DIRECTORY"]) / f"{os.getpid()}.socket"
    listener = Listener(str(path), family="AF_UNIX")
    threading.Thread(target=answer, args=(listener,), daemon=True).start()
