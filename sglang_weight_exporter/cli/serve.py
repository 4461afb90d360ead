# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``serve``: the exporter process. Ranks start it themselves unless they are told not to."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
from dataclasses import replace

from sglang_weight_exporter.cli.flags import add_flags, settings_from
from sglang_weight_exporter.process_log import (
    HidingFormatter,
    PipeHandler,
    RateLimitFilter,
    Secrets,
    log_uncaught,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve the metrics of all ranks of this user on this host. Ranks start this "
        "by themselves; run it as a service or a sidecar with SGLANG_WEIGHT_EXPORTER_SERVE=off "
        "where the engine runs."
    )
    add_flags(
        parser,
        "address",
        "port",
        "runtime_dir",
        "web_config_file",
        "metrics",
        "table",
        "span_table",
        "span_table_names",
        "span_bytes",
        "span_event_bytes",
    )
    parser.add_argument(
        "--simulate",
        type=_fleet,
        metavar="ENGINESxRANKS",
        help="serve ranks that do not exist, with loads, updates, failures and releases, to try "
        "dashboards, rules and a collector without SGLang: 4x8 is 4 engines of 8 ranks",
    )
    # The lock that a rank hands down to the process it starts.
    parser.add_argument("--lock-fd", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    log_format = "%(asctime)s %(levelname)s %(message)s"
    if arguments.lock_fd is not None:  # Started by a rank.
        # An engine that ends kills its descendants (SGLang's `kill_process_tree`). This process
        # stays for a while, to deliver the last spans, so it must be none of them.
        if os.fork():
            os._exit(0)
        handler = pipe = PipeHandler(sys.stdout.fileno())
        log_format = "%(message)s"  # Time and level are for the engine's log to say.
        atexit.register(pipe.say_goodbye)
    handler.addFilter(RateLimitFilter())
    logging.raiseExceptions = False  # Who reads our lines may be gone before us.
    handler.setFormatter(HidingFormatter(log_format, Secrets(os.environ)))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    log_uncaught()
    # Imported here: `status` and `table` need no web server.
    from sglang_weight_exporter.export.process import AlreadyServedError, serve

    settings = settings_from(arguments, os.environ)
    try:
        if arguments.simulate is None:
            serve(settings, os.environ, lock_descriptor=arguments.lock_fd)
        elif arguments.runtime_dir is not None:
            print(
                "Simulated ranks have a runtime directory of their own and are never among real "
                "ones: leave --runtime-dir away.",
                file=sys.stderr,
            )
            return 2
        else:
            from sglang_weight_exporter.simulation import simulated_ranks

            with simulated_ranks(*arguments.simulate) as (runtime_dir, gpus):
                # Addresses that are made up belong among no real ones.
                settings = replace(settings, runtime_dir=runtime_dir, metadata_dir=None)
                serve(settings, os.environ, simulated_gpus=gpus)
    except AlreadyServedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _fleet(text: str) -> tuple[int, int]:
    """``4x8``: engines, ranks of each."""
    engines, _, ranks = text.partition("x")
    if not (engines.isdecimal() and ranks.isdecimal() and int(engines) and int(ranks)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ENGINESxRANKS: write 4x8 for 4 engines of 8 ranks"
        )
    return int(engines), int(ranks)
