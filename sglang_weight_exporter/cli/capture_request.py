# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Asks an engine to capture its weights again, and gives its key to nobody else."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from sglang_weight_exporter.records.fingerprints import PART, PARTS

#: What SGLang's middleware says to a request without its key (``utils/auth.py``).
_UNAUTHORIZED = {"error": "Unauthorized"}
#: Checksums of a hundred thousand tensors on some ranks.
_LARGEST_ANSWER = 64 << 20


def url(text: str) -> str:
    """An address as ``--url`` has it."""
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as http://127.0.0.1:30000")
    return text.rstrip("/")


def request_capture(
    url: str, api_key: str, pids: Iterable[int] | None, part: int = 0, parts: int = 1
) -> bool:
    """Ask without a key, and with it where the engine wants one; what goes wrong is printed.
    Whether it was asked.

    SGLang hands the request to every scheduler between two batches, and in that call the
    fingerprints are taken anew; one of ``parts``, of which the first begins. ``pids``: of the
    engine's ranks, one of whose ancestors has to listen there before it gets the key; ``None``:
    the address was named by whoever has the key.
    """
    # SGLang has no settings of these names, and does nothing.
    body = {"server_args": {PART: part, PARTS: parts}}
    reason, _ = ask_engine(url, api_key, pids, "/set_internal_state", body)
    if reason:
        print(
            f"{url} could not be asked to capture its weights again ({reason}). --url and "
            "--api-key name another address and a key.",
            file=sys.stderr,
        )
    return not reason


def ask_engine(
    url: str,
    api_key: str,
    pids: Iterable[int] | None,
    path: str,
    body: object,
    *,
    seconds: float = 60.0,
) -> tuple[str, object]:
    """Why it was not done, or nothing, and what was answered, as ``request_capture`` asks."""
    reason, answer = _request(url + path, "", body, seconds)
    if reason and api_key and answer == _UNAUTHORIZED:
        port = urllib.parse.urlsplit(url).port or (443 if url.startswith("https") else 80)
        if pids is None or any(_listens(pid, port) for pid in pids):
            return _request(url + path, api_key, body, seconds)
        reason = (
            f"it wants a key, and what listens on port {port} is no process of this engine that "
            "can be seen here, so it did not get the key"
        )
    return reason, answer


def _request(address: str, api_key: str, body: object, seconds: float) -> tuple[str, object]:
    request = urllib.request.Request(  # noqa: S310 -- the engine's own address, or one given
        address,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    )
    # A proxy neither reaches an engine on this host nor is to know its key, and nor does whoever
    # it sends one to.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        with opener.open(request, timeout=seconds) as response:
            return "", _json(response)
    except urllib.error.HTTPError as error:
        return f"it answers with status {error.code}", _json(error)
    except http.client.HTTPException as error:
        return f"it speaks no HTTP: {error!r}", None
    except OSError as error:
        return str(error), None


def _json(response: IO[bytes]) -> object:
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        return json.loads(response.read(_LARGEST_ANSWER))
    return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _listens(pid: int, port: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process or one of its ancestors listens on a port of this network namespace."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    while sockets and pid > 1:
        try:
            for descriptor in (proc / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in sockets:
                        return True
            # Field 4 of proc_pid_stat(5); the name before it may hold anything.
            stat = (proc / str(pid) / "stat").read_text().rpartition(")")[2]
        except OSError:
            return False
        pid = int(stat.split()[1])
    return False


def _listening(port: int, proc: Path) -> set[str]:
    """Inodes of sockets that listen (state 0A) on a port: proc(5), ``/proc/net/tcp``."""
    found = set()
    for file in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / file).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found
