# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Colours of series, and what they stand for on every panel."""

from __future__ import annotations

#: Every colour of a series is one of these. Whoever does not see red or green tells any two of them
#: apart as well: by CIEDE2000 they differ by 15 at least.
BLUE, CYAN, VIOLET, GOLD, YELLOW, OLIVE, BEIGE, PINK, GREY, GREEN, CRIMSON, RED = (
    *("#578fff", "#00edff", "#7200d7", "#d29b0a", "#fbeb14", "#6b6001"),
    *("#f5d0ad", "#fa8fbf", "#846f95", "#669582", "#9b2453", "#df4156"),
)
#: The lines that mark updates have one that no series has.
LINES = PINK

#: In the order in which they are stacked.
COLOURS = {
    "Target weights": BLUE,
    "Draft weights": CYAN,
    "LoRA": VIOLET,
    "KV pool": GOLD,
    "KV tables": YELLOW,
    "CUDA graphs": OLIVE,
    "Other tensors": CRIMSON,
    "Unused in torch": BEIGE,
    "Outside torch": GREY,
    "Everything else in use": GREEN,
    "Free": "rgba(140, 146, 160, 0.22)",
}
#: Least or most of many, and the one in the middle.
SPREAD = {"least": GOLD, "most": GOLD, "slowest": GOLD, "oldest": GOLD, "median": BLUE}
SOURCES = {
    "disk": BLUE,
    "distributed": GOLD,
    "tensor": CYAN,
    "ipc": OLIVE,
    "p2p": VIOLET,
    "eplb": GREY,
    "external": BEIGE,
}
