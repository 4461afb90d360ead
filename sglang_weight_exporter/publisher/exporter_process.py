# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps one exporter process alive for all ranks of this user on this host.

Each rank has one thread that is blocked in ``flock`` on the exporter's lock. Whoever gets it
starts the exporter and hands the lock over; when that process dies, the kernel wakes the next.
No thread runs between the two.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sglang_weight_exporter.process_log import Message, Secrets, read_messages
from sglang_weight_exporter.settings import PREFIX
from sglang_weight_exporter.store.locks import FileLock
from sglang_weight_exporter.store.runtime_dir import VARIABLE, RuntimeDir

logger = logging.getLogger("sglang_weight_exporter")

#: An exporter that ends sooner than this could not do its work: the next one waits, each time
#: twice as long.
_HEALTHY_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 60.0

#: Settings that a rank's snapshot says, because engines of a host may differ in them.
_OF_EACH_RANK = tuple(f"{PREFIX}{name}_DIR" for name in ("METADATA", "REFERENCE", "MANIFEST"))


class Supervisor:
    """One rank's share in keeping the exporter process alive.

    ``come_back``: publish what readers cannot find any more. An exporter ends when its directory
    was removed, or when it finds nobody alive, which wakes the ranks: those of a static engine
    would write nothing.
    """

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        environ: Mapping[str, str],
        *,
        come_back: Callable[[], None],
    ) -> None:
        self._runtime_dir = runtime_dir
        self._environ = environ
        self._come_back = come_back
        #: What the last exporter process said, if it could not do its work.
        self._complaints: set[Message] = set()

    def start(self) -> None:
        threading.Thread(
            target=self._run, name="sglang-weight-exporter-process", daemon=True
        ).start()

    def _run(self) -> None:
        pause = 0.0
        while True:
            try:
                lock = FileLock(self._runtime_dir.exporter_lock)
                self._acquire(lock)
                self._come_back()
                if pause:
                    time.sleep(pause)
                started = time.monotonic()
                process = self._spawn(lock)
                # Ours must go at once: the lock is to end with the exporter.
                lock.close()
                killed = not self._relay(process)
                healthy = time.monotonic() - started > _HEALTHY_SECONDS
                if healthy:
                    self._complaints.clear()
                # Killed from outside is not its fault: replace it at once.
                pause = 0.0 if healthy or killed else min(max(2 * pause, 1), _LONGEST_PAUSE_SECONDS)
            except OSError as error:
                lock.close()
                logger.warning(
                    "sglang_weight_exporter: the exporter process cannot be started (%s), so "
                    "nothing is served from here for now. SGLang is not affected.",
                    error,
                )
                pause = _LONGEST_PAUSE_SECONDS
                time.sleep(pause)

    def _acquire(self, lock: FileLock) -> None:
        try:
            lock.acquire(block=True)
        except FileNotFoundError:
            self._come_back()
            lock.acquire(block=True)

    def _spawn(self, lock: FileLock) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sglang_weight_exporter",
                "serve",
                "--lock-fd",
                str(lock.fileno()),
            ],
            pass_fds=[lock.fileno()],
            env=exporter_environ(self._environ, self._runtime_dir),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A Ctrl-C is meant for the engine; the exporter ends once no rank is alive.
            start_new_session=True,
        )

    def _relay(self, process: subprocess.Popen[str]) -> bool:
        """What the exporter says, into the engine's log, until it has ended; whether it ended by
        itself. The process that was started ends at once, and the exporter is a child of its.

        A pipe and not the engine's own standard error: an exporter that outlives its engine for
        a while must not keep open what others wait to see closed.
        """
        assert process.stdout is not None
        ended = False
        complaints = set()
        # It hides them itself; what its interpreter says of a crash comes as it is.
        secrets = Secrets(self._environ)
        with process.stdout:
            for message in read_messages(process.stdout):
                if message is None:
                    ended = True
                    continue
                complaints.add(message)
                # An exporter that cannot start says why with every try: in the log it is once.
                if message not in self._complaints:
                    text = secrets.hide(message.text)
                    logger.log(message.level, "sglang_weight_exporter: %s", text)
        self._complaints = complaints
        process.wait()
        return ended


def exporter_environ(environ: Mapping[str, str], runtime_dir: RuntimeDir) -> dict[str, str]:
    """The engine's environment, less what would reach into the exporter process."""
    result = dict(environ)
    # SGLang's own; prometheus_client would write its values there.
    result.pop("PROMETHEUS_MULTIPROC_DIR", None)
    # SGLang preloads torch_memory_saver into its ranks, which replaces CUDA's allocation calls.
    preload = [
        library
        for library in result.pop("LD_PRELOAD", "").replace(":", " ").split()
        if "torch_memory_saver" not in library
    ]
    if preload:
        result["LD_PRELOAD"] = ":".join(preload)
    result[VARIABLE] = str(runtime_dir.path)
    # Each rank says its own: engines of several trainers may be on a host.
    for variable in _OF_EACH_RANK:
        result.pop(variable, None)
    # A file named like a standard module in the engine's working directory is not ours to import.
    if Path(__file__).resolve().parents[2] != Path.cwd():
        result["PYTHONSAFEPATH"] = "1"
    result["PYTHONUNBUFFERED"] = "1"
    return result
