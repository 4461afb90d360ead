# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang says of a request that is ours, and that nobody else is to read a hundred times."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def unlogged(words: str) -> Iterator[None]:
    """While the block runs, the root's handlers leave out records that have these words in them.
    Releases differ in which logger says it."""

    def is_of_others(record: logging.LogRecord) -> bool:
        return words not in str(record.msg)

    handlers = tuple(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(is_of_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_of_others)
