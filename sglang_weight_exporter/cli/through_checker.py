# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify --through-checker``: SGLang's own ``/weights_checker``, for engines whose weights are
quantized: what they hold is not what was sent, and may be others of the same values.

SGLang compares what quantized weights stand for: with a copy that it has kept since ``snapshot``,
in a tolerance of the quantization, or by checksums, which are compared here between replicas.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from sglang_weight_exporter.cli.capture_request import ask_engine
from sglang_weight_exporter.cli.choice import CommandError, chosen_tables
from sglang_weight_exporter.cli.terminal import print_line, print_names
from sglang_weight_exporter.store.decoding import UnreadableError

ACTIONS = ("checksum", "snapshot", "compare")
_PATH = "/weights_checker"
#: How long SGLang may take to copy or compare all weights, with no token made meanwhile.
_COPY_SECONDS = 1800.0
#: Of each tensor that is other than its copy a line of the message (``_check_tensors``).
_DIFFERING = re.compile(r"^name=(\S+) max_abs_err=(\S+)", re.MULTILINE)


class _Place(msgspec.Struct, frozen=True):
    """``ParallelismInfo``."""

    role: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0


class _Rank(msgspec.Struct):
    """``ChecksumInfo``."""

    checksums: dict[str, str]
    parallelism_info: _Place


class _Answer(msgspec.Struct):
    success: bool = False
    message: str = ""
    ranks: list[_Rank] = []


def run(arguments: argparse.Namespace) -> int:
    action: str = arguments.through_checker
    answers = {
        engine: _ask(arguments, action, address, pids)
        for engine, (address, pids) in _engines(arguments).items()
    }
    if not answers:
        raise CommandError(
            "No engine here serves HTTP, so there is nothing to ask. --url names another."
        )
    if action == "checksum":
        return _replicas(answers)
    statuses = {_print(action, engine, answer) for engine, answer in answers.items()}
    return 1 if 1 in statuses else 2 if 2 in statuses else 0


def _engines(arguments: argparse.Namespace) -> dict[str, tuple[str, list[int] | None]]:
    """Where each is asked, and the processes that may get its key."""
    if arguments.url:
        return {arguments.url: (arguments.url, None)}
    found: dict[str, tuple[str, list[int] | None]] = {}
    for reader in chosen_tables(arguments):
        if reader.engine.url:
            with contextlib.suppress(OSError, UnreadableError):  # It has just ended.
                _, pids = found.setdefault(reader.engine.name, (reader.engine.url, []))
                assert pids is not None
                pids.append(reader.directory.snapshot().pid)
    return found


def _ask(
    arguments: argparse.Namespace, action: str, address: str, pids: Iterable[int] | None
) -> _Answer:
    body: dict[str, Any] = {"action": action}
    if action == "compare":
        body["allow_quant_error"] = True
    reason, answer = ask_engine(
        address, arguments.api_key, pids, _PATH, body, seconds=_COPY_SECONDS
    )
    try:
        return msgspec.convert(answer, _Answer)
    except msgspec.ValidationError:
        return _Answer(message=reason or f"{address}{_PATH} answers nothing that is known")


def _print(action: str, engine: str, answer: _Answer) -> int:
    print_line(f"engine {engine}")
    if action == "snapshot" and answer.success:
        print_line("  SGLang keeps a copy of its weights on the host, until it compares with it")
        return 0
    if action == "snapshot":
        print_line(f"  SGLang could not copy its weights: {answer.message}")
        return 2
    differing = _DIFFERING.findall(answer.message)
    if answer.success:
        print_line(
            "  equal to the copy that it kept: what quantized weights stand for, within SGLang's "
            "tolerance, and all others bit by bit"
        )
        return 0
    print_names("  different", [f"{name}, by {error} at most" for name, error in differing])
    if not differing:
        text = answer.message or "there is no copy: --through-checker snapshot takes one"
        print_line(f"  cannot be compared: {text}")
    return 1 if differing else 2


def _replicas(answers: Mapping[str, _Answer]) -> int:
    """Ranks at one place in engines of this host, and data-parallel replicas of one."""
    places: dict[_Place, list[tuple[str, dict[str, str]]]] = {}
    for engine, answer in answers.items():
        if not answer.ranks:
            print_line(f"engine {engine}")
            print_line(f"  no checksums: {answer.message}")
        for rank in answer.ranks:
            place = msgspec.structs.replace(rank.parallelism_info, dp_rank=0)
            places.setdefault(place, []).append((engine, rank.checksums))
    statuses = set()
    for place, ((first, own), *others) in places.items():
        for other, theirs in others:
            names = dict.fromkeys([*own, *theirs])
            differing = [name for name in names if own.get(name) != theirs.get(name)]
            statuses.add(1 if differing else 0)
            print_line(f"engine {other}  tp {place.tp_rank} pp {place.pp_rank}  {place.role}")
            print_line(
                f"  beside engine {first}: {len(names) - len(differing):,} tensors stand for the "
                f"same values, {len(differing):,} do not"
            )
            print_names("  different", differing)
    if not statuses:
        raise CommandError("There are no two ranks here that should hold the same.")
    return max(statuses)
