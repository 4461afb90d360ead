# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of ranks beside a checkpoint, beside manifests, and beside one another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from sglang_weight_exporter.cli.terminal import first_of
from sglang_weight_exporter.export.manifests import compare_with_sent, of_engine
from sglang_weight_exporter.export.references import (
    bytes_by_name,
    compare_with_reference,
    device_kind,
    own_key,
)
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.verification.checkpoint import Checkpoint
from sglang_weight_exporter.verification.checkpoint_layout import (
    FUSED,
    Expected,
    ServedTensor,
    expected_fingerprints,
)
from sglang_weight_exporter.verification.comparison import Comparison, compare, compare_replicas
from sglang_weight_exporter.verification.confirmed_loaders import confirmed
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestError,
    ReferenceKey,
    Shard,
    read_manifest,
    read_parts,
    whole_of,
)
from sglang_weight_exporter.verification.sent import SentTensor
from sglang_weight_exporter.verification.sent_comparison import SentComparison
from sglang_weight_exporter.weight_table import table_fingerprints


@dataclass
class Comparisons:
    """What came of all of them."""

    #: Which rank, and how it compares.
    results: list[tuple[str, Comparison]] = field(default_factory=list)
    #: What was to be compared and is held by no rank here, and of what was sent the name that it
    #: was probably meant to have, and what ranks hold and nobody sent.
    unheld: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    unsent: tuple[str, ...] = ()


def title(table: Table) -> str:
    since = "its load" if table.update <= 1 else f"update {table.update}"
    return f"engine {table.engine.name}  {table.ranks}  {table.role.name}  since {since}"


def _with_aliases(table: Table, result: Comparison) -> Comparison:
    """What is equal under one name is so under each: tied weights, and those of layers that SGLang
    wraps for adapters (``BaseLayerWithLoRA``), have several."""
    held = table_fingerprints(table.columns)
    places = {
        row.name: (row.data_ptr, row.nbytes, held[row.name])
        for row in table.rows()
        if row.name in held
    }
    proved = {places[name] for name in result.equal}
    equal = {*result.equal, *(name for name in result.unverifiable if places[name] in proved)}
    return replace(
        result,
        equal=tuple(name for name in held if name in equal),
        unverifiable={name: why for name, why in result.unverifiable.items() if name not in equal},
    )


# A checkpoint.


def against_checkpoint(tables: Sequence[Table], path: Path, tp_size: int | None) -> Comparisons:
    found = Comparisons()
    used: set[str] = set()
    names: dict[str, None] = {}
    absent: tuple[str, ...] = ()
    whole: Checkpoint | None = None
    for table in tables:
        checkpoint = whole or Checkpoint(path, table.ranks.tp)
        whole = None if checkpoint.sharded else checkpoint
        size = 1 if checkpoint.sharded else tp_size or _tp_size(table, tables)
        served = [
            ServedTensor(row.name, row.dtype, row.shape_in_memory, row.kind) for row in table.rows()
        ]
        expected = expected_fingerprints(
            served, checkpoint, tp_rank=table.ranks.tp % size, tp_size=size
        )
        result = compare(
            table_fingerprints(table.columns),
            expected.fingerprints,
            bytes_by_name(table),
            unverifiable=expected.unverifiable,
            doubted=_doubts(table, checkpoint, expected),
        )
        found.results.append((title(table), _with_aliases(table, result)))
        used |= expected.used
        names |= dict.fromkeys(checkpoint.tensors)
        absent = checkpoint.absent
    found.unheld = tuple(name for name in names if name not in used)
    if absent:
        print(f"The index names {first_of(absent)}, which no file has.", file=sys.stderr)
    return found


def _tp_size(table: Table, tables: Sequence[Table]) -> int:
    """As the engine's settings have it: some of its ranks may be on other hosts."""
    return table.engine.tp_size or 1 + max(
        other.ranks.tp for other in tables if other.engine.identity == table.engine.identity
    )


