# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that a model runner has loaded (``lora_manager`` of 0.4.9 and later).

Each is read once, when it is new. Its slot is asked for whenever it is published: forward passes
move adapters into slots, and nothing of ours runs in them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from sglang_weight_exporter.capture.object_tensors import unique_storages
from sglang_weight_exporter.fingerprint.arrays import of_bytes, of_rank, texts
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter, FingerprintError
from sglang_weight_exporter.records.adapters import NAMED_ADAPTERS, Adapter, Adapters, Aspect

#: Dictionaries of tensors, of an adapter and of each of its layers. Copies in pinned memory, which
#: come with the first request, are in others.
_TENSORS = ("weights", "embedding_layers", "added_tokens_embeddings")

#: What fingerprints may take of a load.
FINGERPRINT_SECONDS = 2.0


@dataclass(frozen=True)
class _Known:
    """An adapter that was read."""

    adapter: weakref.ref[Any]
    record: Adapter
    #: What its configuration says, for comparison with another rank's.
    settings: str


class LoadedAdapters:
    """The adapters of one runner. ``fingerprinter``: takes fingerprints, if they are to be taken;
    ``report`` is called with what could not be read."""

    def __init__(
        self,
        *,
        fingerprinter: Fingerprinter | None,
        report: Callable[[str, BaseException], None],
        clock: Callable[[], float],
    ) -> None:
        self._fingerprinter = fingerprinter
        self._report = report
        self._clock = clock
        #: SGLang's id → adapter.
        self._known: dict[str, _Known] = {}
        self._captured: Adapters | None = None
        self._changed_at: float | None = None

    def capture(self, runner: Any) -> None:
        """Read those that are new, and forget those that are gone."""
        manager = getattr(runner, "lora_manager", None)
        references = getattr(manager, "lora_refs", None)
        if not isinstance(references, dict):
            self._captured = None
            return
        try:
            self._read(manager, references)
        except Exception as error:
            self._known, self._captured = {}, None
            self._report("adapters", error)

    def described(self, runner: Any) -> Adapters | None:
        """With the slots that they are in now; ``None``: LoRA is off, or they could not be read."""
        if self._captured is None:
            return None
        pool = getattr(getattr(runner, "lora_manager", None), "memory_pool", None)
        slots = getattr(pool, "uid_to_buffer_id", None)
        slots = slots if isinstance(slots, dict) else {}
        last = list(self._known.items())[-NAMED_ADAPTERS:]
        named = (
            msgspec.structs.replace(known.record, slot=_slot(slots.get(identifier)))
            for identifier, known in last
        )
        return msgspec.structs.replace(self._captured, named=tuple(named))

    def _read(self, manager: Any, references: dict[str, Any]) -> None:
        loaded = {
            identifier: manager.loras[identifier]
            for identifier in references
            if identifier in manager.loras
        }
        now, deadline = self._clock(), time.monotonic() + FINGERPRINT_SECONDS
        known = {}
        for identifier, adapter in loaded.items():
            before = self._known.get(identifier)
            if before is None or before.adapter() is not adapter:
                before = _read_adapter(references[identifier], adapter, now)
            if self._fingerprinter is not None and not before.record.fingerprint:
                before = self._with_fingerprint(before, adapter, deadline)
            known[identifier] = before
        if known.keys() != self._known.keys():
            self._changed_at = now
        self._known = known
        records = [each.record for each in known.values()]
        self._captured = Adapters(
            count=len(records),
            nbytes=sum(record.nbytes for record in records),
            changed_at=self._changed_at,
            hashes=_hashes(known.values(), content=self._fingerprinter is not None),
        )

    def _with_fingerprint(self, known: _Known, adapter: Any, deadline: float) -> _Known:
        """Where it takes too long, the next capture tries again."""
        assert self._fingerprinter is not None
        tensors = dict(_tensors(adapter))
        try:
            values = self._fingerprinter(
                list(tensors.values()), limit_seconds=deadline - time.monotonic()
            )
        except FingerprintError:
            return known
        content = of_rank(dict(zip(tensors, texts(values), strict=True)))
        return _Known(
            known.adapter,
            msgspec.structs.replace(known.record, fingerprint=content),
            known.settings,
        )


def _read_adapter(reference: Any, adapter: Any, now: float) -> _Known:
    config = adapter.config
    rank = getattr(config, "r", None)
    modules = getattr(config, "target_modules", None) or ()
    modules = [modules] if isinstance(modules, str) else sorted(map(str, modules))
    name = str(reference.lora_name)
    storages = unique_storages(_tensors(adapter))
    return _Known(
        adapter=weakref.ref(adapter),
        record=Adapter(
            name=name,
            rank=rank if isinstance(rank, int) else None,
            nbytes=sum(storage.nbytes for storage in storages),
            loaded_at=now,
            pinned=bool(getattr(reference, "pinned", False)),
        ),
        settings=repr((name, rank, getattr(config, "lora_alpha", None), modules)),
    )


def _slot(index: object) -> int | None:
    return index if isinstance(index, int) else None


def _tensors(adapter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Its tensors under the names that they have in its file, or SGLang's where those were
    joined."""
    for owner in (adapter, *getattr(adapter, "layers", ())):
        for attribute in _TENSORS:
            yield from (getattr(owner, attribute, None) or {}).items()


def _hashes(known: Collection[_Known], *, content: bool) -> dict[Aspect, str]:
    parts: dict[Aspect, list[str]] = {
        "names": [each.record.name for each in known],
        "settings": [each.settings for each in known],
        "content": [f"{each.settings}\0{each.record.fingerprint}" for each in known],
    }
    if not content or not all(each.record.fingerprint for each in known):
        del parts["content"]
    return {aspect: of_bytes("\n".join(sorted(each)).encode()) for aspect, each in parts.items()}
