# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What happened to the weights of one process: loads, updates, sessions, requests, rebalances.

Pure state. It knows nothing of SGLang, of tensors or of files, so nothing that goes wrong with
those can change what it says. Every method is safe from any thread, and none waits.
"""

from sglang_weight_exporter.ledger.ledger import Ledger
from sglang_weight_exporter.ledger.open_update import (
    IDLE_SECONDS,
    CallToken,
    EndsWith,
    FinishedUpdate,
    Verdict,
)

__all__ = ["IDLE_SECONDS", "CallToken", "EndsWith", "FinishedUpdate", "Ledger", "Verdict"]
