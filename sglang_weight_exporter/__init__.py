# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights and KV pool of every SGLang rank, as Prometheus metrics and OpenTelemetry spans.

Importing this package costs next to nothing and imports nothing: Python's start-up does it in
every interpreter of an environment where the package is installed. What it offers to other
programs is imported on first use:

* inside the engine, :func:`record_update` and :func:`updating` announce changes of weights that
  SGLang does not make itself;
* anywhere on the host, :func:`open_tables` reads the pointer tables;
* in a trainer, :func:`sum_tensors` and :func:`write_manifest` say what was sent.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own costs its import; type checkers know the name.
if TYPE_CHECKING:
    from sglang_weight_exporter.fingerprint.tensors import FingerprintError
    from sglang_weight_exporter.hooks.manual_updates import record_update, updating
    from sglang_weight_exporter.store.tables import (
        RankGoneError,
        Table,
        TableError,
        TableReader,
        UpdateInProgressError,
        open_tables,
    )
    from sglang_weight_exporter.trainer import (
        Sharded,
        fingerprint_tensors,
        megatron_tensors,
        sum_tensors,
        write_manifest,
    )
    from sglang_weight_exporter.verification.manifest import (
        Manifest,
        ManifestError,
        read_manifest,
    )
    from sglang_weight_exporter.verification.megatron import Cut
    from sglang_weight_exporter.weight_table import Region, Row

__all__ = [
    "Cut",
    "FingerprintError",
    "Manifest",
    "ManifestError",
    "RankGoneError",
    "Region",
    "Row",
    "Sharded",
    "Table",
    "TableError",
    "TableReader",
    "UpdateInProgressError",
    "fingerprint_tensors",
    "megatron_tensors",
    "open_tables",
    "read_manifest",
    "record_update",
    "sum_tensors",
    "updating",
    "write_manifest",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = {"record_update": "hooks.manual_updates", "updating": "hooks.manual_updates"}
    home |= {"Region": "weight_table", "Row": "weight_table", "Cut": "verification.megatron"}
    home |= dict.fromkeys(("Manifest", "ManifestError", "read_manifest"), "verification.manifest")
    of_trainer = ("Sharded", "fingerprint_tensors", "megatron_tensors", "sum_tensors")
    home |= dict.fromkeys((*of_trainer, "write_manifest"), "trainer") | {
        "FingerprintError": "fingerprint.tensors"
    }
    module = import_module(f"{__name__}.{home.get(name, 'store.tables')}")
    return getattr(module, name)
