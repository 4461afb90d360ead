# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``uninstall``: takes out what ``install`` put into another interpreter's site-packages."""

from __future__ import annotations

import argparse

from sglang_weight_exporter.cli.install import (
    LINKS,
    PTH,
    START,
    InstallError,
    Interpreter,
    add_interpreter,
    refused,
    remove,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Take out of another interpreter's site-packages what `install` put there, and nothing "
        "else. What pip installed, `PYTHON -m pip uninstall sglang-weight-exporter` takes out."
    )
    add_interpreter(parser, uninstall)


def uninstall(interpreter: Interpreter) -> None:
    """Take the files out again. Raises :class:`InstallError`."""
    site = interpreter.site
    print(f"{interpreter.describe()}, site-packages {site}")
    links = site / LINKS
    if not links.is_dir():
        by_pip = (
            " It was installed by pip there, and "
            f"`{interpreter.python} -m pip uninstall sglang-weight-exporter` takes it out."
        )
        raise InstallError(
            f"`install` has put nothing into {site}, so nothing was changed."
            + (by_pip if interpreter.has_package else "")
        )
    # pip's own files have the same names: where it came after us, they are no longer ours.
    ours = [links] if interpreter.has_package else [site / PTH, site / START, links]
    try:
        remove(ours, strict=True)
    except OSError as error:
        raise InstallError(refused(interpreter, error)) from error
    for path in ours:
        print(f"  removed {path}")
    print("Engines that run stay hooked until they end.")