def _doubts(table: Table, checkpoint: Checkpoint, expected: Expected) -> dict[str, str]:
    """Names whose other bytes are no difference, and why."""
    role, release = table.role, table.engine.sglang_version
    config = checkpoint.config()
    loader = confirmed(release, device_kind(table), role.architecture, role.quantization)
    said = ", ".join(map(str, config.get("architectures") or ()))
    of_another = role.name == "target" and said not in {"", role.architecture}
    if loader is None or of_another or (checkpoint.is_quantized() and not role.quantization):
        kind = f"{role.quantization} {role.architecture}".strip()
        why = (
            "its bytes are others, and what the loader of "
            f"{kind or 'this model'} makes of this file is confirmed by nothing"
        )
        return dict.fromkeys(expected.fingerprints, why)
    doubts = {}
    for name in expected.fingerprints:
        if not loader.covers(name, whole=name in expected.whole):
            doubts[name] = "its bytes are others, and the loader may make others of the file's"
        elif name == "lm_head.weight" and config.get("tie_word_embeddings"):
            doubts[name] = "its bytes are others than those of the embeddings that it is tied to"
    for name, files in checkpoint.copies.items():
        places = f"{', in '.join(files[:-1])} and in {files[-1]}"
        doubts[name] = f"it is in {places}, and which one is loaded is not known"
    return doubts


# Manifests.


def read_manifests(paths: Iterable[Path]) -> list[Manifest]:
    """Of files, and of all files of directories. Raises ManifestError and OSError."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ManifestError("There is no manifest in what --manifest names.")
    return [_read(path) for path in dict.fromkeys(map(whole_of, files))]


def _read(path: Path) -> Manifest:
    """In one file, or in the parts that a trainer's processes wrote."""
    manifest = read_manifest(path) if path.exists() else read_parts(path)
    if manifest is None:
        raise ManifestError(f"{path} is not there, and not all of its parts are.")
    return manifest


def against_manifests(tables: Sequence[Table], manifests: Sequence[Manifest]) -> Comparisons:
    """A manifest of a running rank with the ranks at its place, another one with all."""
    found = Comparisons()
    held: set[str] = set()
    named: dict[str, None] = {}
    results: list[tuple[Table, SentComparison]] = []
    for table in tables:
        chosen = _chosen(table, manifests)
        if not chosen:
            shard = Shard.of(table.engine, table.ranks, table.role.name)
            print(
                f"{title(table)}: no manifest is of this part of the model ({_place(shard)}), or "
                f"of its version ({table.weight_version or 'none'}).",
                file=sys.stderr,
            )
        for manifest in chosen:
            if manifest.sent is not UNSET:
                results.append((table, _against_sent(table, manifest.sent)))
                found.results.append((title(table), results[-1][1].comparison))
                held |= results[-1][1].held
            else:
                result = _with_aliases(table, _against_manifest(table, manifest))
                if _moves_experts(table, manifest):
                    result = _without_experts(result)
                found.results.append((title(table), result))
                held |= table_fingerprints(table.columns).keys()
            named |= dict.fromkeys(manifest.names)
    if not found.results:
        places = (_place(each.shard) for each in manifests if each.shard is not None)
        raise ManifestError(
            "No rank here holds what a manifest is of, which is: " + "; ".join(places) + "."
        )
    found.unheld = tuple(name for name in named if name not in held)
    found.unsent = tuple(dict.fromkeys(name for _, one in results for name in one.unsent))
    engines: dict[str, list[tuple[Table, SentComparison]]] = {}
    for table, each in results:
        engines.setdefault(table.engine.instance, []).append((table, each))
    found.renamed = {
        name: meant
        for of_one in engines.values()
        for name, meant in of_engine(of_one).renamed.items()
    }
    return found


def _against_sent(table: Table, sent: Mapping[str, SentTensor]) -> SentComparison:
    result = compare_with_sent(table, sent)
    if result is None:
        raise ManifestError(
            f"{title(table)}: this rank has taken no sums to compare with what was sent. Start "
            "SGLang with SGLANG_WEIGHT_EXPORTER_FINGERPRINT=on and "
            "SGLANG_WEIGHT_EXPORTER_MANIFEST_DIR; they are absent too where taking them failed, "
            "which SGLang's log says."
        )
    return result


