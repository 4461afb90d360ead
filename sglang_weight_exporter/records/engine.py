# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Facts about an engine, its ranks, their devices and hooks."""

from __future__ import annotations

from typing import Literal

from sglang_weight_exporter.records.base import Count, Record

#: ``installed``: the hook sits on its target. ``pending``: SGLang has not imported the module
#: yet. ``absent``: this SGLang release has no such target. ``failed``: it is there, and wrapping
#: it failed.
HookStatus = Literal["installed", "pending", "absent", "failed"]


class Device(Record, frozen=True, kw_only=True):
    """One device that holds weights or KV pool of a rank."""

    #: torch's name in this process: ``cuda:0``, ``cpu``.
    name: str
    #: With NVML's prefix, ``GPU-…`` or ``MIG-…``; empty where the device is no GPU.
    uuid: str = ""
    product: str = ""
    pci_bus_id: str = ""
    #: What SGLang packs weights for on a CPU (``AMX``); empty where it leaves them as they are.
    packing: str = ""
    #: Its memory is the host's (GB10).
    integrated: bool = False


class HookState(Record, frozen=True, kw_only=True):
    """One line of ``status``: a hook target and whether it is hooked."""

    target: str
    status: HookStatus
    reason: str = ""


class Engine(Record, frozen=True, kw_only=True):
    """Facts about the engine that hold while the process lives."""

    #: The label: the HTTP port in SGLang's settings, with ``-2`` and so on for a further engine
    #: of this host that has the same.
    name: str
    #: Tells two engines apart that had the same name one after the other.
    instance: str
    model_name: str = ""
    model_path: str = ""
    sglang_version: str = ""
    torch_version: str = ""
    #: Into how many parts the model is cut, as SGLang's settings say; ``None``: they do not.
    tp_size: Count | None = None
    pp_size: Count | None = None
    ep_size: Count | None = None
    #: Of its settings those that decide how weights are read, converted and packed, as they were
    #: given; without those that were not.
    load_settings: dict[str, str] = {}
    #: Where it serves HTTP, as its settings say; empty where it does not.
    url: str = ""
    #: The same for all ranks of the engine, on however many hosts; empty until they have agreed.
    group: str = ""
    #: Where ranks of several hosts meet, as settings have it from the beginning; empty where there
    #: is one host. Other engines meet there too, one after the other.
    meets_at: str = ""
    #: Which of the engine's hosts this is, and of how many; ``None``: the settings do not say.
    node_rank: Count | None = None
    nodes: Count | None = None
    #: How many ranks it has on all hosts: data-parallel replicas times tensor-parallel times
    #: pipeline-parallel ranks of SGLang's settings, as SGLang's own ``compute_world_size`` has it
    #: (0.5.23). Attention that is data-parallel is inside the tensor-parallel group and adds none.
    #: ``None``: the settings do not say.
    expected_ranks: Count | None = None

    @property
    def identity(self) -> str:
        """The same for all ranks of the engine that are known to be its."""
        return self.group or self.instance

    def is_part_of(self, other: Engine) -> bool:
        """Whether both are of one engine, also before its hosts have agreed on a group."""
        if self.group and other.group:
            return self.group == other.group
        meets = self.meets_at != "" and self.meets_at == other.meets_at
        another_host = self.nodes == other.nodes and self.node_rank != other.node_rank
        return self.instance == other.instance or (meets and another_host)


class Ranks(Record, frozen=True, kw_only=True):
    """Parallel ranks as SGLang's own metrics have them; ``None`` where SGLang has no such rank."""

    tp: Count = 0
    pp: Count = 0
    dp: Count | None = None
    moe_ep: Count | None = None

    @property
    def labels(self) -> dict[str, int | None]:
        """Under the names that SGLang's own metrics have: ``tp_rank`` and so on."""
        return {f"{name}_rank": getattr(self, name) for name in self.__struct_fields__}

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts the ranks of one engine."""
        return -1 if self.dp is None else self.dp, self.pp, self.tp

    def __str__(self) -> str:
        """For people: ``tp 0 pp 1 dp 2``."""
        text = f"tp {self.tp} pp {self.pp}"
        if self.dp is not None:
            text += f" dp {self.dp}"
        return f"{text} ep {self.moe_ep}" if self.moe_ep else text
