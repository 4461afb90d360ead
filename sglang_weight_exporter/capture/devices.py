# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which piece of hardware a torch device is."""

from __future__ import annotations

from typing import Any

import torch

from sglang_weight_exporter.records.engine import Device


def describe(name: str) -> Device:
    """The device behind torch's name for it in this process (``cuda:0``, ``cpu``).

    The UUID is what joins with dcgm-exporter and holds when each process sees one device only.
    torch leaves out NVML's prefix (``GPU-``); under MIG it reports the instance's UUID.
    """
    device = torch.device(name)
    if device.type != "cuda" or torch.version.hip is not None:
        return Device(name=name)
    properties: Any = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    if uuid and not uuid.startswith(("GPU-", "MIG-")):
        uuid = f"{'MIG' if ' MIG ' in properties.name else 'GPU'}-{uuid}"
    bus = ""
    if hasattr(properties, "pci_bus_id"):  # torch 2.5 and later; as NVML writes it.
        bus = (
            f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}"
            f":{properties.pci_device_id:02X}.0"
        )
    return Device(
        name=name,
        uuid=uuid,
        product=properties.name,
        pci_bus_id=bus,
        integrated=bool(getattr(properties, "is_integrated", False)),
    )
