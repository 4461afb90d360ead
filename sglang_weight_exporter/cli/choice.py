# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which ranks of this host a command is about: ``--engine``, ``--role`` and ``--rank``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable

import msgspec

from sglang_weight_exporter.cli.flags import settings_from
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.store.tables import Table, TableReader, open_tables

_RANKS = ("tp", "pp", "dp", "moe_ep")


class CommandError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def exit_status(do: Callable[[], int], *errors: type[Exception]) -> int:
    """Of a command; 2 where it could not be done, which is said on standard error. ``errors``: of
    which the message says why."""
    reasons: tuple[type[Exception], ...] = (CommandError, *errors)
    try:
        return do()
    except reasons as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"{error.name} is needed for this and not installed here.", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename or 'Output'} cannot be used: {error.strerror}.", file=sys.stderr)
    return 2


def add_choice(parser: argparse._ActionsContainer, *, role: str | None = None) -> None:
    parser.add_argument("--engine", help="the engine with this label")
    parser.add_argument(
        "--role",
        default=role,
        help="target, draft, draft_1, … (default: " + ("all)" if role is None else f"{role})"),
    )
    add_rank(parser)


def add_rank(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rank",
        type=_ranks,
        default={},
        metavar="RANK",
        help="tensor-parallel rank N, or a list such as tp=1,dp=0",
    )


def _ranks(text: str) -> dict[str, int]:
    named = {}
    for part in text.split(","):
        name, separator, number = part.rpartition("=")
        name = name.strip() if separator else "tp"
        if name not in _RANKS or not number.strip().isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r} names no rank: give a number, or a list such as tp=1,dp=0 "
                f"of {', '.join(_RANKS)}"
            )
        named[name] = int(number)
    return named


def is_chosen(
    arguments: argparse.Namespace, engine: Engine, ranks: Ranks, role: str | None = None
) -> bool:
    return (
        arguments.engine in {None, engine.name}
        and (role is None or arguments.role in {None, role})
        and all(getattr(ranks, name) == rank for name, rank in arguments.rank.items())
    )


def chosen_tables(arguments: argparse.Namespace) -> list[TableReader]:
    """Raises :class:`CommandError` where there are none."""
    settings = settings_from(arguments, os.environ)
    there = open_tables(settings.runtime_dir)
    readers = [each for each in there if is_chosen(arguments, each.engine, each.ranks, each.role)]
    if not readers:
        raise CommandError(
            f"No table was chosen. There are these:\n{choices(there)}"
            if there
            else "No rank is alive here"
            + (f" in {settings.runtime_dir}" if settings.runtime_dir else "")
            + ", so there is no table. `sglang-weight-exporter status` says what may be the reason."
        )
    return readers


def choices(tables: Iterable[Table | TableReader]) -> str:
    """A line for each, with the flags that choose it."""
    return "\n".join(
        f"  --engine {table.engine.name} --rank {rank_name(table.ranks)} --role "
        + (table.role if isinstance(table, TableReader) else table.role.name)
        for table in tables
    )


def rank_name(ranks: Ranks) -> str:
    """As ``--rank`` takes it."""
    values = msgspec.structs.asdict(ranks)
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
