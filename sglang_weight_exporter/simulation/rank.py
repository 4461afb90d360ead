# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A rank that does not exist: what it would hold is made up, its ledger and files are real."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache

from sglang_weight_exporter.export.nvml import GpuMemory
from sglang_weight_exporter.ledger import Ledger
from sglang_weight_exporter.records.engine import Device, Engine, HookState, Ranks
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.records.memory import (
    MEMORY_PARTS,
    DeviceMemory,
    MemoryBudget,
    MemoryPart,
)
from sglang_weight_exporter.records.pools import KvPoolUsage, LoraUsage
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.weights import Kind, TableRef, WeightUsage
from sglang_weight_exporter.store.namespaces import pid_namespace
from sglang_weight_exporter.store.rank import RankStore, table_file
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.weight_table import (
    Row,
    WeightTable,
    compare_tables,
    table_of_rows,
    table_rows,
)

logger = logging.getLogger("sglang_weight_exporter")


MODEL = "simulated/llama-70b"

_DEVICE, _GPU = "cuda:0", "NVIDIA H100 80GB HBM3"
_GPU_BYTES = 85_520_809_984
#: What torch has beside weights, KV pool and slots, and what the process has beside torch.
_TORCH_BYTES: dict[MemoryPart, int] = {
    "kv_tables": 16_000_000,
    "cuda_graphs": 850_000_000,
    "other_tensors": 210_000_000,
    "rounding": 2_000_000,
    "fragments": 122_000_000,
    "cached": 300_000_000,
}
_OUTSIDE_BYTES, _DRIVER_BYTES = 1_000_000_000, 640_000_000
#: What an update needs beside what torch has.
_BUCKET_BYTES = 2 * 2**30
_NOTHING = DeviceMemory(
    device=_DEVICE, at=0.0, allocated=0, reserved=0, allocated_peak=0, reserved_peak=0
)
#: Keys and values of one head of 128, in a layer of bfloat16.
_KV_TOKENS, _KV_TOKEN_BYTES = 1_000_000, 2 * 128 * 2

#: Of four engines, in turn, one has a draft model of a single layer and one has slots for adapters.
_WITH_DRAFT, _WITH_LORA, _TURN = 2, 3, 4
_LORA_BYTES = 1_000_000_000

#: What ``status`` says of hooks; one of them this SGLang has no function for.
_HOOKS = (
    *(
        HookState(target=target, status="installed")
        for target in (
            "load_model",
            "kv_pool",
            "scheduler.release_memory_occupation",
            "scheduler.resume_memory_occupation",
            "update_weights_from_disk",
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
        )
    ),
    HookState(target="scheduler.abort_request", status="absent"),
)
#: What a capture of the weights, and a fingerprint of all of them, would take.
_LOOK_SECONDS, _FINGERPRINT_SECONDS = 0.003, 0.005

#: One of eight tensor parallel ranks of a Llama of 70 billion parameters: the share of every
#: simulated rank, however many its engine has.
_LAYER: dict[str, tuple[int, ...]] = {
    "self_attn.qkv_proj.weight": (1280, 8192),
    "self_attn.o_proj.weight": (8192, 1024),
    "mlp.gate_up_proj.weight": (7168, 8192),
    "mlp.down_proj.weight": (8192, 3584),
    "input_layernorm.weight": (8192,),
    "post_attention_layernorm.weight": (8192,),
}
_LAYERS = {"target": 80, "draft": 1}
_ENDS: dict[str, dict[str, tuple[int, ...]]] = {
    "target": {
        "model.embed_tokens.weight": (16032, 8192),
        "model.norm.weight": (8192,),
        "lm_head.weight": (16032, 8192),
    },
    "draft": {"model.fc.weight": (1024, 16384)},
}
#: SGLang makes it beside the memory saver, so it stays where memory is released.
_ROTARY: dict[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.rotary_emb.cos_sin_cache": (131072, 128)
}
_DTYPES: dict[Kind, str] = {"parameter": "bfloat16", "buffer": "float32"}
_ITEMSIZES = {"bfloat16": 2, "float32": 4}


