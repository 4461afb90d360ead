# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with one rank, or in one pass over all of them, stays there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger("sglang_weight_exporter")

#: How many different errors are remembered as logged.
_REMEMBERED = 1000


class Guard:
    """Counts the errors of steps, and logs each that is new. Used by several threads: a count that
    is lost between two of them is one of many."""

    def __init__(self) -> None:
        self.errors = 0
        self._logged: set[str] = set()

    @contextlib.contextmanager
    def step(self, what: str, *, traceback: bool = True) -> Iterator[None]:
        """Around a step without which everything else goes on. ``what``: begins a sentence.

        ``traceback``: whether an error that is not the system's may be this program's.
        """
        try:
            yield
        except Exception as error:
            self.errors += 1
            key = f"{what}: {error!r}"
            if key not in self._logged and len(self._logged) < _REMEMBERED:
                self._logged.add(key)
                logger.warning(
                    "%s failed (%s: %s). All else goes on, and it is tried again.",
                    what,
                    type(error).__name__,
                    error,
                    exc_info=traceback and not isinstance(error, OSError),
                )
