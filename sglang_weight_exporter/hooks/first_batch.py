# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The first batch after something: seen once, and no batch after it is slower for that.

``run_batch`` is replaced on the one scheduler, as its attribute, and taken away again with the
batch that was waited for. SGLang's own method of the class stays as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def watch_first_batch(
    scheduler: Any,
    is_it: Callable[[Any], bool],
    then: Callable[[], object],
    report: Callable[[BaseException], object],
) -> None:
    """Call ``then`` before the first batch that ``is_it``; does nothing while that is awaited.

    ``report``: takes an exception of ours; the batch runs in any case, and is waited for no more.
    """
    if "run_batch" in scheduler.__dict__:
        return

    def run_batch(self: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            if is_it(batch):
                take_away(self)
                then()
        except Exception as error:
            take_away(self)
            report(error)
        return type(self).run_batch(self, batch, *arguments, **keywords)

    def take_away(self: Any) -> None:
        """Unless somebody else has put something in its place meanwhile."""
        if self.__dict__.get("run_batch") is ours:
            del self.__dict__["run_batch"]

    ours = scheduler.__dict__["run_batch"] = types.MethodType(run_batch, scheduler)
