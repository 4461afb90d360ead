# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that devices read on their own time, for fingerprints that nobody waits for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sglang_weight_exporter.capture.weights import WeightCapture
from sglang_weight_exporter.runners.roles import RunnerRole


@dataclass(frozen=True, eq=False)
class Reading:
    """Has begun. Until it is over the weights may not be written, nor their memory released."""

    #: What was known of each role before, by name.
    before: dict[str, WeightCapture | None]
    #: Forward passes that the scheduler had begun.
    passes: int | None
    #: What is read of each role.
    captures: dict[RunnerRole, WeightCapture] = field(default_factory=dict)
    #: Names of tensors that were no weights then.
    scratch: dict[RunnerRole, tuple[str, ...]] = field(default_factory=dict)
    events: list[torch.cuda.Event] = field(default_factory=list)

    def is_of(self, role: RunnerRole, weights: WeightCapture | None) -> bool:
        """Whether it is what this capture says: another one may be of something written since."""
        return weights is not None and self.captures.get(role) is weights

    @property
    def is_over(self) -> bool:
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        """Other threads run meanwhile."""
        for event in self.events:
            event.synchronize()
