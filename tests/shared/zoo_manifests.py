# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the zoo as a trainer would have sent them, beside what a rank makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: With those of a fused tensor's parts on two ranks.
CUTS = (1, 2, 4, 8)


def manifest_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.manifest.json")


def write(checkpoint: Path) -> None:
    """Of all its tensors, under the names that they have there."""
    from safetensors import safe_open

    from sglang_weight_exporter import write_manifest

    tensors: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    write_manifest(manifest_of(checkpoint), tensors, cuts=CUTS)


def _read(checkpoint: Path) -> dict[str, Any]:
    from sglang_weight_exporter.verification.manifest import read_manifest

    sent = read_manifest(manifest_of(checkpoint)).sent
    assert isinstance(sent, dict)
    return sent


def _bytes_of(table: Any) -> int:
    """Of all shares, those that nobody sent too, and of rows of which none is known."""
    from sglang_weight_exporter.records.shares import reasons_of, shares_of

    rows, shares = list(table.rows()), table.columns.shares
    places = {
        (rows[each.row].data_ptr, each.offset): 8 * each.rows * each.columns
        for each in shares_of(shares)
    }
    unexplained: int = sum(rows[each].nbytes for each in reasons_of(shares))
    return sum(places.values()) + unexplained


class SentCheckpoints:
    """Compares a rank with them, as often as it is updated."""

    def __init__(self) -> None:
        self._proved: frozenset[str] = frozenset()

    def compare(self, table: Any, checkpoint: Path, other: Path) -> dict[str, Any]:
        """``other``: of the same model, whose tensors are those of a step before."""
        sent, stale, first = _read(checkpoint), _read(other), not self._proved
        found = self._beside(table, sent)
        self._proved, comparison = found.proved, found.comparison
        # Once is enough: what was equal stays what may be called different.
        unnamed = [
            name
            for name in (comparison.equal if first else ())
            if sent[name] != stale[name]
            and self._beside(table, {**sent, name: stale[name]}).comparison.differing != (name,)
        ]
        return {
            "equal": len(comparison.equal),
            "different": sorted(comparison.differing),
            "not_comparable": dict(sorted(comparison.unverifiable.items())),
            "unheld": sorted(sent.keys() - found.held),
            "unsent": sorted(found.unsent),
            "unnamed": unnamed,
            "equal_bytes": round(comparison.equal_bytes / _bytes_of(table), 4),
        }

    def _beside(self, table: Any, sent: dict[str, Any]) -> Any:
        from sglang_weight_exporter.export.manifests import compare_with_sent

        found = compare_with_sent(table, sent, self._proved)
        assert found is not None, "no sums were taken"
        return found
