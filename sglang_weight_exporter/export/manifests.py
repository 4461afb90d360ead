# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of ranks beside what a trainer sent: of each update the manifest of its version.

The engine has no part in it, and nobody waits: a manifest that comes after the update is compared
when it is there, as long as the weights are that update's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec import UNSET

from sglang_weight_exporter.export.following import Finding, Left, TableFollower
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.proved_names import note_proved_names, proved_names
from sglang_weight_exporter.export.references import device_kind
from sglang_weight_exporter.records.updates import Update
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.verification.confirmed_loaders import confirmed
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestError,
    read_parts,
    whole_of,
)
from sglang_weight_exporter.verification.sent import SentTensor
from sglang_weight_exporter.verification.sent_comparison import (
    SentComparison,
    compare_sent,
    renamed,
)

#: The version that SGLang has before anybody names one.
_NO_VERSION = "default"
_VERSION = re.compile(r"[\w.+-]{1,200}")
#: How long a version that was there before an update may still be the one before.
_VERSION_FOLLOWS_SECONDS = 10.0
_MOVED = "EPLB may have moved the expert since"
#: The share of a rank's bytes that has to be equal before it is said to hold what was sent.
ENOUGH = 0.5


def manifest_path(directory: Path, version: str) -> Path | None:
    """Where a version's manifest is; ``None`` where there can be none."""
    if version == _NO_VERSION or not _VERSION.fullmatch(version):
        return None
    return directory / f"manifest_{version}.json"


def compare_with_sent(
    table: Table, sent: Mapping[str, SentTensor], proved: Iterable[str] = ()
) -> SentComparison | None:
    """As ``compare_sent``, with what is confirmed of this rank's loader, and what the exporter has
    noted of it."""
    role, release = table.role, table.engine.sglang_version
    loader = confirmed(release, device_kind(table), role.architecture, role.quantization)

    def is_confirmed(row: str, whole: bool) -> bool:
        return loader is not None and loader.covers(row, whole=whole)

    noted = frozenset() if table.directory is None else proved_names(table.directory)
    found = compare_sent(table.columns, sent, confirmed=is_confirmed, proved=noted.union(proved))
    moved = role.updates.get("eplb")
    if found is None or moved is None or not (moved.updates or moved.failures):
        return found
    experts = [name for name in found.comparison.differing if ".experts." in name]
    return replace(
        found,
        comparison=replace(
            found.comparison,
            differing=tuple(n for n in found.comparison.differing if n not in experts),
            unverifiable=found.comparison.unverifiable | dict.fromkeys(experts, _MOVED),
        ),
    )


@dataclass(frozen=True)
class EngineComparison:
    """The ranks of one engine together: what none of them holds is known by all of them alone."""

    unheld: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def of_engine(
    tables: Iterable[tuple[Table, SentComparison]],
) -> EngineComparison:
    """Of ranks that are compared with one manifest. Empty where one of the engine's is missing."""
    found = list(tables)
    if not found:
        return EngineComparison()
    expected = found[0][0].engine.expected_ranks
    ranks = {table.rank_id for table, _ in found}
    if expected is None or len(ranks) < expected:
        return EngineComparison()
    held = frozenset().union(*(result.held for _, result in found))
    sent = found[0][1].sent
    unheld = tuple(name for name in sent if name not in held)
    unsent = {name: of for _, result in found for name, of in result.unsent.items()}
    proved = frozenset().union(*(result.proved for _, result in found))
    return EngineComparison(unheld, renamed(unheld, unsent, sent, proved))


