# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which SGLang this is. Imports the standard library alone: every process of SGLang asks."""

from __future__ import annotations

import sys


def sglang_version() -> str:
    version = getattr(sys.modules.get("sglang"), "__version__", "")
    if not version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            version = installed("sglang")
        except (PackageNotFoundError, OSError):
            version = ""
    return str(version)
