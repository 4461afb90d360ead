# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""An editable install gets the files that Python reads at start, and nothing else of the wheel.

Hatchling would also put the dashboards into a ``sglang_weight_exporter`` folder of their own in
site-packages, which stays behind as an empty package when pip uninstalls.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AutoloadOnly(BuildHookInterface):  # type: ignore[type-arg]
    """Restricts what is copied for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            build_data["force_include_editable"] = {
                f"{self.root}/autoload/{name}": name
                for name in ("sglang_weight_exporter.pth", "sglang_weight_exporter.start")
            }
