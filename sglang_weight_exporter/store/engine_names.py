# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which name an engine goes by, where several on one host would have the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.reader import SnapshotReader
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Ranks of one engine start together and pick their name one after the other; each needs
#: milliseconds. Whoever cannot have the lock in this time, or not at all, goes on without it.
_PATIENCE_SECONDS = 0.5


@contextlib.contextmanager
def claim_engine_name(runtime_dir: RuntimeDir, engine: Engine, ranks: Ranks) -> Iterator[str]:
    """The engine's name, or the name with ``-2``, ``-3``… behind it.

    A name is free for this rank if no other engine that is alive has it, nor a living rank with
    the same ranks: no two living ranks ever publish the same series. Ranks of an engine on several
    hosts that share a directory have one name. The rank writes its first snapshot inside the
    ``with`` block, so that the next one sees it.
    """
    lock = FileLock(runtime_dir.engines_lock)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with contextlib.suppress(OSError):
        while not lock.acquire() and time.monotonic() < deadline:
            time.sleep(0.01)
    try:
        alive = [snapshot for _, snapshot in SnapshotReader(runtime_dir).read()]
        further = 1
        name = engine.name
        while any(
            other.engine.name == name
            and (not engine.is_part_of(other.engine) or other.ranks == ranks)
            for other in alive
        ):
            further += 1
            name = f"{engine.name}-{further}"
        yield name
    finally:
        lock.release()
