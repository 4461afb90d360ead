# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a capture of weights on a GPU costs, as ratios to a bare loop: cuda_allocations.py [TENSORS]

Baseline and rounds as in `pointer_table.py`. The allocator's own account of its segments, which
regions need, is read only when the table has changed. Needs torch and an NVIDIA GPU.
"""

from __future__ import annotations

import functools
import sys

import torch
from pointer_table import ROUNDS, bare_loop, measure, model_of

from sglang_weight_exporter.capture.account import account
from sglang_weight_exporter.capture.allocations import Segments
from sglang_weight_exporter.capture.weights import WeightCapture, capture_weights
from sglang_weight_exporter.runners.memory import of_weights


def account_of(known: WeightCapture) -> None:
    account(Segments.of_cuda(), of_weights(known.ranges), device=0)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, median of {ROUNDS} rounds")
    for tensors in map(int, sys.argv[1:] or ["1000", "20000", "100000"]):
        model = model_of(tensors).cuda()
        capture = functools.partial(capture_weights, model, role="target", captured_at=0.0)
        known = capture(segments=Segments.of_cuda)
        seconds = measure(
            {
                "bare loop": functools.partial(bare_loop, model),
                "capture, table unchanged": functools.partial(
                    capture, segments=Segments.of_cuda, previous=known
                ),
                "capture, table changed": functools.partial(capture, segments=Segments.of_cuda),
                "segments alone": Segments.of_cuda,
                "account alone": functools.partial(account_of, known),
                "torch's counters alone": functools.partial(
                    torch.cuda.memory_stats_as_nested_dict, 0
                ),
            },
            ROUNDS,
        )
        segments = len(torch.cuda.memory_snapshot())
        print(f"\n{tensors} tensors, {segments} segments")
        for name, taken in seconds.items():
            print(f"  {name:<26} {1000 * taken:9.2f} ms {taken / seconds['bare loop']:7.2f}")
        del model, capture, known
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