class ManifestFollower(TableFollower):
    """Compares each update of a runtime directory's targets with the manifest of its version."""

    attribute = "manifest_match"
    action = "update"
    setting = "manifest_dir"
    sentence = "An update is compared with no manifest"
    hopeless = (ManifestError,)

    def __init__(self, snapshots: SnapshotReader, directory: Path | None, guard: Guard) -> None:
        super().__init__(snapshots, directory, guard)
        #: By rank and role: patterns of tensors that were equal once; which update was the first
        #: with the version that it has now.
        self._proved: dict[tuple[str, str], frozenset[str]] = {}
        self._first: dict[tuple[str, str], tuple[str, int]] = {}
        #: By engine and version what its ranks hold of what was sent.
        self._results: dict[tuple[str, str], dict[str, tuple[Table, SentComparison]]] = {}
        self._manifest: tuple[tuple[tuple[int, int, int], ...], Manifest] | None = None

    def follow(self) -> None:
        super().follow()
        for by_role in (self._proved, self._first):
            for key in by_role.keys() - self._living:
                del by_role[key]
        ranks = {rank for rank, _ in self._living}
        for engine, known in list(self._results.items()):
            if not ranks.intersection(known):
                del self._results[engine]

    def _left_by(self, update: Update, sha256: str, fingerprint: str, version: str) -> Left:
        return update.sequence, sha256, fingerprint, version

    def _compare(self, table: Table, directory: Path) -> Finding | None:
        if table.role.name != "target":
            return Finding()  # A draft is trained by itself, and its names are the target's.
        version, key = table.weight_version, (table.rank_id, table.role.name)
        path = manifest_path(directory, version)
        if path is None or not self._is_of_this_update(key, table):
            return Finding() if path is None else None
        manifest = self._read(path)
        if manifest is None:
            return None
        if manifest.sent is UNSET:
            raise ManifestError(f"{path} has no sums: sum_tensors takes them")
        result = compare_with_sent(table, manifest.sent, self._proved.get(key, ()))
        if result is None:
            return Finding()
        # Beside the file, for a disk that is full.
        self._proved[key] = self._proved.get(key, frozenset()) | result.proved
        if table.directory is not None:
            note_proved_names(table.directory, self._proved[key])
        return self._verdict(table, result)

    def _is_of_this_update(self, key: tuple[str, str], table: Table) -> bool:
        """Some trainers name the version after the update: until then it has the one before."""
        first = self._first.setdefault(key, (table.weight_version, table.update))
        if first[0] != table.weight_version:
            first = self._first[key] = (table.weight_version, table.update)
        last = table.role.last_update
        ended_at = 0.0 if last is None else last.ended_at
        return first[1] == table.update or time.time() > ended_at + _VERSION_FOLLOWS_SECONDS

    def _read(self, path: Path) -> Manifest | None:
        """The one that was read last is kept: all ranks of an engine want the same."""
        files = sorted(each for each in path.parent.glob("*.json") if whole_of(each) == path)
        seen = [each.stat() for each in files]
        state = tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in seen)
        if not state:
            return None
        if self._manifest is None or self._manifest[0] != state:
            manifest = read_parts(path)
            if manifest is None:
                return None
            self._manifest = state, manifest
        return self._manifest[1]

    def _verdict(self, table: Table, result: SentComparison) -> Finding:
        engine = (table.engine.instance, table.weight_version)
        for other in [each for each in self._results if each[0] == engine[0] and each != engine]:
            del self._results[other]
        known = self._results.setdefault(engine, {})
        known[table.rank_id] = table, result
        finding = _finding(result)
        meant = dict(of_engine(known.values()).renamed)
        if meant:
            self._say_renamed(known, meant)
            finding = _with_renamed(finding, result, meant)
        return finding

    def _say_renamed(
        self, known: Mapping[str, tuple[Table, SentComparison]], meant: Mapping[str, str]
    ) -> None:
        """The last rank that was compared completes the engine; the others are notified."""
        for rank_id, (table, result) in known.items():
            key = (rank_id, table.role.name)
            left, finding = self._found.get(key, (None, Finding()))
            if left is not None:
                self._found[key] = left, _with_renamed(finding, result, meant)


def _finding(result: SentComparison) -> Finding:
    comparison = result.comparison
    if comparison.differing:
        return Finding(match=False, differing=comparison.differing)
    return Finding(match=True if comparison.is_enough(ENOUGH) else None)


def _with_renamed(finding: Finding, result: SentComparison, meant: Mapping[str, str]) -> Finding:
    """Where this rank holds what was meant, what it holds is not what was sent."""
    pairs = tuple((name, other) for name, other in meant.items() if other in result.unsent)
    return replace(finding, match=False, renamed=pairs) if pairs else finding


def beside_manifest(table: Table, directory: Path) -> SentComparison | None:
    """How this rank compares with the manifest of its version; ``None``: there is none, or the rank
    has taken no sums. Raises ManifestError and OSError."""
    path = manifest_path(directory, table.weight_version)
    manifest = None if path is None else read_parts(path)
    if manifest is None or manifest.sent is UNSET:
        return None
    return compare_with_sent(table, manifest.sent)