def _chosen(table: Table, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Those of its place. Of references, which are of many checkpoints, the one of its own; another
    one where it is the only one."""
    shard = Shard.of(table.engine, table.ranks, table.role.name)
    chosen = [each for each in manifests if not each.reference and each.shard in {None, shard}]
    references = [each for each in manifests if each.reference and _same_place(each, shard)]
    keys: dict[bool, ReferenceKey | None] = {}
    own = []
    for each in references:
        assert each.reference is not None
        all_bytes = each.reference.key.is_of_all_bytes
        if all_bytes not in keys:  # It reads files.
            keys[all_bytes] = own_key(table, os.environ, all_bytes=all_bytes)
        if each.reference.key == keys[all_bytes]:
            own.append(each)
    return _of_its_version(table, chosen) + (own or (references if len(manifests) == 1 else []))


def _of_its_version(table: Table, manifests: list[Manifest]) -> list[Manifest]:
    """A trainer's directory has what was sent for many versions, of which a rank serves one."""
    versions = {each.weight_version for each in manifests if each.sent is not UNSET}
    if len(versions) < 2:
        return manifests
    return [
        each
        for each in manifests
        if each.sent is UNSET or each.weight_version == table.weight_version
    ]


def _same_place(manifest: Manifest, shard: Shard) -> bool:
    """Whatever the model is called."""
    if manifest.shard is None:
        return False
    return msgspec.structs.replace(manifest.shard, model_name=shard.model_name) == shard


def _place(shard: Shard) -> str:
    sizes = (shard.tp_size, shard.pp_size, shard.ep_size)
    tp, pp, ep = ("?" if size is None else size for size in sizes)
    return (
        f"{shard.role} of {shard.model_name}, tp {shard.tp_rank} of {tp}, pp {shard.pp_rank} of "
        f"{pp}, ep {shard.moe_ep_rank} of {ep}"
    )


def _against_manifest(table: Table, manifest: Manifest) -> Comparison:
    """Compares what has the same dtype and shape: a rank's share has another fingerprint."""
    if manifest.reference is not None:
        return compare_with_reference(table, manifest, os.environ)
    expected, unverifiable = {}, {}
    for row in table.rows():
        tensor = manifest.tensors.get(row.name)
        if tensor is None:
            unverifiable[row.name] = _not_there(row.name)
        elif (tensor.dtype, tensor.shape) != (row.dtype, row.shape_in_memory):
            unverifiable[row.name] = "it has another shape or dtype in the manifest: a rank's share"
        else:
            expected[row.name] = tensor.fingerprint
    return compare(
        table_fingerprints(table.columns),
        expected,
        bytes_by_name(table),
        unverifiable=unverifiable,
    )


def _not_there(name: str) -> str:
    if any(f".{fused}." in name for fused in FUSED):
        return "the manifest has it in parts: `manifest --fused` and fused=True write it whole"
    return "the manifest has no tensor of this name"


# One another.


def replicas(tables: Iterable[Table]) -> Comparisons:
    """Ranks that should hold the same: of one model, at the same place in it, quantized and packed
    in the same way."""
    places: dict[tuple[Any, ...], list[Table]] = {}
    for table in tables:
        shard = Shard.of(table.engine, table.ranks, table.role.name)
        same = (
            shard,
            table.role.quantization,
            table.engine.sglang_version,
            tuple(sorted(table.engine.load_settings.items())),
        )
        places.setdefault(same, []).append(table)
    found = Comparisons()
    for first, *others in places.values():
        one = table_fingerprints(first.columns)
        for other in others:
            beside = f"{title(other)}\n  beside {title(first)}"
            placed = _places_experts(first) or _places_experts(other)
            result = compare_replicas(
                one,
                table_fingerprints(other.columns),
                bytes_by_name(first) | bytes_by_name(other),
                doubted=_expert if placed else lambda name: "",
            )
            found.results.append((beside, result))
    return found


def _places_experts(table: Table) -> bool:
    """Whether EPLB moves experts, which it does by each engine's own load."""
    moved = table.role.updates.get("eplb")
    return "enable_eplb" in table.engine.load_settings or bool(moved and moved.updates)


def _moves_experts(table: Table, manifest: Manifest) -> bool:
    """Whether experts of a rank, or of the one that the manifest is of, may be elsewhere by now. A
    reference is of a load, before any were moved."""
    moved = table.role.updates.get("eplb")
    if manifest.reference is not None:
        return bool(moved and (moved.updates or moved.failures))
    return _places_experts(table)


def _without_experts(result: Comparison) -> Comparison:
    """Where they differ nothing is proved."""
    doubts = {name: _expert(name) for name in result.differing if _expert(name)}
    differing = tuple(name for name in result.differing if name not in doubts)
    return replace(result, differing=differing, unverifiable={**result.unverifiable, **doubts})


def _expert(name: str) -> str:
    return "EPLB places experts by each engine's own load" if ".experts." in name else ""
