# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which SGLang this is. Imports the standard library alone: every process of SGLang asks."""

from __future__ import annotations

import functools
import sys


def sglang_version() -> str:
    """As the package says it, or else what is installed."""
    return str(getattr(sys.modules.get("sglang"), "__version__", "") or _installed())


@functools.cache
def _installed() -> str:
    """Read once: that takes longer than all else that is asked of a release."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sglang")
    except (PackageNotFoundError, OSError):
        return ""
