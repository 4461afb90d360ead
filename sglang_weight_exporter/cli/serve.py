# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``serve``: the exporter process. Ranks start it themselves unless they are told not to."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys

from sglang_weight_exporter import GOODBYE
from sglang_weight_exporter.cli.flags import add_flags, settings_from


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve the metrics of this host's ranks",
        description="Serve the metrics of all ranks of this user on this host. Ranks start this "
        "by themselves; run it as a service or a sidecar with SGLANG_WEIGHT_EXPORTER_SERVE=off "
        "where the engine runs.",
    )
    add_flags(
        parser,
        "address",
        "port",
        "runtime_dir",
        "tls_cert_file",
        "tls_key_file",
        "tls_client_ca_file",
        "span_table",
        "span_table_names",
    )
    # The lock that a rank hands down to the process it starts.
    parser.add_argument("--lock-fd", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    started_by_rank = arguments.lock_fd is not None
    if started_by_rank:
        # An engine that ends kills its descendants (SGLang's `kill_process_tree`). This process
        # stays for a while, to deliver the last spans, so it must be none of them.
        if os.fork():
            os._exit(0)
        atexit.register(print, GOODBYE, flush=True)
    # Imported here: `status` and `table` need no web server.
    from sglang_weight_exporter.export.process import AlreadyServedError, serve

    logging.raiseExceptions = False  # The engine that reads our lines may be gone before us.
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(message)s" if started_by_rank else "%(asctime)s %(levelname)s %(message)s",
    )
    settings = settings_from(arguments, os.environ)
    try:
        serve(settings, os.environ, lock_descriptor=arguments.lock_fd)
    except AlreadyServedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
