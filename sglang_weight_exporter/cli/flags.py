# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Settings as flags of the same name; a flag wins over its environment variable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from sglang_weight_exporter.settings import PREFIX, Settings


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Give a command the flags of these settings."""
    for setting in fields(Settings):
        if setting.name in names:
            flags = [f"--{setting.name.replace('_', '-')}"]
            if setting.name.startswith("web_"):  # As Prometheus' exporters have it.
                flags.append(f"--{setting.name.replace('_', '.')}")
            parser.add_argument(
                *flags,
                type=_parser(setting.metadata["parse"]),
                metavar=setting.name.rpartition("_")[2].upper(),
                help=f"{setting.metadata['description']} ({PREFIX}{setting.name.upper()})",
            )


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({error})") from error

    return parsed


def settings_from(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings in force for a command; unusable variables are named on standard error."""
    settings, complaints = Settings.from_environ(environ)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    given = {
        setting.name: value
        for setting in fields(Settings)
        if (value := getattr(arguments, setting.name, None)) is not None
    }
    return replace(settings, **given)
