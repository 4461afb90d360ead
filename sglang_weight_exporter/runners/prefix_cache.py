# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How many tokens a scheduler's prefix cache holds."""

from __future__ import annotations

from typing import Any


def cached_tokens(scheduler: Any) -> int:
    """Tokens in the prefix cache, those of running requests included.

    Two numbers that SGLang keeps up to date (``BasePrefixCache``): tokens that nobody uses, and
    tokens that running requests use. A cache of several kinds of layers has them for each kind, and
    in some releases for nothing else. One that keeps nothing for the next request (``ChunkCache``)
    says 0.
    """
    cache = scheduler.tree_cache
    # Until 0.4.3 nothing says what is in use.
    return _tokens(cache, "evictable_size") + _tokens(cache, "protected_size")


def _tokens(cache: Any, name: str) -> int:
    try:
        tokens = getattr(cache, name, int)()
    except NotImplementedError:  # With sliding windows or Mamba, until both were unified.
        tokens = getattr(cache, f"full_{name}")()
    return int(tokens[0] if isinstance(tokens, tuple) else tokens)
