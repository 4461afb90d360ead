# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang's own loader left of a checkpoint, by what decides it: manifests in a directory.

A reference is a manifest with the key that it was made for. Two ranks of one key hold the same, so
other bytes are a difference, whatever the loader does. The first that loads a key is believed, as
ssh believes the first host key that it sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role
from sglang_weight_exporter.verification.checkpoint import CheckpointError
from sglang_weight_exporter.verification.manifest import (
    Manifest,
    ManifestError,
    Reference,
    ReferenceKey,
    encode,
    read_manifest,
)
from sglang_weight_exporter.weight_table import WeightTable, table_fingerprints, table_rows

#: Files that a loader reads; others of a directory say nothing of the weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: A header that is longer is no safetensors file's; of a configuration that is longer its size.
_MOST_READ = 100_000_000
_PIECE = 16 << 20


def find_checkpoint(model_path: str, revision: str, environ: Mapping[str, str]) -> Path | None:
    """Where the files of a model path lie on this host: a directory, a file, or what Hugging Face's
    cache has of a model's name (``refs`` and ``snapshots`` of huggingface_hub's cache)."""
    path = Path(model_path).expanduser()
    if path.exists():
        return path
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    hub = Path(environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    model = hub / f"models--{model_path.replace('/', '--')}"
    revision = revision or "main"
    with contextlib.suppress(OSError, ValueError):
        revision = (model / "refs" / revision).read_text().strip()
    found = model / "snapshots" / revision
    return found if found.is_dir() else None


def checkpoint_identity(path: Path, *, all_bytes: bool = False) -> str:
    """The same for two copies of a checkpoint: of its configuration, and of its weights' names,
    sizes and safetensors headers, or of all their bytes. Raises CheckpointError."""
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.is_file())
        else:
            files = [path]
        for file in files:
            is_weights = file.suffix in _WEIGHTS
            if not is_weights and file.suffix != ".json":
                continue
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            for piece in _pieces(file, size, all_bytes=all_bytes or not is_weights):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror}."
        ) from error
    return ("bytes:" if all_bytes else "headers:") + digest.hexdigest()


def _pieces(file: Path, size: int, *, all_bytes: bool) -> Iterator[bytes]:
    with file.open("rb") as content:
        left = size
        if not all_bytes:
            start = content.read(8) if file.suffix == ".safetensors" else b""
            yield start
            left = min(int.from_bytes(start, "little"), _MOST_READ)
        elif file.suffix == ".json":
            left = min(size, _MOST_READ)
        while left > 0 and (piece := content.read(min(left, _PIECE))):
            left -= len(piece)
            yield piece


def layout_of(table: WeightTable) -> str:
    """Names, dtypes and shapes of what was fingerprinted. Settings that are not in the key change
    it more often than not, so that nothing is compared rather than called wrong."""
    held = table_fingerprints(table)
    rows = [
        (row.name, row.dtype, row.shape_in_memory) for row in table_rows(table) if row.name in held
    ]
    return hashlib.sha256(msgspec.json.encode(sorted(rows))).hexdigest()


def key_of(
    engine: Engine,
    ranks: Ranks,
    role: Role,
    table: WeightTable,
    *,
    checkpoint: str,
    device: str,
) -> ReferenceKey:
    """``checkpoint``: its identity; ``device``: the product's name, or torch's of its kind."""
    return ReferenceKey(
        checkpoint=checkpoint,
        release=engine.sglang_version,
        settings=engine.load_settings,
        quantization=role.quantization,
        role=role.name,
        tp_rank=ranks.tp,
        pp_rank=ranks.pp,
        moe_ep_rank=ranks.moe_ep or 0,
        tp_size=engine.tp_size,
        pp_size=engine.pp_size,
        ep_size=engine.ep_size,
        device=device,
        layout=layout_of(table),
    )


class References:
    """A directory of them, which hosts may share. A file a key, that is never written twice."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, key: ReferenceKey) -> Manifest | None:
        """Raises ManifestError and OSError."""
        try:
            manifest = read_manifest(self._path(key))
        except FileNotFoundError:
            return None
        if manifest.reference is None or manifest.reference.key != key:
            raise ManifestError(
                f"{self._path(key)} is no reference of the key that it is named by."
            )
        return manifest

    def leave(self, manifest: Manifest) -> bool:
        """Whether it was the first; what is there stays. Raises OSError."""
        if manifest.reference is None:
            raise ManifestError("A manifest without a key is no reference.")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(manifest.reference.key)
        temporary = path.with_name(f".reference-{os.urandom(8).hex()}")
        try:
            with temporary.open("xb") as file:
                file.write(encode(manifest))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def all(self) -> Iterator[tuple[Path, Reference | ManifestError]]:
        """In the order of their names. Raises OSError."""
        for path in sorted(self.directory.glob("*.json")):
            try:
                reference = read_manifest(path).reference
            except ManifestError as error:
                yield path, error
            else:
                if reference is not None:
                    yield path, reference

    def _path(self, key: ReferenceKey) -> Path:
        return self.directory / f"{key.digest}.json"
