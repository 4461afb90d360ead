# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""TCP ports on the loopback address for the servers that tests start."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Below the range of outgoing connections (ip_local_port_range), which take ports unasked. An
# engine takes more ports by itself, up to 1,000 above its own, so engines have a range apart.
_ENGINES = range(20000, 22900)
_OTHERS = range(24100, 32000)


def _turns(ports: range) -> itertools.cycle[int]:
    """All ports in turn, begun elsewhere in each process: none is handed out twice in a run."""
    start = os.getpid() * 97 % len(ports)
    return itertools.cycle((*ports[start:], *ports[:start]))


_engines, _others = _turns(_ENGINES), _turns(_OTHERS)


def free_port(*, engine: bool = False) -> int:
    """A port that nothing listens on, for an SGLang engine or for any other server."""
    for port in _engines if engine else _others:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports come round")


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Somebody has this port, and answers nothing: one test at a time, or who had it before."""
    with (Path(tempfile.gettempdir()) / f"taken-{port}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            yield