@cache
def _table(role: str, place: int) -> WeightTable:
    """The pointer table; another place gives every tensor another address.

    The same for all ranks: addresses are of a process's own memory.
    """
    layers = range(_LAYERS[role])
    parameters = {
        **{f"model.layers.{n}.{name}": shape for n in layers for name, shape in _LAYER.items()},
        **_ENDS[role],
    }
    rows, address = [], 0x7F00_0000_0000 + place * 2**40 + (role == "draft") * 2**39
    held: dict[Kind, dict[str, tuple[int, ...]]] = {
        "parameter": parameters,
        # The draft has the target's, which counts there.
        "buffer": _ROTARY if role == "target" else {},
    }
    for kind, shapes in held.items():
        itemsize = _ITEMSIZES[_DTYPES[kind]]
        for name, shape in shapes.items():
            stride = (shape[1], 1) if len(shape) == 2 else (1,)
            nbytes = shape[0] * stride[0] * itemsize
            rows.append(
                Row(
                    name=name,
                    data_ptr=address,
                    nbytes=nbytes,
                    dtype=_DTYPES[kind],
                    shape=shape,
                    stride=stride,
                    device=_DEVICE,
                    kind=kind,
                    storage_ptr=address,
                    storage_nbytes=nbytes,
                )
            )
            address += -(-nbytes // 2**21) * 2**21  # The allocator's large blocks.
    return table_of_rows(rows, role=role, captured_at=0.0)


class SimulatedRank:
    """One rank, as its engine process would write it."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        engine: Engine,
        tp: int,
        number: int,
        gpu: int,
        clock: Callable[[], float],
    ) -> None:
        self.store = RankStore(runtime_dir, f"{gpu:016x}")
        self.ledger = Ledger(clock=clock, thread=lambda: 0, trace_id=self._trace_id)
        self.roles = ("target", "draft") if number % _TURN == _WITH_DRAFT else ("target",)
        for role in self.roles:
            self.ledger.add_role(role)
        #: Where its tensors are, and what they hold: the last version that came whole.
        self.place, self.content = 0, "0"
        self._engine, self._ranks, self._index, self._clock = engine, Ranks(tp=tp), gpu, clock
        self._lora = _LORA_BYTES if number % _TURN == _WITH_LORA else 0
        uuid = hashlib.sha256(f"{engine.instance}|{tp}".encode()).hexdigest()
        self._device = Device(
            name=_DEVICE,
            uuid=f"GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:32]}",
            product=_GPU,
            pci_bus_id=f"00000000:{gpu + 1:02X}:00.0",
        )
        self._started_at = clock()
        self._events = 0
        self._tables: dict[str, WeightTable] = {}
        self._reported: dict[str, str] = {}
        self._memory = _NOTHING
        self._problem = ""
        self._write()

    def gpu(self) -> GpuMemory:
        return GpuMemory(
            uuid=self._device.uuid,
            index=self._index,
            total_bytes=_GPU_BYTES,
            used_bytes=self._memory.physical + _OUTSIDE_BYTES,
            reserved_bytes=_DRIVER_BYTES,
            processes={os.getpid(): self._memory.physical + _OUTSIDE_BYTES},
        )

    def _account(self) -> DeviceMemory:
        """What torch has of the GPU; memory that is released stays reserved."""
        roles = [self._role(name) for name in self.roles]
        weights = sum(role.resident.get(_DEVICE, 0) for role in roles if role.resident)
        kv_pool = sum(role.kv_resident.get(_DEVICE, 0) for role in roles if role.kv_resident)
        held = sum(usage.nbytes for role in roles for usage in role.weights or ())
        held += sum(usage.nbytes for role in roles for usage in role.kv_pools or ())
        released = held - weights - kv_pool
        parts = dict.fromkeys(MEMORY_PARTS, 0) | _TORCH_BYTES
        parts |= {"weights": weights, "kv_pool": kv_pool, "lora": self._lora}
        reserved = sum(parts.values()) + released
        updated = any(role in self._tables for role in self.roles) or None
        return DeviceMemory(
            device=_DEVICE,
            at=self._clock(),
            allocated=reserved - parts["cached"] - parts["fragments"] - parts["rounding"],
            reserved=reserved,
            allocated_peak=reserved - parts["cached"],
            reserved_peak=reserved,
            released=released,
            parts=parts,
            before_update=updated and reserved,
            after_update=updated and reserved,
            update_peak=updated and _BUCKET_BYTES,
            after_release=self._memory.after_release if not released else reserved - released,
        )

    def publish(self) -> None:
        """Write what the ledger knows; what could not be written is written the next time."""
        try:
            self._write()
            self._problem = ""
        except OSError as error:
            if str(error) != self._problem:
                logger.warning("simulated: a rank could not be written (%s)", error)
            self._problem = str(error)

    def _write(self) -> None:
        """A snapshot, and an event for each load and update that has ended. Raises ``OSError``."""
        for ended in self.ledger.take_finished():
            role = ended.role
            before, table = self._tables.get(role), _table(role, self.place)
            self._tables[role] = table
            self.store.write_table(table)
            changes = compare_tables(before, table)
            update = self.ledger.complete(ended, model_path=MODEL, changes=changes)
            if update is None:
                continue
            self._events += 1
            self.store.append_event(
                Event(
                    number=self._events,
                    rank_id=self.store.rank_id,
                    pid=os.getpid(),
                    engine=self._engine,
                    ranks=self._ranks,
                    role=role,
                    device=self._device,
                    update=update,
                    weights=weights_of(role),
                    table=self._table_ref(role),
                    previous_sha256=self._reported.get(role, ""),
                ),
                table,
            )
            self._reported[role] = table.sha256
        self._memory = self._account()
        self.store.write_snapshot(
            Snapshot(
                rank_id=self.store.rank_id,
                pid=os.getpid(),
                pid_namespace=pid_namespace(),
                started_at=self._started_at,
                engine=self._engine,
                ranks=self._ranks,
                devices=(self._device,),
                roles=tuple(self.ledger.describe(role, self._role(role)) for role in self.roles),
                weight_version=self.ledger.weight_version,
                cache=self.ledger.prefix_cache.counts,
                hooks=_HOOKS,
                memory=(self._memory,),
                budget=MemoryBudget(fraction=0.85, before_load=_GPU_BYTES - _DRIVER_BYTES),
                snapshot_seconds=_LOOK_SECONDS,
                events_dropped=self.store.events_dropped,
            )
        )

    def _role(self, name: str) -> Role:
        """What it holds: nothing before the load, and next to nothing while released."""
        if name not in self._tables:
            return Role(name=name, device=_DEVICE)
        weights = weights_of(name)
        pool = KvPoolUsage(
            device=_DEVICE,
            pool="full",
            nbytes=_KV_TOKENS * _KV_TOKEN_BYTES * _LAYERS[name],
            tokens=_KV_TOKENS,
        )
        released = self.ledger.counters.released
        stay = ("buffer",) if "weights" in released else ("parameter", "buffer")
        resident = sum(usage.nbytes for usage in weights if usage.kind in stay)
        kv_resident = 0 if "kv_cache" in released else pool.nbytes
        return Role(
            name=name,
            device=_DEVICE,
            architecture="LlamaForCausalLM" if name == "target" else "LlamaForCausalLMEagle",
            weights=weights,
            resident={_DEVICE: resident},
            table=self._table_ref(name),
            kv_pools=(pool,),
            kv_resident={_DEVICE: kv_resident},
            lora=(LoraUsage(device=_DEVICE, nbytes=self._lora, adapters=2),) if self._lora else (),
            fingerprints=self.ledger.counters.fingerprints(name),
        )

    def _table_ref(self, role: str) -> TableRef:
        table, released = self._tables[role], "weights" in self.ledger.counters.released
        content = f"{role}|{self._ranks.tp}|{self.content}"
        return TableRef(
            file=table_file(table),
            sha256=table.sha256,
            rows=table.rows,
            regions={_DEVICE: table.rows},
            captured_at=self._clock(),
            fingerprint="" if released else hashlib.sha256(content.encode()).hexdigest()[:32],
            fingerprint_seconds=None if released else _FINGERPRINT_SECONDS,
            modified=0,
        )

    def _trace_id(self, number: int) -> str:
        """The same on every rank of an engine, as with real ones."""
        return hashlib.sha256(f"{self._engine.instance}|{number}".encode()).hexdigest()[:32]


@cache
def weights_of(role: str) -> tuple[WeightUsage, ...]:
    rows = list(table_rows(_table(role, 0)))
    return tuple(
        WeightUsage(device=_DEVICE, kind=kind, dtype=dtype, nbytes=sum(sizes), tensors=len(sizes))
        for kind, dtype in _DTYPES.items()
        if (sizes := [row.nbytes for row in rows if row.kind == kind])
    )
