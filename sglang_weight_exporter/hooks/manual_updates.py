# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""For code inside the engine that changes weights by its own means: a custom loader, an RDMA write.

SGLang calls nothing then that could be wrapped, so the code says it itself. Where the package is
switched off, or SGLang is not in this process, these functions do nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, get_args

from sglang_weight_exporter.hooks.install import Installation
from sglang_weight_exporter.hooks.targets import Target
from sglang_weight_exporter.records.updates import Source


@contextlib.contextmanager
def updating(model_runner: Any, source: Source = "external") -> Iterator[None]:
    """Around the code that changes weights: the update is in progress until the block ends.

    ``model_runner``: SGLang's ``ModelRunner``. An exception leaves the block unchanged and counts
    as a failed update that left the weights undefined. Inside an update of SGLang's own the block
    is one of its calls. To be called from the thread that runs the scheduler. Raises
    ``ValueError`` for a source that is none of
    :data:`~sglang_weight_exporter.records.updates.SOURCES`.
    """
    if source not in get_args(Source):
        raise ValueError(
            f"{source!r} is no source of updates, so the update would not be counted. "
            f"Use one of {', '.join(get_args(Source))}."
        )
    installation = _installation()
    if installation is None:
        yield
        return
    target = Target("record_update", __name__, "updating", "external", "0", source=source)
    with installation.observe(target, model_runner):
        yield


def record_update(model_runner: Any, source: Source = "external") -> None:
    """Weights were changed just now: the table is read again, and one update counted.

    Where the change can be enclosed, :func:`updating` says more: how long it took, that it is
    under way, and that it failed.
    """
    with updating(model_runner, source):
        pass


def _installation() -> Installation | None:
    for finder in sys.meta_path:
        installation = getattr(finder, "installation", None)
        if isinstance(installation, Installation):
            return installation
    return None
